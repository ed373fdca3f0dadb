"""The attention layer: projections, gates, RoPE and compression around the context-parallel operation.

Shapes: S tokens of this rank's part, W width, H query heads, G KV heads, Dk and Dv head sizes.
"""

import math

import torch
from torch import Tensor, nn

from nsa_dist.config import Config, ModelConfig
from nsa_dist.kernels.compress import compress_mean, compress_mlp
from nsa_dist.parallel.attention import CompressHalo, WindowExchange
from nsa_dist.parallel.exchanges import full_exchange, nsa_exchange
from nsa_dist.parallel.operator import apply
from nsa_dist.parallel.sequence import ShardedSequence


class Rope:
    """Rotary positions (arXiv 2104.09864), with YaRN (arXiv 2309.00071) where yarn_factor > 1.

    Positions count from the start of the document, not of the rank's part.
    """

    def __init__(self, model: ModelConfig) -> None:
        dim, factor = model.head_dim, model.yarn_factor
        frequency = model.rope_base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        self.magnitude = 1.0
        if factor > 1:
            # Turns over the original length: above 32 a pair keeps its frequency, below 1 it is interpolated.
            turns = model.yarn_original * frequency / (2 * math.pi)
            keep = ((turns - 1) / (32 - 1)).clamp(0, 1)
            frequency = frequency * keep + frequency / factor * (1 - keep)
            self.magnitude = 0.1 * math.log(factor) + 1
        self.frequency = frequency

    def __call__(self, x_SHD: Tensor, position_S: Tensor) -> Tensor:
        """Turns the pairs (i, i + D/2) of each head. Angles are made in float64: at 1M tokens float32 is coarse."""
        angle = position_S[:, None].double() * self.frequency.to(position_S.device)
        work = torch.promote_types(x_SHD.dtype, torch.float32)
        cos = (angle.cos() * self.magnitude).to(work)[:, None]
        sin = (angle.sin() * self.magnitude).to(work)[:, None]
        a, b = x_SHD.to(work).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_SHD.dtype)


class Compressor(nn.Module):
    """Makes compressed keys or values (equation 7), the same for all KV heads."""

    def __init__(self, config: Config, size: int) -> None:
        super().__init__()
        self.kind, self.spec_block = config.nsa.compression, config.nsa.compress_block
        if self.kind == "mlp":
            self.position = nn.Parameter(torch.empty(self.spec_block, size))
            self.up = nn.Linear(self.spec_block * size, 2 * size)
            self.down = nn.Linear(2 * size, size)

    def forward(self, x_NGD: Tensor, sequence: ShardedSequence) -> Tensor:
        """[C_own, G, D] from the tokens of the compression's buffer."""
        chunks = sequence.compress_chunks(x_NGD.shape[1])
        if self.kind == "mean":
            return compress_mean(x_NGD, chunks)
        weights = self.up.weight, self.up.bias, self.down.weight, self.down.bias
        return compress_mlp(x_NGD, chunks, self.position, *weights)


class Attention(nn.Module):
    """One layer's attention of kind `nsa`, `full` or `window`: [S, W] to [S, W]."""

    def __init__(self, config: Config, kind: str) -> None:
        super().__init__()
        model = config.model
        self.kind, self.parallel, self.rope = kind, config.parallel, Rope(model)
        self.heads, self.groups, self.dk = model.heads, model.kv_heads, model.head_dim
        self.dv = model.value_dim or model.head_dim
        self.branches = 3 if kind == "nsa" and not config.nsa.share_kv else 1
        self.query = nn.Linear(model.width, self.heads * self.dk, bias=False)
        self.key = nn.Linear(model.width, self.branches * self.groups * self.dk, bias=False)
        self.value = nn.Linear(model.width, self.branches * self.groups * self.dv, bias=False)
        self.output = nn.Linear(self.heads * self.dv, model.width, bias=False)
        if kind == "nsa":
            self.gate = nn.Linear(model.width, self.heads * 3)
            self.compress_key = Compressor(config, self.dk)
            self.compress_value = Compressor(config, self.dv)

    def forward(self, x_SW: Tensor, sequence: ShardedSequence) -> Tensor:
        rows = len(x_SW)
        q = self.rope(self.query(x_SW).view(rows, self.heads, self.dk), sequence.position_S)
        k = self.key(x_SW).view(rows, self.branches, self.groups, self.dk)
        v = self.value(x_SW).view(rows, self.branches, self.groups, self.dv)
        scale = self.dk**-0.5
        if self.kind == "nsa":
            out = self._nsa(x_SW, q, k, v, sequence, scale)
        else:
            operation = (
                WindowExchange(sequence, scale)
                if self.kind == "window"
                else full_exchange(self.parallel.full_exchange, sequence, scale)
            )
            out = apply(operation, q, self.rope(k[:, 0], sequence.position_S), v[:, 0])
        return self.output(out.flatten(1))

    def _nsa(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, sequence: ShardedSequence, scale: float) -> Tensor:
        # Branch 0 is compressed before RoPE, 1 is selected from, 2 is the window's; with share_kv one serves all.
        k_cmp, v_cmp = self._compress(k[:, 0], v[:, 0], sequence)
        turned = [self.rope(part, sequence.position_S) for part in k.unbind(1)[-2:]]
        k_slc, k_win = turned[0], turned[-1]
        v_slc, v_win = v[:, min(1, self.branches - 1)], v[:, -1]
        gates = self.gate(x).view(len(x), self.heads, 3).sigmoid()
        exchange = nsa_exchange(self.parallel.exchange, sequence, scale, self.parallel.exchange_max_bytes)
        return apply(exchange, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)

    def _compress(self, k: Tensor, v: Tensor, sequence: ShardedSequence) -> tuple[Tensor, Tensor]:
        buffer = apply(CompressHalo(sequence.compress_halo), torch.cat([k, v], dim=-1).flatten(1))
        k_all, v_all = buffer.view(len(buffer), self.groups, self.dk + self.dv).split([self.dk, self.dv], dim=-1)
        k_cmp = self.rope(self.compress_key(k_all, sequence), sequence.compressed_position_C)
        return k_cmp, self.compress_value(v_all, sequence)
