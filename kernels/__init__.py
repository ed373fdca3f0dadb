"""One GPU's mathematics: NSA's definition and its implementations."""

from .spec import NSASpec

__all__ = ["NSASpec"]
