"""parallel.dp and parallel.cp chosen for the places that there are."""

import pytest

from nsa_dist.auto import choose_sizes
from nsa_dist.config import ConfigError, load_config

AUTO = ["parallel.dp=auto", "parallel.cp=auto", "data.seq_len=65536"]


@pytest.mark.parametrize(
    ("words", "places", "chosen"),
    [
        (["data.batch_size=4"], [8, 8], (2, 8)),  # a group stays in its node
        (["data.batch_size=4"], [4, 8, 4], (4, 4)),  # as long as a node's least places serve all groups
        (["data.batch_size=1"], [8, 8], (1, 16)),  # one sequence: only cp can use both nodes
        (["data.batch_size=3"], [2, 2], (1, 4)),  # 3 x 1 would leave a place free
        (["data.batch_size=8", "parallel.cp=2"], [3, 3], (2, 2)),  # 3 doesn't divide the batch
        (["data.batch_size=2", "parallel.dp=2"], [5], (2, 2)),
        (["data.seq_len=128"], [8], (1, 2)),  # two blocks serve two ranks
        (["parallel.exchange=ulysses", "model.kv_heads=2"], [8], (1, 2)),
        (["parallel.dp=3", "parallel.cp=7", "data.batch_size=3"], [1], (3, 7)),  # nothing to choose
    ],
)
def test_sizes_use_the_places_and_keep_groups_in_nodes(
    words: list[str], places: list[int], chosen: tuple[int, int]
) -> None:
    config, why = choose_sizes(load_config(None, [*AUTO, *words]), places)
    assert (config.parallel.dp, config.parallel.cp) == chosen
    assert why.startswith(f"dp {chosen[0]} x cp {chosen[1]}: ") or (chosen == (3, 7) and not why)


def test_places_too_few_for_a_given_number_are_told() -> None:
    config = load_config(None, ["parallel.dp=4", "parallel.cp=auto", "data.batch_size=4"])
    with pytest.raises(ConfigError, match=r"parallel.dp=4 parallel.cp=auto: .* the 3 places of 2 nodes$"):
        choose_sizes(config, [1, 2])


@pytest.mark.parametrize("value", ["0", "two", "1.5", "true"])
def test_a_number_is_a_number_or_auto(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^parallel.cp=.*: must be an integer of at least 1, or auto$"):
        load_config(None, [f"parallel.cp={value}"])
