"""One GPU's mathematics: NSA's definition and its implementations."""

from nsa_dist.kernels.attention import nsa_attention
from nsa_dist.kernels.spec import NSASpec

__all__ = ["NSASpec", "nsa_attention"]
