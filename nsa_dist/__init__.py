"""nsa-dist: trains language models on long sequences with Native Sparse Attention over many GPUs."""

__version__ = "0.1.0"
