"""What a run appends to, and what a resumed run keeps of it."""

import json
import math

import pytest

from rlsp_fast.log import RunLog, Timer, clock


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(e.step, e.value) for e in accumulator.Scalars("loss")]


def test_a_resumed_run_keeps_the_steps_of_its_checkpoint_and_redoes_the_later_ones(tmp_path):
    with RunLog(tmp_path, ("tensorboard",), {}, 0) as log:
        for step in range(1, 6):
            log.write(step, "rl", {"loss": float(step)})
    with RunLog(tmp_path, ("tensorboard",), {}, 3) as log:  # three steps are done: the next is the fourth
        log.write(4, "rl", {"loss": 40.0})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert events(tmp_path) == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_every_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with RunLog(tmp_path, (), {}, 0) as log:
        log.write(1, "rl", {"loss": 1.0})
        assert rows(tmp_path) == [{"step": 1, "stage": "rl", "loss": 1.0}]


def test_a_loss_that_is_not_a_number_is_written_as_such(tmp_path):
    with RunLog(tmp_path, (), {}, 0) as log:
        log.write(1, "rl", {"loss": float("nan")})
    assert math.isnan(rows(tmp_path)[0]["loss"])


def test_a_last_line_cut_short_by_a_kill_is_left_out(tmp_path):
    with RunLog(tmp_path, (), {}, 0) as log:
        for step in (1, 2, 3):
            log.write(step, "rl", {"loss": float(step)})
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole[:-10])
    with RunLog(tmp_path, (), {}, 2) as log:
        log.write(3, "rl", {"loss": 30.0})
    assert [row["loss"] for row in rows(tmp_path)] == [1, 2, 30]


def test_a_run_that_left_no_checkpoint_is_written_anew(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path, (), {}, 0) as log:
            log.write(1, "rl", {"loss": 1.0})
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_the_timer_adds_up_the_phases_of_one_step():
    timer = Timer()
    for _ in range(2):
        with timer("gen"):
            pass
    with pytest.raises(RuntimeError), timer("adv"):
        raise RuntimeError
    assert timer.metrics().keys() == {"timing_s/gen"} and timer.metrics()["timing_s/gen"] > 0


def test_clock_shows_hours_only_when_there_are_some():
    assert [clock(s) for s in (0, 75, 3599.6, 3700)] == ["0:00", "1:15", "1:00:00", "1:01:40"]
