"""Parameters sharded by FSDP2 over the mesh's ranks, their traffic in the ledger, and their gradients' norm."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor

from nsa_dist.parallel.exchange import all_reduce, count_ring
from nsa_dist.parallel.mesh import Mesh


def shard_parameters(model: nn.Module, units: Iterable[nn.Module], mesh: Mesh, compute_dtype: torch.dtype) -> None:
    """Shards `model`, each of `units` gathered by itself; gradients are reduced in at least float32.

    A gradient comes out as the mean over all ranks: the caller scales its loss by their number.
    """
    work = torch.promote_types(compute_dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=work)
    for module in [*units, model]:
        sharded: Any = fully_shard(module, mesh=mesh.parameters, mp_policy=policy)
        sharded.set_custom_all_gather(_AllGather(mesh))
        sharded.set_custom_reduce_scatter(_ReduceScatter(mesh))


def clip_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh, limit: float) -> float:
    """The norm of all gradients; scales them down to `limit` where it is above (0: never).

    Raises ValueError for a parameter without a gradient: one rank's would be missing on the others.
    """
    local = []
    for parameter in parameters:
        if parameter.grad is None:
            raise ValueError(f"gradient of a parameter of shape {tuple(parameter.shape)}: missing")
        grad = parameter.grad
        local.append(grad.to_local() if isinstance(grad, DTensor) else grad)
    square = torch.zeros((), dtype=torch.float64, device=local[0].device)
    for grad in local:
        square += grad.double().square().sum()
    norm = math.sqrt(float(all_reduce(mesh.shard, square, phase="backward")))
    if limit and norm > limit:
        for grad in local:
            grad.mul_(limit / norm)
    return norm


class _AllGather(DefaultAllGather):
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        # FSDP2 gathers once more in the backward: there, autograd is at work in this thread.
        phase = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
        received = output_tensor.numel() - input_tensor.numel()
        count_ring(self.mesh.shard, received * output_tensor.element_size(), "parameters", phase)
        return super().__call__(output_tensor, input_tensor, *args, **kwargs)


class _ReduceScatter(DefaultReduceScatter):
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        size = output_tensor.element_size()
        received = (input_tensor.numel() - output_tensor.numel()) * size
        copies = self.mesh.world.size // self.mesh.shard.size
        # Copies of the parameters add up their shards' gradients, by FSDP2 and as a ring.
        received += 2 * (copies - 1) * output_tensor.numel() * size // copies
        count_ring(self.mesh.shard, received, "parameters", "backward")
        return super().__call__(output_tensor, input_tensor, *args, **kwargs)


def whole(tensor: Tensor) -> Tensor:
    """A parameter or gradient as one plain tensor, for tests and exports; all ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
