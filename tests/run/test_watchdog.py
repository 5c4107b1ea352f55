"""The watchdog says which stage became slow, once, and when it is over."""

from __future__ import annotations

from tuner.builtin.watchdog.pace import KNOWN, MANY, WINDOW, Pace

USUAL = {"data": 0.1, "forward": 1.0, "backward": 2.0, "optimizer": 0.1}
SLOW = {**USUAL, "data": 6.0}


def said(pace, steps):
    return [line for step, (work, stages) in enumerate(steps, 1) for line in pace.after(work, step, stages)]


def test_it_names_the_stage_that_became_slow_once():
    steps = [("long", USUAL)] * (KNOWN + 5) + [("long", SLOW)] * 40
    [line] = said(Pace(2), steps)
    assert "'data', from 0.1 s to 6.0 s" in line
    assert line.startswith(f"step {KNOWN + 5 + MANY}: steps take 9.1 s, and took 3.2 s before")


def test_it_says_when_it_is_over():
    steps = [("long", USUAL)] * KNOWN + [("long", SLOW)] * WINDOW + [("long", USUAL)] * WINDOW
    lines = said(Pace(2), steps)
    assert len(lines) == 2
    assert lines[1].endswith("as fast as before again")


def test_steps_with_more_to_do_are_not_slow():
    longer = {name: 5 * seconds for name, seconds in USUAL.items()}
    assert said(Pace(2), [("short", USUAL)] * 20 + [("long", longer)] * 20) == []


def test_a_single_slow_step_is_an_accident():
    assert said(Pace(2), ([("long", USUAL)] * 20 + [("long", SLOW)]) * 4) == []


def test_little_is_nothing():
    assert said(Pace(2), [("tiny", {"data": 0.001})] * 20 + [("tiny", {"data": 0.1})] * 20) == []


def test_a_slow_save_is_said_at_once():
    pace = Pace(2)
    steps = [("long", {**USUAL, "save": 1.0})] * 5 + [("long", USUAL)] * 3 + [("long", {**USUAL, "save": 30.0})]
    assert said(pace, steps) == ["save after step 9 took 30.0 s; it used to take 1.0 s"]


def test_a_run_says_where_its_time_went(job, caplog):
    import logging

    with caplog.at_level(logging.INFO, logger="tuner"):
        job.run("watchdog-run", checkpoint_step_interval=2, validation_step_interval=2)
    [line] = [record.getMessage() for record in caplog.records if "time of the steps" in record.getMessage()]
    assert all(stage in line for stage in ("data", "forward", "backward", "device", "optimizer", "save", "validate"))
