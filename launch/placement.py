"""Where ranks run: the places that the cluster's nodes have, and one host on each node that is used."""

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nsa_dist.launch.host import Host

_ANSWER_S = 5.0  # a host that is silent for longer may be lost with its node
_END_S = 25.0  # a host itself waits 20 s for a process that was killed
_DECLARE_S = 60.0  # for Ray to declare that node dead


@dataclass(frozen=True)
class Node:
    """A living node of the cluster, with the places (GPUs, or CPUs) that this run has or could have there."""

    id: str
    name: str  # stays when a lost node comes back; Ray's default is its address
    address: str
    machine: str
    places: int


@dataclass(frozen=True)
class Placed:
    """A host with its ranks."""

    node: Node
    host: Any  # the actor
    ranks: list[int]


@dataclass
class _Held:
    node: Node
    actor: Any
    ready: Any  # of the actor, once


class Places:
    """The places that a run holds, one host a node. `device`: cpu or cuda, whose unit a place is."""

    def __init__(self, device: str) -> None:
        self._unit = "GPU" if device == "cuda" else "CPU"
        self._held: dict[str, _Held] = {}

    def nodes(self, held_stay: bool = False) -> list[Node]:
        """The living nodes in a fixed order, with what is held there and what is free.

        held_stay: only what is held where something is held; a host can't grow while its ranks run.
        """
        free = available_resources_per_node()
        found = []
        for row in ray.nodes():
            if not row["Alive"]:
                continue
            held = self._held.get(row["NodeID"])
            if held and held_stay:
                found.append(held.node)
                continue
            places = int(free.get(row["NodeID"], {}).get(self._unit, 0)) + (held.node.places if held else 0)
            places = min(places, int(row["Resources"].get(self._unit, 0)))  # what was freed may be counted late
            address, name = row["NodeManagerAddress"], row["NodeName"]
            found.append(Node(row["NodeID"], name, address, row["NodeManagerHostname"], places))
        return sorted(found, key=lambda node: (_numbers(node.address), _numbers(node.name), node.id))

    def reserve(self, nodes: list[Node], owners: list[int]) -> None:
        """Starts a host on each node with ranks (rank r is nodes[owners[r]]'s) where none is large enough."""
        for index, node in enumerate(nodes):
            wanted = owners.count(index)
            held = self._held.get(node.id)
            if wanted and (held is None or held.node.places < wanted):
                self._drop(node.id)
                size = {"num_gpus": wanted, "num_cpus": wanted} if self._unit == "GPU" else {"num_cpus": wanted}
                actor: Any = (
                    ray.remote(Host)
                    .options(
                        **size,
                        max_concurrency=8,
                        scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
                    )
                    .remote()
                )
                mine = Node(node.id, node.name, node.address, node.machine, wanted)
                self._held[node.id] = _Held(mine, actor, actor.ready.remote())

    def ready(self, timeout_s: float) -> bool:
        """Whether all hosts have started, after waiting for at most so long. Raises RayError for one that can't."""
        refs = [held.ready for held in self._held.values()]
        done, open_ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s) if refs else ([], [])
        ray.get(done)
        return not open_

    def placed(self, nodes: list[Node], owners: list[int]) -> list[Placed]:
        """The hosts of these ranks, in the order of nodes; others are given back."""
        used = sorted(set(owners))
        self.give_back({nodes[index].id for index in used})
        by_node = [(nodes[index], [rank for rank, owner in enumerate(owners) if owner == index]) for index in used]
        return [Placed(node, self._held[node.id].actor, ranks) for node, ranks in by_node]

    def give_back(self, but: set[str]) -> None:
        """All places but those on nodes of these ids."""
        for id_ in set(self._held) - but:
            self._drop(id_)

    def settle(self) -> None:
        """Ends all ranks; gives up hosts that are gone, and returns once Ray knows that their nodes are dead.

        Choosing sizes before that would count on a node that is no more.
        """
        asked = {id_: held.actor.end.remote() for id_, held in self._held.items()}
        deadline, answer = time.monotonic() + _DECLARE_S, time.monotonic() + _END_S
        for id_, ref in asked.items():
            try:
                ray.get(ref, timeout=max(answer - time.monotonic(), 0.1))
            except (RayError, GetTimeoutError):
                self._drop(id_)
                while is_alive(id_) and not _answers(id_) and time.monotonic() < deadline:
                    time.sleep(0.2)

    def close(self) -> None:
        """Ends all ranks and gives all places back."""
        self.give_back(set())

    def _drop(self, id_: str) -> None:
        held = self._held.pop(id_, None)
        if held:
            ray.kill(held.actor)


def owners(places: list[int], dp: int, cp: int) -> list[int]:
    """The node's index of each of dp * cp ranks: groups of cp in one node where they fit, nodes in their order.

    The places must suffice. The ranks of a group are neighbours; what fits in no node is spread at the end.
    """
    inside = [there // cp for there in places]
    whole: list[int] = []
    for index, groups in enumerate(inside):
        whole += [index] * (cp * min(groups, dp - len(whole) // cp))
    rest = [index for index, there in enumerate(places) for _ in range(there - whole.count(index))]
    return whole + rest[: dp * cp - len(whole)]


def is_alive(node_id: str) -> bool:
    """Whether Ray counts on this node."""
    return any(row["NodeID"] == node_id and row["Alive"] for row in ray.nodes())


def _answers(node_id: str) -> bool:
    """Whether the node runs a task."""
    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    try:
        task = ray.remote(_nothing).options(num_cpus=0, scheduling_strategy=affinity)
        ray.get(task.remote(), timeout=_ANSWER_S)
    except (RayError, GetTimeoutError):
        return False
    return True


def _nothing() -> None:
    pass


def _numbers(text: str) -> list[Any]:
    """Sorts node-10 behind node-9."""
    words = "".join(c if c.isdigit() else f" {c} " for c in text).split()
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in words]
