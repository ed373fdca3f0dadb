"""The record of a run: lines that resume, what must not get in, TensorBoard's names, the progress line."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsa_dist.config import ConfigError
from nsa_dist.metrics import MetricsWriter, memory_bytes, progress, read_metrics, share_of_allgather


def record(step: int, **more: Any) -> dict[str, Any]:
    base = {"step": step, "loss": 3.1234, "grad_norm": 1.02, "tokens": 4096, "lr": 1e-3, "step_s": 3.125}
    return {**base, "tokens_per_s": 24690.0, **more}


def traffic(mean: float) -> dict[str, Any]:
    both = {"sent_bytes": {"mean": mean, "max": mean}, "received_bytes": {"mean": mean, "max": 2 * mean}}
    return {"forward": both, "backward": both}


COMM = {
    "selected": traffic(100.0),
    "parameters": traffic(5000.0),
    "control": traffic(7.0),
    "rivals": {"allgather": {"selected": traffic(400.0), "compressed": traffic(50.0)}, "ring": {}},
}


def write(run: Path, records: list[dict[str, Any]], start_step: int = 0) -> list[str]:
    said: list[str] = []
    with MetricsWriter(run, start_step, said.append) as writer:
        for line in records:
            writer.step(line)
    return said


def test_a_resumed_run_replaces_what_it_makes_again(tmp_path: Path) -> None:
    assert write(tmp_path, [record(step) for step in (1, 2, 3)]) == []
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    (said,) = write(tmp_path, [record(3, loss=7.0)], start_step=2)
    assert "2 lines of steps after 2" in said
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 3.1234), (2, 3.1234), (3, 7.0)]


def test_a_wrong_line_before_the_last_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnoise\n{"step": 2}\n')
    with pytest.raises(ConfigError, match="line 2 must be a JSON object"):
        read_metrics(tmp_path)


def test_no_file_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_named_and_not_written(tmp_path: Path, value: float) -> None:
    with MetricsWriter(tmp_path, 0, print) as writer:
        for bad in (record(5, loss=value), record(5, validation={"loss": 1.0, "by_position": [1.0, value]})):
            with pytest.raises(ConfigError, match=r"(loss|validation\.by_position\.1)=-?(nan|inf) at step 5"):
                writer.step(bad)
        writer.step(record(6))
    assert [line["step"] for line in read_metrics(tmp_path)] == [6]


def test_lines_are_there_at_once_and_plain_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0, print) as writer:
        writer.step(record(1, comm=COMM))
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record(1, comm=COMM)


def test_tensorboard_has_the_known_names_and_forgets_abandoned_steps(tmp_path: Path) -> None:
    full = record(2, comm=COMM, validation={"loss": 2.5}, memory_bytes=1 << 30)
    write(tmp_path, [record(1), full, record(3, loss=9.0)])
    write(tmp_path, [record(3, loss=1.5)], start_step=2)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    values = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert [step for step, _ in values["loss_metrics/global_avg_loss"]] == [1, 2, 3]
    assert values["loss_metrics/global_avg_loss"][2][1] == 1.5
    assert values["comm/selected_forward_received_mean_bytes"] == [(2, 100.0)]
    assert values["comm/selected_backward_sent_max_bytes"] == [(2, 100.0)]
    assert values["comm/received_share_of_allgather"] == [(2, 0.25)]
    assert values["memory/max_reserved(GiB)"] == [(2, 1.0)]
    names = {"grad_norm", "lr", "throughput(tps)", "time_metrics/end_to_end(s)", "validation_metrics/loss"}
    assert names <= values.keys()


def test_the_progress_line() -> None:
    full = record(120, comm=COMM, memory_bytes=61.2 * (1 << 30), memory_total_bytes=139 * (1 << 30), mfu=0.412)
    assert progress(full, 5000, 2) == (
        "step 120/5000 (2.4%) | loss 3.1234 | grad_norm 1.02 | mem 61.2GiB (44%) | tok/s/gpu 12,345 | mfu 41.2% | "
        "comm 0.25x allgather | step 3.1s | eta 4h14m"
    )
    assert progress({"step": 5, "loss": 1.0, "step_s": 1.0}, 100, 1) == (
        "step 5/100 (5.0%) | loss 1.0000 | step 1.0s | eta 1m35s"
    )


def test_a_share_needs_a_rival_that_receives() -> None:
    assert share_of_allgather(record(1, comm=COMM)) == 0.25
    assert share_of_allgather(record(1, comm=COMM | {"rivals": {"ring": {}}})) is None
    assert share_of_allgather(record(1)) is None


def test_memory_is_this_process_in_bytes() -> None:
    assert 10 << 20 < memory_bytes() < 1 << 40
