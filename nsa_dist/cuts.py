"""How a configuration cuts its sequences over ranks: `parallel.layout`, and what each rank's part costs."""

from nsa_dist.config import Config, layer_kinds
from nsa_dist.kernels.packing import Packing
from nsa_dist.parallel.balance import Machine, by_rank, choose_layout, token_flops, uneven_layout
from nsa_dist.parallel.layout import Layout, make_layout
from nsa_dist.parallel.plan import Floats
from nsa_dist.plan_traffic import Shapes, parameter_shapes
from nsa_dist.rivals import layer_sizes

# What a rank reaches: it decides between layouts of nearly equal balance. A CPU's is that of few cores and gloo.
MACHINES = {"cuda": Machine(), "cpu": Machine(flops_per_s=5e10, bytes_per_s=1e9)}


class Cutter:
    """Cuts sequences as the configuration says: `contiguous`, `zigzag`, `uneven` (contiguous parts of equal work), or
    `auto`: for each sequence whichever makes the slowest rank fastest. The same on every rank."""

    def __init__(self, config: Config, vocabulary: int, shapes: Shapes | None = None) -> None:
        self.kind, self.ranks, self.kinds = config.parallel.layout, config.parallel.cp, layer_kinds(config.model)
        self.sizes, self.dense = layer_sizes(config), _dense(config, shapes or parameter_shapes(config, vocabulary))
        self.machine = MACHINES.get(config.launch.device, Machine())

    def layout(self, packing: Packing) -> Layout:
        block = packing.spec.select_block
        if self.kind == "uneven":
            return uneven_layout(token_flops(packing, self.sizes, self.kinds, self.dense), self.ranks, block)
        if self.kind == "auto":
            found = choose_layout(packing, self.ranks, self.sizes, self.kinds, self.dense, self.machine)
            return found.layout
        return make_layout(self.kind, packing.tokens, self.ranks, block)

    def work(self, packing: Packing, layout: Layout) -> Floats:
        """[P]: operations of each rank in a step, by the cost model."""
        return by_rank(token_flops(packing, self.sizes, self.kinds, self.dense), layout)


def dense_flops(config: Config, layers: int, root: int) -> float:
    """Of a token in all that isn't attention, from the numbers of parameters in the layers and outside them.

    2 each in the forward, 4 in the backward, 2 more for what is computed again: the logits, and under checkpointing
    the layers. The embedding is looked up, not multiplied.
    """
    head = root // (1 if config.model.tie_embeddings else 2)
    return layers * (8 if config.train.activation_checkpoint == "layer" else 6) + head * 8


def _dense(config: Config, shapes: Shapes) -> float:
    counts = [sum(shape.numel() for shape in parameters) for _, parameters in shapes]
    return dense_flops(config, sum(counts[:-1]), counts[-1])
