"""The barriers of the scores' sums on Hopper (`hopper_scores.py`), modelled: no GPU is there to run them on.

A barrier counts rounds; who waits for one is told only whether the round now under way is even or odd. The model runs
the warp that brings tiles and those that use them, with random latencies, some of them long, and says which tile was
used.
"""

import heapq
import random
from collections.abc import Iterator

import pytest

from nsa_dist.kernels.tuning import configuration

WORK, COPY, LONG = 800, 1000, 10000  # clock cycles: a tile's sums, a copy, one of ten copies


class Barrier:
    def __init__(self, count: int = 1) -> None:
        self.count, self.here, self.round = count, 0, 0

    def arrive(self) -> None:
        self.here += 1
        if self.here == self.count:
            self.here, self.round = 0, self.round + 1

    def passed(self, parity: int) -> bool:
        return self.round & 1 != parity


class Model:
    def __init__(self, items: list[int], slots: int, workers: int, seed: int) -> None:
        self.items, self.workers, self.random = items, workers, random.Random(seed)
        self.full, self.empty = [Barrier() for _ in range(slots)], [Barrier() for _ in range(slots)]
        self.q_full, self.q_empty = [Barrier() for _ in range(2)], [Barrier(workers) for _ in range(2)]
        self.held: list[int] = [-1] * slots
        self.wrong: list[tuple[int, int]] = []
        self.landing: list[tuple[float, int, Barrier, int, int]] = []
        self.now = 0.0

    def _copy(self, barrier: Barrier, slot: int, tile: int) -> None:
        late = self.random.expovariate(1 / LONG) if self.random.random() < 0.1 else 0
        when = self.now + COPY * (1 + self.random.random()) + late
        heapq.heappush(self.landing, (when, len(self.landing), barrier, slot, tile))

    def feed(self) -> Iterator[float]:
        """Yields how long it works; 0 where it waits."""
        turn = n = 0
        for count in self.items:
            for j in range(count):
                slot = n % len(self.full)
                while not self.empty[slot].passed((n // len(self.full) & 1) ^ 1):
                    yield 0
                self._copy(self.full[slot], slot, n)
                if j == 0:
                    while not self.q_empty[turn % 2].passed((turn // 2 & 1) ^ 1):
                        yield 0
                    self._copy(self.q_full[turn % 2], -1, turn)
                n += 1
                yield 30
            turn += count > 0

    def work(self, which: int) -> Iterator[float]:
        turn = n = 0
        for count in self.items:
            yield 1 + 600 * self.random.random()
            if count:
                while not self.q_full[turn % 2].passed(turn // 2 & 1):
                    yield 0
                for j in range((which - n) % self.workers, count, self.workers):
                    slot = (n + j) % len(self.full)
                    while not self.full[slot].passed((n + j) // len(self.full) & 1):
                        yield 0
                    if self.held[slot] != n + j:
                        self.wrong.append((n + j, self.held[slot]))
                    yield WORK * (1 + self.random.random())
                    self.empty[slot].arrive()
                    yield WORK * (1 + self.random.random())
                self.q_empty[turn % 2].arrive()
                turn += 1
                n += count

    def run(self) -> bool:
        """Whether it ends, every tile used where it was to be."""
        running = dict(enumerate([self.feed(), *map(self.work, range(self.workers))]))
        until = dict.fromkeys(running, 0.0)
        while running:
            moved = False
            while self.landing and self.landing[0][0] <= self.now:
                _, _, barrier, slot, tile = heapq.heappop(self.landing)
                if slot >= 0:
                    self.held[slot] = tile
                barrier.arrive()
                moved = True
            for i in [i for i in running if until[i] <= self.now]:
                took = next(running[i], None)
                moved |= took != 0
                if took is None:
                    del running[i]
                else:
                    until[i] = self.now + took
            later = [until[i] for i in running if until[i] > self.now] + [x[0] for x in self.landing[:1]]
            if not moved and not later:
                return False  # all wait
            if not moved:
                self.now = min(later)
        return not self.wrong


def fine(slots: int, workers: int, runs: int = 40) -> int:
    found = 0
    for seed in range(runs):
        made = random.Random(seed)
        items = [made.choice((0, 1, 2, 3, 4, 5, 7, 12, 32)) for _ in range(30)]
        found += Model(items, slots, workers, seed).run()
    return found


@pytest.mark.parametrize("dk", [64, 96, 128, 192, 256])
def test_every_tile_of_keys_is_the_one_that_was_meant(dk: int) -> None:
    hopper_scores = pytest.importorskip("nsa_dist.kernels.hopper_scores")
    meta = dict(configuration("hopper_scores", "sm_90", False, dk))
    slots = hopper_scores.slots(dk, meta["BN"], meta["num_stages"])
    assert fine(slots, hopper_scores.WORKERS.value) == 40


def test_the_model_finds_slots_that_change_hands() -> None:
    assert fine(5, 3) < 40
    assert fine(8, 3) < 40
