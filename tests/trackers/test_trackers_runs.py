"""Whole runs that report to trackers: what arrives there, and that nothing there can hold them up."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tuner.builtin import outbox
from tuner.errors import ConfigError
from tuner.testing.local_log import timeless_lines

Run = Callable[..., Path]
RENDERED = {
    "disable_benchmark": True,
    "validation_prompt": "a red square",
    "validation_step_interval": 2,
    "validation_num_inference_steps": 1,
    "validation_resolution": "64x64",
    "validation_num_video_frames": 5,
}


def logged(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def test_tensorboard_has_every_number_of_the_log_and_plays_the_clips(run: Run, tmp_path: Path) -> None:
    output = run(tmp_path / "mine", report_to="tensorboard", **RENDERED)
    found = events(output / "tensorboard" / "mine")
    lines = logged(output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "learning_rate", "seconds", "samples", "metrics/tokens_per_second"):
        shown = {event.step: event.value for event in found.Scalars(name)}
        assert shown == pytest.approx({line["step"]: line[name] for line in lines})
    [clip] = [tag for tag in found.Tags()["images"] if tag.endswith(".mp4")]
    shown = found.Images(clip)
    assert [event.step for event in shown] == [2, 4]
    assert all(event.encoded_image_string.startswith(b"GIF89a") for event in shown)


def test_a_run_that_goes_on_is_continued_where_it_was(run: Run, tmp_path: Path) -> None:
    keys = {"report_to": "tensorboard", "tracker_run_name": "one", "checkpoint_step_interval": 2}
    output = run(tmp_path / "out", max_train_steps=4, **keys)
    (output / "checkpoint-4").rename(tmp_path / "lost")  # as if killed after step 4
    run(output, max_train_steps=6, resume_from_checkpoint="latest", **keys)
    found = events(output / "tensorboard" / "one")
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in logged(output)] == [1, 2, 3, 4, 5, 6]


def test_a_registered_tracker_gets_lines_pictures_and_a_config_without_secrets(
    run: Run, fakes: Any, tmp_path: Path
) -> None:
    keys = {"plugins": ["toy", "fakes"], "fakes_hub_token": "SECRET", "tracker_project_name": "shapes"}
    output = run(tmp_path / "out", report_to="fake", checkpoint_step_interval=2, **keys, **RENDERED)
    calls = fakes.CALLS
    assert calls[0] == ("made", False, "shapes")  # not in the thread that trains
    config = next(call[1] for call in calls if call[0] == "config")
    assert config["learning_rate"] == 1e-2
    assert "SECRET" not in str(config)
    assert all(isinstance(value, int | float | str) for value in config.values())
    lines = {call[1]: call[2] for call in calls if call[0] == "log"}
    for line in logged(output):
        numbers = {name: value for name, value in line.items() if name != "step"}
        assert lines[line["step"]] == numbers
    assert {call[1] for call in calls if call[0] == "images"} == {2, 4}
    assert calls[-1] == ("finish",)
    manifest = json.loads((output / "checkpoint-2" / "manifest.json").read_text())
    assert "SECRET" not in json.dumps(manifest)


def test_trackers_that_hang_or_raise_change_nothing_in_the_run(
    run: Run, fakes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "PATIENCE", 2.0)
    plain = run(tmp_path / "plain")
    with caplog.at_level(logging.WARNING):
        output = run(tmp_path / "out", plugins=["toy", "fakes"], report_to="hanging,raising,fake")
    assert timeless_lines(output) == timeless_lines(plain)
    assert [call[1] for call in fakes.CALLS if call[0] == "log"] == [1, 2, 3, 4]  # the sound one was not held up
    told = [record.message for record in caplog.records if record.message.startswith("report_to")]
    assert "report_to raising failed: no route to host; the run goes on, train.jsonl is whole" in told
    assert "report_to raising: messages lost: 4; train.jsonl is whole" in told
    assert "report_to hanging does not answer: the run ends without it" in told
    assert "report_to hanging: messages lost: 3; train.jsonl is whole" in told  # and one is on its way for ever
    assert not any(line.startswith("report_to fake") for line in told)
    assert sum("raising failed" in line for line in told) == 1


def test_the_training_thread_never_waits_for_a_full_outbox(
    run: Run, fakes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "PATIENCE", 0.0)
    monkeypatch.setattr(outbox.Outbox.__init__, "__kwdefaults__", {"limit": 1})
    output = run(tmp_path / "out", plugins=["toy", "fakes"], report_to="hanging")
    assert len(logged(output)) == 4
    assert "fell behind" in caplog.text


def test_a_tracker_that_is_not_installed_stops_a_run_before_weights_are_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.builtin.trackers.kinds.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        run(tmp_path / "out", report_to="mlflow")
    assert not (tmp_path / "out" / "train.jsonl").exists()
