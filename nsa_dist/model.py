"""The decoder: RMSNorm, attention, SwiGLU, and the loss of each token. One packed sequence's part at a time."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nsa_dist.attention import Attention, Compressor
from nsa_dist.config import Config, layer_kinds
from nsa_dist.data import IGNORED
from nsa_dist.parallel.operator import checkpoint_contexts
from nsa_dist.parallel.sequence import ShardedSequence

LOSS_CHUNK = 4096  # tokens whose logits are held at a time


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, config: Config, kind: str) -> None:
        super().__init__()
        model = config.model
        self.attention_norm = nn.RMSNorm(model.width, eps=model.norm_eps)
        self.attention = Attention(config, kind)
        self.feed_forward_norm = nn.RMSNorm(model.width, eps=model.norm_eps)
        self.feed_forward = FeedForward(model.width, model.ffn or -(-model.width * 8 // 3 // 64) * 64)
        self.recompute = config.train.activation_checkpoint == "layer"

    def forward(self, x: Tensor, sequence: ShardedSequence) -> Tensor:
        if self.recompute:
            return checkpoint(self._forward, x, sequence, use_reentrant=False, context_fn=checkpoint_contexts)
        return self._forward(x, sequence)

    def _forward(self, x: Tensor, sequence: ShardedSequence) -> Tensor:
        x = x + self.attention(self.attention_norm(x), sequence)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """A causal language model over this rank's part of a packed sequence."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        model = config.model
        self.embedding = nn.Embedding(vocab_size, model.width)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in layer_kinds(model))
        self.norm = nn.RMSNorm(model.width, eps=model.norm_eps)
        self.head = nn.Linear(model.width, vocab_size, bias=False)
        self._initialise(model.init_std, len(self.layers))
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens_S: Tensor, labels_S: Tensor, sequence: ShardedSequence) -> Tensor:
        """The loss of each token [S], at least float32; 0 where the label is IGNORED."""
        x = self.embedding(tokens_S)
        for layer in self.layers:
            x = layer(x, sequence)
        x = self.norm(x)
        # Logits of a chunk at a time, computed again in the backward: all of them would be S x vocabulary.
        chunks = [slice(a, a + LOSS_CHUNK) for a in range(0, max(len(x), 1), LOSS_CHUNK)]
        parts = [checkpoint(self._loss, x[at], labels_S[at], use_reentrant=False) for at in chunks]
        return torch.cat(parts)

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(x)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="none")

    def _initialise(self, std: float, layers: int) -> None:
        """Normal weights; those that write into the residual stream smaller by the root of twice the layers."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith((".output", "feed_forward.down"))
                nn.init.normal_(module.weight, std=std / (2 * layers) ** 0.5 if residual else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, Compressor) and module.kind == "mlp":
                nn.init.normal_(module.position, std=std)
