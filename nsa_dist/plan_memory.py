"""What a rank's memory holds at the peak of a step, part by part, counted from the code that makes it.

The peak is a layer's backward, most often the last one's, or the loss: the activations of every layer up to it are
there, and its working set. A test holds the sum against what a run allocates: this must follow what the model's code
keeps.
"""

from dataclasses import dataclass

import torch

from nsa_dist.config import Config, layer_kinds
from nsa_dist.kernels.selected import CHUNK_BYTES
from nsa_dist.model import LOSS_CHUNK
from nsa_dist.plan_traffic import Unit
from nsa_dist.rivals import DTYPES, layer_sizes


@dataclass(frozen=True)
class Part:
    """Of a sequence on one rank: its tokens, and the rows that it gets of others in a layer: compressed tokens,
    window halo, full KV; selected: rows of single KV heads that are held at a time, kept: for the backward too."""

    tokens: int
    compressed: int
    window: int
    selected: int
    kept: int
    full: int


@dataclass(frozen=True)
class Widths:
    """Bytes of a token in a layer."""

    x: int  # the residual stream
    q: int
    out: int
    kv: int  # of one branch
    ffn: int
    wide: int  # bytes of a number of the working type over those of the computing type


def memory(config: Config, units: list[Unit], vocabulary: int, part: Part, passes: int) -> dict[str, int]:
    """Bytes by part; their sum is the peak. passes: sequences that a rank works on in a step, one by one."""
    compute = DTYPES[config.train.dtype]
    wide = torch.promote_types(compute, torch.float32)
    shard, kinds = sum(u.padded for u in units), layer_kinds(config.model)
    recompute = config.train.activation_checkpoint == "layer"
    full = {kind: _saved(config, kind, part) for kind in set(kinds)}
    least = {kind: _kept(config, kind, part) if recompute else full[kind] for kind in set(kinds)}
    saved = sum(least[kind] for kind in kinds)
    work, freed = 0, 0
    for kind in reversed(kinds):  # in a layer's backward those after it have been freed
        work = max(work, _work(config, kind, part) + full[kind] - least[kind] - freed)
        freed += least[kind]
    loss = _loss(config, vocabulary, part, compute.itemsize, wide.itemsize)
    halos = sum(_halos(config, kind, part) for kind in kinds)
    kept = kinds.count("nsa") * _selected(config, part)
    biggest, root = max(u.numbers for u in units[:-1]), units[-1].numbers
    # The root throughout, a layer and the next one; a layer's whole gradients, and once more where they are summed.
    gathered = (root + 2 * biggest) * compute.itemsize + biggest * (compute.itemsize + wide.itemsize)
    return {
        "parameters": shard * wide.itemsize,
        "optimizer": 2 * shard * wide.itemsize,
        "gradients": shard * wide.itemsize if passes > 1 else 0,
        "gathered parameters": gathered if config.parallel.dp * config.parallel.cp > 1 else 0,
        "activations": saved - halos - kept,
        "kv halos": halos,
        "fetched kv": kept,
        "logits, loss" if loss > work else "working set": max(loss, work),
    }


def _widths(config: Config) -> Widths:
    model, sizes = config.model, layer_sizes(config)
    e = sizes.element_bytes
    ffn = model.ffn or -(-model.width * 8 // 3 // 64) * 64
    return Widths(
        model.width * e,
        sizes.heads * sizes.dk * e,
        sizes.heads * sizes.dv * e,
        sizes.kv * e,
        ffn * e,
        max(4, e) // e,
    )


def _saved(config: Config, kind: str, part: Part) -> int:
    """What one layer keeps for its backward."""
    w, sizes, wide = _widths(config), layer_sizes(config), max(4, layer_sizes(config).element_bytes)
    # Two norms: input, output, 1 / norm; on the CPU RMSNorm is made of parts, of which one more is kept.
    norms = 4 * w.x + 2 * wide + (2 * w.x * w.wide if config.launch.device == "cpu" else 0)
    inputs = w.q + sizes.dk * wide  # q, and the angles' sines and cosines
    branches = 1 if kind != "nsa" or config.nsa.share_kv else 3
    inputs += (min(branches, 2) * sizes.groups * sizes.dk + branches * sizes.groups * sizes.dv) * sizes.element_bytes
    inputs += min(branches, 2) * sizes.dk * wide
    per_token = norms + inputs + 4 * w.ffn
    if kind == "nsa":
        per_token += 3 * sizes.heads * sizes.element_bytes + _compression(config)
    return part.tokens * per_token + _outputs(config, kind, part)


def _compression(config: Config) -> int:
    """Bytes of a token: the compression's input, and its blocks, hidden layer and result."""
    w, nsa = _widths(config), config.nsa
    blocks = w.kv * nsa.compress_block + 2 * 8 * nsa.compress_block  # gathered, with their indices
    hidden = 4 * w.kv if config.nsa.compression == "mlp" else 0
    return w.kv + (blocks + hidden + w.kv) // nsa.compress_stride


def _outputs(config: Config, kind: str, part: Part) -> int:
    """What a layer's communicating operations keep: under checkpointing too."""
    w, sizes, wide = _widths(config), layer_sizes(config), max(4, layer_sizes(config).element_bytes)
    if kind == "nsa" and config.parallel.exchange == "ulysses":
        whole = 2 * w.out + w.q + 2 * w.kv + 3 * w.out
        return part.tokens * (whole + 3 * sizes.heads * (wide + sizes.element_bytes))
    per_token = w.out + sizes.heads * wide
    if kind == "nsa":
        per_token = 4 * w.out + 3 * sizes.heads * wide + 4 * sizes.groups * config.nsa.select_count + w.kv
        return part.tokens * per_token + _halos(config, kind, part) + _selected(config, part)
    if kind == "full" and config.parallel.full_exchange == "ulysses":
        per_token += w.q + w.kv + w.out
    return part.tokens * per_token + _halos(config, kind, part)


def _kept(config: Config, kind: str, part: Part) -> int:
    """What one layer keeps under checkpointing: its input, and what communicating operations gave."""
    return part.tokens * _widths(config).x + _outputs(config, kind, part)


def _halos(config: Config, kind: str, part: Part) -> int:
    rows = {"nsa": part.compressed + part.window, "window": part.window, "full": part.full}[kind]
    return rows * _widths(config).kv


def _selected(config: Config, part: Part) -> int:
    return part.kept * _widths(config).kv // config.model.kv_heads


def _work(config: Config, kind: str, part: Part) -> int:
    """The largest working set of a layer's backward: of the feed-forward or of the attention."""
    w, sizes = _widths(config), layer_sizes(config)
    ffn = part.tokens * 2 * (w.x + w.ffn)
    own = part.tokens * (w.q * w.wide + 2 * w.out * w.wide + 4 * w.kv * w.wide)
    row = w.kv // sizes.groups
    remote = part.selected * row * (1 + 3 * w.wide) + (part.compressed + part.full) * w.kv * (2 + 2 * w.wide)
    picks = 0
    if kind == "nsa" and config.launch.device == "cpu":  # what the picks of a chunk of queries give
        each = config.nsa.select_count * max(w.q, w.out) * w.wide
        picks = min(part.tokens * each, CHUNK_BYTES)
    return max(ffn, own + remote + picks - part.tokens * 4 * w.ffn)


def _loss(config: Config, vocabulary: int, part: Part, size: int, wide: int) -> int:
    """The last norm, and a chunk's logits with their softmax and gradients."""
    chunk = min(LOSS_CHUNK, part.tokens)
    logits = chunk * vocabulary * (3 * wide + (2 * size if size < wide else 0))
    return part.tokens * 3 * config.model.width * size + logits
