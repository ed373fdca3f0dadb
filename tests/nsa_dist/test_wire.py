"""The ledger against what network interfaces count, with network namespaces as hosts."""

from collections.abc import Iterator

import pytest

from nsa_dist.bench_comm import EXCHANGES, Case, measure
from nsa_dist.config import ConfigError
from nsa_dist.hosts import Hosts, hosts
from nsa_dist.ranks import Ranks
from nsa_dist.wire import training_bytes

T = 4096


@pytest.fixture(scope="module")
def wire() -> Iterator[tuple[Hosts, Ranks]]:
    try:
        with hosts(2, 1.0) as made, Ranks(2, "cpu", hosts=made.names) as ranks:
            yield made, ranks
    except ConfigError as error:
        pytest.skip(f"no hosts to be had here: {error}")


@pytest.mark.parametrize("exchange", ["nsa", "allgather"])
def test_training_steps_send_what_the_ledger_says(wire: tuple[Hosts, Ranks], exchange: str) -> None:
    made, ranks = wire
    ranks.call(training_bytes, T, exchange, 1)  # connections are made
    before = made.counters()
    counted = ranks.call(training_bytes, T, exchange, 2)
    for (sent_0, received_0), (sent_1, received_1), (sent, received) in zip(
        before, made.counters(), counted, strict=True
    ):
        print(exchange, "ledger", sent, received, "wire", sent_1 - sent_0, received_1 - received_0)
        for ours, theirs in ((sent, sent_1 - sent_0), (received, received_1 - received_0)):
            # Headers, acknowledgements and the greeting of each collective come on top, and nothing else.
            assert ours < theirs < 1.05 * ours + 100_000


def test_bytes_between_hosts_are_between_nodes(wire: tuple[Hosts, Ranks]) -> None:
    row = wire[1].call(measure, Case(EXCHANGES[0], 2, "zigzag", "random", 1024, 2, 2, 16, 16, "float32"), 1)[0]
    forward = row["kinds"]["selected"]["forward"]
    assert forward["received_bytes"]["mean"] > 0
    assert forward["received_between_nodes_bytes"] == forward["received_bytes"]
