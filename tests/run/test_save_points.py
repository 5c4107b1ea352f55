"""Checkpoints beside those by steps."""

from __future__ import annotations

import time

import pytest

from tuner.builtin.save_points import SavePointsConfig, SavePointsPlugin
from tuner.errors import Stopped
from tuner.plugin import Plugin


def steps_saved(output):
    return sorted(int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*"))


def plugin(tmp_path, monkeypatch, **keys):
    made = SavePointsPlugin("save_points", SavePointsConfig(**keys))
    monkeypatch.setattr(made, "_folder", tmp_path)
    return made


def test_by_epochs(job):
    output = job.run("epochs", checkpoint_epoch_interval=1, max_train_steps=7)
    assert steps_saved(output) == [3, 6, 7]  # three steps are an epoch


def test_by_minutes(tmp_path, monkeypatch):
    made = plugin(tmp_path, monkeypatch, checkpoint_minutes_interval=10)
    now = time.monotonic()
    asked = []
    for minute in range(25):
        monkeypatch.setattr(time, "monotonic", lambda minute=minute: now + 60 * minute + 1)
        asked += [minute] if made.saves_at(1, 0) else []
    assert asked == [10, 20]


def test_a_file_asks_for_a_checkpoint_and_is_taken_away(tmp_path, monkeypatch):
    made = plugin(tmp_path, monkeypatch)
    assert not made.saves_at(1, 0)
    (tmp_path / "save").touch()
    assert made.saves_at(2, 0)
    assert not made.saves_at(3, 0)
    assert not (tmp_path / "save").exists()


def test_a_file_ends_the_run_with_everything_saved(job, state_of, steps_of):
    whole = job.run("quit-whole")
    output = job.folder / "quit"
    output.mkdir()
    (output / "save_quit").touch()
    with pytest.raises(Stopped, match="as asked: training ended after step 1 of 6"):
        job.run("quit")
    assert steps_saved(output) == [1]
    job.run("quit", resume_from_checkpoint="latest")
    assert state_of(output, 6) == state_of(whole, 6)
    assert steps_of(output) == steps_of(whole)


def test_plugins_ask_for_nothing_unless_they_say_so():
    assert not Plugin("any", None).saves_at(1, 1)
    assert not Plugin("any", None).stops_at(1, 1)


def test_a_clock_that_jumps_asks_for_no_checkpoint(tmp_path, monkeypatch):
    """The machine's clock, not the one that only runs forward."""
    made = plugin(tmp_path, monkeypatch, checkpoint_minutes_interval=60)
    for hours in (-24, 24, 24 * 365):
        monkeypatch.setattr(time, "time", lambda hours=hours: 1.7e9 + 3600 * hours)
        assert not made.saves_at(1, 0)
