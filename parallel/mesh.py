"""The mesh of ranks: axes `dp` (different sequences) and `cp` (one sequence cut), and who holds parameters."""

import os
import socket
from dataclasses import dataclass, field

import numpy as np
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nsa_dist.kernels.packing import Ints
from nsa_dist.parallel.ledger import Ledger


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as a rank sees it: its communicator, and where the others are."""

    group: dist.ProcessGroup
    rank: int
    size: int
    nodes: Ints  # [size]: the node of each rank of the axis
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def other_node(self) -> Ints:
        """[size]: 1 where that rank is on another node."""
        return (self.nodes != self.nodes[self.rank]).astype(np.int64)


@dataclass(frozen=True)
class Mesh:
    """`cp` ranks are neighbours; `parameters` is the mesh over which FSDP2 shards (and replicates) them."""

    world: Axis
    dp: Axis
    cp: Axis
    shard: Axis
    parameters: DeviceMesh
    ledger: Ledger


def make_mesh(dp: int, cp: int, shard: int, device_type: str) -> Mesh:
    """The mesh of dp * cp ranks, each axis with a communicator of its own.

    shard: ranks that hold one copy of the parameters together (0: all); more copies are replicas (HSDP).
    torch.distributed must be initialised. Raises ValueError where the sizes don't make up the world.
    """
    world = dist.get_world_size()
    if dp * cp != world:
        raise ValueError(f"parallel.dp={dp} x parallel.cp={cp}: must make {world}, the number of processes")
    shard = shard or world
    if world % shard:
        raise ValueError(f"parallel.shard={shard}: must divide the {world} ranks")
    nodes = _nodes()
    ledger = Ledger()
    mesh = init_device_mesh(device_type, (dp, cp), mesh_dim_names=("dp", "cp"))
    if shard == world:
        parameters = init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    else:
        shape = (world // shard, shard)
        parameters = init_device_mesh(device_type, shape, mesh_dim_names=("replica", "shard"))
    return Mesh(
        world=_axis(dist.group.WORLD, nodes, ledger),
        dp=_axis(mesh.get_group("dp"), nodes, ledger),
        cp=_axis(mesh.get_group("cp"), nodes, ledger),
        shard=_axis(parameters.get_group("shard"), nodes, ledger),
        parameters=parameters,
        ledger=ledger,
    )


def _axis(group: dist.ProcessGroup | None, nodes: Ints, ledger: Ledger) -> Axis:
    assert group is not None
    members = dist.get_process_group_ranks(group)
    return Axis(group, dist.get_rank(group), len(members), nodes[members], ledger)


def _nodes() -> Ints:
    """The number of each rank's node: ranks with the same host name share one."""
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, f"{socket.gethostname()}/{_network_namespace()}")
    return np.array([names.index(name) for name in names], np.int64)


def _network_namespace() -> str:
    """Containers and namespaces of one machine are nodes of their own: their traffic crosses a network."""
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:
        return ""
