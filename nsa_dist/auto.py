"""parallel.dp=auto and parallel.cp=auto: the numbers of ranks for the places that there are."""

from collections.abc import Iterator
from dataclasses import replace

from nsa_dist.config import AUTO, Config, ConfigError, check_config


def has_auto(config: Config) -> bool:
    """Whether a number is left to choose."""
    return AUTO in (config.parallel.dp, config.parallel.cp)


def choose_sizes(config: Config, places: list[int]) -> tuple[Config, str]:
    """The configuration with both numbers, and in one line why these; "" where none was left to choose.

    places: of each node, how many ranks it has room for. Chosen is what uses most places; of those what keeps a
    context-parallel group inside a node; of those the largest cp, which needs the least memory for a rank.
    Raises ConfigError where the places are too few for a number that is given.
    """
    if not has_auto(config):
        return config, ""
    total, largest = sum(places), max(places, default=0)
    fitting = list(_fitting(config, total))
    if not fitting:
        parallel = config.parallel
        raise ConfigError(
            f"parallel.dp={parallel.dp} parallel.cp={parallel.cp}: no numbers that the configuration allows fit the "
            f"{total} places of {len(places)} nodes"
        )
    dp, cp = max(fitting, key=lambda pair: (pair[0] * pair[1], _groups_inside(places, pair[1]) >= pair[0], pair[1]))
    inside = "inside nodes" if _groups_inside(places, cp) >= dp else f"over nodes (the largest has {largest})"
    left = total - dp * cp
    why = f"dp {dp} x cp {cp}: {dp * cp} of {total} places on {len(places)} nodes, cp groups {inside}"
    if left:
        why += f"; {left} stay free (data.batch_size={config.data.batch_size}, data.seq_len={config.data.seq_len})"
    return _sized(config, dp, cp), why


def _fitting(config: Config, total: int) -> Iterator[tuple[int, int]]:
    """The pairs that the configuration allows on so many places."""
    parallel, batch = config.parallel, config.data.batch_size
    dps = [dp for dp in range(1, min(batch, total) + 1) if batch % dp == 0] if parallel.dp == AUTO else [parallel.dp]
    for dp in dps:
        for cp in range(1, total // dp + 1) if parallel.cp == AUTO else [parallel.cp]:
            if dp * cp > total:
                continue
            try:
                _sized(config, dp, cp)
            except ConfigError:
                continue
            yield dp, cp


def _sized(config: Config, dp: int, cp: int) -> Config:
    return check_config(replace(config, parallel=replace(config.parallel, dp=dp, cp=cp)))


def _groups_inside(places: list[int], cp: int) -> int:
    """How many groups of cp ranks have room without leaving a node."""
    return sum(there // cp for there in places)
