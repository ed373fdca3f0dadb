"""Exchanges by name: which serve NSA layers, which full-attention layers."""

from torch import Tensor

from nsa_dist.parallel.attention import NSAExchange
from nsa_dist.parallel.operator import Operation
from nsa_dist.parallel.rivals.full import FullAllGather, Ring
from nsa_dist.parallel.rivals.heads import HeadAllGather
from nsa_dist.parallel.rivals.ulysses import FullUlysses, NSAUlysses
from nsa_dist.parallel.sequence import ShardedSequence

NSA_EXCHANGES = ("nsa", "allgather", "allgather_heads", "groupcast", "ulysses")
FULL_EXCHANGES = ("ring", "allgather", "ulysses")


def nsa_exchange(
    name: str, sequence: ShardedSequence, scale: float, max_bytes: int = 0, picks: Tensor | None = None
) -> Operation:
    """The operation of an NSA layer. Raises ValueError for an exchange that does not serve NSA layers.

    picks [S, G, n]: a prescribed selection, for measurements (Ulysses, whose ranks hold other queries, takes none).
    """
    if name not in NSA_EXCHANGES:
        raise ValueError(f"parallel.exchange={name}: NSA layers take one of {', '.join(NSA_EXCHANGES)}")
    if name == "ulysses":
        return NSAUlysses(sequence, scale)
    if name == "allgather_heads":
        return HeadAllGather(sequence, scale, picks)
    return NSAExchange(sequence, scale, name, max_bytes, picks)


def full_exchange(name: str, sequence: ShardedSequence, scale: float) -> Operation:
    """The operation of a full-attention layer. Raises ValueError for an exchange that does not serve those."""
    kinds = {"ring": Ring, "allgather": FullAllGather, "ulysses": FullUlysses}
    if name not in kinds:
        raise ValueError(f"parallel.full_exchange={name}: full layers take one of {', '.join(FULL_EXCHANGES)}")
    return kinds[name](sequence, scale)
