"""`nsa-dist plan`: what a configuration would take on a cluster: bytes, memory, time; and which choices fit.

Nothing is run. Bytes are counted by the plans that a run follows, memory from what the model's code keeps, time from
operations over the rates that the cluster reaches; each step is as long as its slowest rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from nsa_dist.cluster import FREE, Cluster
from nsa_dist.config import CHOICES, Config, ConfigError, check_config, layer_kinds, nsa_spec
from nsa_dist.cuts import Cutter, dense_flops
from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.packing import Packing
from nsa_dist.parallel.balance import branch_flops, by_rank, imbalance
from nsa_dist.parallel.layout import LAYOUTS
from nsa_dist.parallel.plan import Floats
from nsa_dist.parallel.traffic import Traffic, TrafficModel, add_traffic
from nsa_dist.plan_memory import Part, memory
from nsa_dist.plan_selection import Selections
from nsa_dist.plan_traffic import Shapes, layer_traffic, make_units, parameter_shapes, parameter_traffic
from nsa_dist.rivals import layer_sizes

_SAME = 0.01  # step times that differ by less than this share are the same: then less memory decides


@dataclass(frozen=True)
class Plan:
    """One choice on a cluster. Times in seconds of a step; compute, exposed, hidden [P]: of each rank of a sequence.

    traffic: of one sequence, by kind and phase the ledger's fields [4, P]; parameters [4, world].
    """

    config: Config
    traffic: Traffic
    parameters: Traffic
    passes: int
    memory: dict[str, int]
    room: int
    compute_s: Floats
    exposed_s: Floats
    hidden_s: Floats

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.room

    @property
    def step_s(self) -> float:
        return float((self.compute_s + self.exposed_s).max())

    @property
    def slowest(self) -> int:
        return int((self.compute_s + self.exposed_s).argmax())

    @property
    def imbalance(self) -> float:
        return imbalance(self.compute_s)


def plans(config: Config, cluster: Cluster, vocabulary: int, selections: Selections) -> list[Plan]:
    """Every choice of cp, dp, layout and checkpointing that the configuration allows, the best first.

    Those that fit into memory come first, by their step's time; of equal times the one that needs less memory.
    Raises ConfigError where no choice is allowed.
    """
    found, shapes = [], parameter_shapes(config, vocabulary)
    for choice in _choices(config, cluster):
        cut = Cut(choice, cluster, shapes, vocabulary, selections)
        for checkpoint in CHOICES["train.activation_checkpoint"]:
            train = replace(choice.train, activation_checkpoint=checkpoint)
            found.append(predict(replace(choice, train=train), cluster, cut))
    if not found:
        raise ConfigError(
            f"--gpus {cluster.gpus}: no parallel.cp, parallel.dp and layout fit data.seq_len={config.data.seq_len}, "
            f"data.batch_size={config.data.batch_size} and the exchange; fewer GPUs may"
        )
    fastest = min(plan.step_s for plan in found)
    return sorted(found, key=lambda p: (not p.fits, _rounded(p.step_s, fastest), p.bytes))


def _rounded(seconds: float, fastest: float) -> int:
    return round(np.log(seconds / fastest) / np.log(1 + _SAME)) if fastest > 0 else 0


def _choices(config: Config, cluster: Cluster) -> Iterator[Config]:
    """cp a divisor of the GPUs; dp as many sequences at a time as the rest and the batch allow."""
    for cp in (n for n in range(1, cluster.gpus + 1) if cluster.gpus % n == 0):
        most = cluster.gpus // cp
        dp = max(n for n in range(1, most + 1) if config.data.batch_size % n == 0)
        shard = config.parallel.shard if config.parallel.shard and dp * cp % config.parallel.shard == 0 else 0
        for layout in (*LAYOUTS, "uneven") if cp > 1 else ("contiguous",):
            parallel = replace(config.parallel, cp=cp, dp=dp, layout=layout, shard=shard)
            try:
                yield check_config(replace(config, parallel=parallel))
            except ConfigError:
                continue


@lru_cache(maxsize=1)
def _one_document(tokens: int, spec: NSASpec) -> Packing:
    return Packing(np.array([0, tokens]), spec)


class Cut:
    """A sequence, one document, cut over the ranks of a configuration, its dp and cp numbers; on the cluster's first
    dp x cp GPUs. What it sends, whether or not layers are checkpointed."""

    def __init__(
        self, config: Config, cluster: Cluster, shapes: Shapes, vocabulary: int, selections: Selections
    ) -> None:
        parallel, spec, kinds = config.parallel, nsa_spec(config.nsa), layer_kinds(config.model)
        world = parallel.dp * parallel.cp
        self.vocabulary, self.passes = vocabulary, config.data.batch_size // parallel.dp
        packing = _one_document(config.data.seq_len, spec)
        layout = Cutter(config, vocabulary, shapes).layout(packing)
        nodes = cluster.nodes(world)
        self.model = TrafficModel(packing, layout, layer_sizes(config), nodes[: parallel.cp])
        self.units = make_units(shapes, parallel.shard or world)
        self.layers = layer_traffic(config, self.model, selections.of(packing, layout))
        self.parameters = parameter_traffic(config, self.units, nodes, self.passes)
        self.flops = {name: by_rank(flops, layout) for name, flops in branch_flops(packing, self.model.sizes).items()}
        self.kinds = kinds

    def of(self, kind: str) -> list[Traffic]:
        """The traffic of layers of a kind."""
        return [traffic for found, traffic, _ in self.layers if found == kind]


def predict(config: Config, cluster: Cluster, cut: Cut) -> Plan:
    compute, exposed, hidden = _times(config, cluster, cut)
    traffic: Traffic = {}
    for _, layer, times in cut.layers:
        add_traffic(traffic, layer, times)
    return Plan(
        config,
        traffic,
        cut.parameters,
        cut.passes,
        memory(config, cut.units, cut.vocabulary, largest_part(config, cut), cut.passes),
        int(cluster.memory_gb * 1e9 * FREE),
        compute,
        exposed,
        hidden,
    )


def largest_part(config: Config, cut: Cut) -> Part:
    """Of each figure the rank's with most."""
    sizes, parallel = cut.model.sizes, config.parallel
    row, head = sizes.kv * sizes.element_bytes, (sizes.dk + sizes.dv) * sizes.element_bytes

    def rows(layer: str, kind: str, size: int = row) -> int:
        flows = [t[kind, "forward"][1].max() for t in cut.of(layer) if (kind, "forward") in t]
        return int(max(flows, default=0)) // size

    selected, bound = rows("nsa", "selected", head), parallel.exchange_max_bytes // head
    held, kept = min(selected, bound) if bound else selected, 0 if bound and selected > bound else selected
    if parallel.exchange == "allgather_heads":
        held, kept = 2 * selected // sizes.groups, 0
    full = rows("full", "full_kv")
    return Part(
        tokens=int(cut.model.rows.max()),
        compressed=rows("nsa", "compressed"),
        window=max(rows(kind, "window_halo") for kind in ("nsa", "window")),
        selected=held,
        kept=kept,
        full=full if parallel.full_exchange == "allgather" else full // max(parallel.cp - 1, 1),
    )


def _times(config: Config, cluster: Cluster, cut: Cut) -> tuple[Floats, Floats, Floats]:
    """Of each rank of a sequence, in all passes of a step: seconds of compute, and of what it waits for others,
    exposed and hidden. An exchange is hidden as far as the work lasts that the program does while it travels."""
    ranks = cut.model.layout.ranks
    work = {name: flops / (cluster.attention_tflops * 1e12) for name, flops in cut.flops.items()}
    layer = {
        "nsa": work["compressed"] + work["selected"] + work["window"],
        "full": work["full"],
        "window": work["window"],
    }
    dense = dense_flops(config, sum(u.numbers for u in cut.units[:-1]), cut.units[-1].numbers)
    compute = cut.model.rows.astype(np.float64) * dense / (cluster.tflops * 1e12)
    compute += sum((layer[kind] for kind in cut.kinds), np.zeros(ranks))
    exposed, hidden, cover = np.zeros(ranks), np.zeros(ranks), _covers(config, cut.model, work)
    # Parameters of a layer travel while another one is worked on.
    weights = {key: flow[:, :ranks] // cut.passes for key, flow in cut.parameters.items()}
    both = {"forward": compute / 3, "backward": compute * 2 / 3}
    cover["weights"] = {key: both[key[1]] for key in weights}
    for kind, traffic, times in [*cut.layers, ("weights", weights, 1)]:
        for key, flow in traffic.items():
            seconds = _seconds(cluster, flow)
            behind = np.minimum(seconds, cover[kind].get(key, np.zeros(ranks)))
            hidden += behind * times
            exposed += (seconds - behind) * times
    return compute * cut.passes, exposed * cut.passes, hidden * cut.passes


def _covers(config: Config, model: TrafficModel, work: dict[str, Floats]) -> dict[str, dict[tuple[str, str], Floats]]:
    """For each kind of layer and of traffic the seconds [P] of work behind which it travels."""
    forward, backward = 2 / 7, 5 / 7  # of a branch's operations
    local: Floats = work["selected"] * _own_share(model)
    return {
        "nsa": {
            ("compressed", "forward"): work["window"] * forward,
            ("selected", "forward"): local * forward,
            ("compressed", "backward"): (work["window"] + work["selected"]) * backward,
            ("window_halo", "backward"): work["selected"] * backward,
            ("selected", "backward"): local * backward,
        },
        "full": {("full_kv", "forward"): work["full"] * forward, ("full_kv", "backward"): work["full"] * backward}
        if config.parallel.full_exchange == "ring"
        else {},
        "window": {},
    }


def _seconds(cluster: Cluster, flow: Any) -> Floats:
    """Of one exchange on each rank: the slower of what goes inside the node and between nodes, either way."""
    sent, received, sent_between, received_between = flow
    inside = np.maximum(sent - sent_between, received - received_between) / (cluster.inside_gb_s * 1e9)
    between = np.maximum(sent_between, received_between) / (cluster.between_gb_s * 1e9)
    return np.maximum(inside, between)


def _own_share(model: TrafficModel) -> Floats:
    """[P]: which share of a query's selected blocks is on its own rank, as far as positions tell."""
    spec = model.packing.spec
    own, others = model.rows / 2, model.causal_counts.sum(1)
    return np.maximum(own / np.maximum(own + others, 1), spec.local_blocks / spec.select_count)
