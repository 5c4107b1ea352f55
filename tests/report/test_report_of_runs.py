"""What a run leaves of itself in its report, and that the report never stands in its way."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tuner.builtin.metrics import MetricsPlugin
from tuner.builtin.report import page, reporter
from tuner.builtin.report.curves import MOST, Curve, Curves
from tuner.builtin.report.diary import Diary, read_facts
from tuner.builtin.report.story import Story
from tuner.cli import app
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key
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


def shown(output: Path) -> dict[str, Any]:
    """The data in the page of a run."""
    text = (output / "report" / "index.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def kinds(data: dict[str, Any]) -> list[str]:
    return [event["kind"] for event in data["events"] if event["kind"] != "warning"]


def test_the_page_has_the_log_the_clips_the_events_and_the_settings(run: Run, tmp_path: Path) -> None:
    output = run(tmp_path / "mine", checkpoint_step_interval=2, noise_levels_interval=2, **RENDERED)
    data = shown(output)
    lines = [json.loads(line) for line in (output / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("loss", "learning_rate", "metrics/samples_per_second"):
        assert data["curves"][name]["step"] == [1, 2, 3, 4]
        assert data["curves"][name]["mean"] == pytest.approx([line[name] for line in lines], rel=1e-5)
    levels = {name for name in data["curves"] if name.startswith("noise_levels/loss/")}
    assert levels == {name for line in lines for name in line if name.startswith("noise_levels/loss/")} != set()
    [row] = data["media"]["rows"]
    assert (row["prompt"], sorted(row["cells"])) == ("a red square", ["2", "4"])
    assert all((output / "report" / address).is_file() for cell in row["cells"].values() for address in cell.values())
    assert sorted(kinds(data)) == sorted(["start", "validation", "checkpoint", "validation", "checkpoint", "end"])
    assert (data["name"], data["state"], data["facts"]["total_steps"]) == ("mine", "finished", 4)
    assert data["facts"]["config"]["lora_rank"] == 4
    assert "lora_rank" in data["facts"]["set"]
    assert (output / "report" / data["data_report"]).is_file()


def test_the_command_makes_the_same_page_from_the_files(run: Run, tmp_path: Path) -> None:
    output = run(tmp_path / "out", **RENDERED)
    before = shown(output)
    (output / "report" / "index.html").unlink()
    answer = CliRunner().invoke(app, ["report", str(output)])
    assert answer.exit_code == 0
    assert Path(answer.output.strip()) == output / "report" / "index.html"
    assert {**shown(output), "written": 0} == {**before, "written": 0}


def test_a_run_without_the_plugin_can_be_reported_afterwards(run: Run, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", without=("report",), **RENDERED)
    assert not (plain / "report").exists()
    assert timeless_lines(plain) == timeless_lines(run(tmp_path / "reported", **RENDERED))
    assert CliRunner().invoke(app, ["report", str(plain)]).exit_code == 0
    data = shown(plain)
    assert data["curves"]["loss"]["step"] == [1, 2, 3, 4]
    assert data["facts"]["config"]["lora_rank"] == 4  # of the checkpoint's manifest
    assert len(data["media"]["rows"][0]["cells"]) == 2


def test_a_report_that_cannot_be_written_is_said_and_training_goes_on(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "report").write_text("mine", encoding="utf-8")
    run(output)
    assert (output / "report").read_text(encoding="utf-8") == "mine"
    assert len(timeless_lines(output)) == 4
    assert any("no report is kept" in message for message in caplog.messages)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(answer.exception, ConfigError)
    assert "no train.jsonl" in str(answer.exception)
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_shows_no_step_twice(run: Run, tmp_path: Path) -> None:
    output = run(tmp_path / "out", max_train_steps=4, checkpoint_step_interval=2)
    (output / "checkpoint-4").rename(tmp_path / "lost")  # as if killed after step 4
    run(output, max_train_steps=6, checkpoint_step_interval=2, resume_from_checkpoint="latest")
    data = shown(output)
    assert data["curves"]["loss"]["step"] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in (output / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert data["curves"]["seconds"]["mean"] == pytest.approx([line["seconds"] for line in lines], rel=1e-5)
    [resumed] = [event for event in data["events"] if event["kind"] == "resume"]
    assert resumed["text"] == "from checkpoint-2, step 2 of 6"
    assert data["state"] == "finished"


def test_errors_and_warnings_stand_in_it_without_logins(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @hookimpl
    def broken(self: MetricsPlugin, run: Any, line: Any) -> dict[str, float]:
        if run.step == 3:
            run.log.warning("could not reach https://me:hunter2@place/x?signature=abc")
            raise ConfigError("the third step is refused")
        return {}

    monkeypatch.setattr(MetricsPlugin, "log_metrics", broken)
    handlers = list(logging.getLogger("tuner").handlers)
    with pytest.raises(ConfigError):
        run(tmp_path / "out")
    assert logging.getLogger("tuner").handlers == handlers
    data = shown(tmp_path / "out")
    assert data["state"] == "failed"
    texts = {event["kind"]: event["text"] for event in data["events"]}
    assert texts["error"] == "the third step is refused"
    assert texts["warning"] == "could not reach https://place/x"
    assert data["curves"]["loss"]["step"] == [1, 2]


class FakeRun:
    """As much of a run as a reporter reads."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir, self.config = output_dir, CoreConfig(output_dir=output_dir)
        self.plugins: dict[str, Plugin[Any]] = {}
        self.spec, self.explicit, self.step, self.total_steps = None, frozenset[str](), 0, 9
        self.process_count, self.variant = 1, ""


def test_pages_are_written_seldom_and_never_take_more_than_a_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, took, written = 0.0, 0.0, []

    def write(story: Story) -> None:
        nonlocal now
        written.append(now)
        now += took

    monkeypatch.setattr(page, "write", write)
    monkeypatch.setattr("tuner.builtin.report.reporter.monotonic", lambda: now)
    followed = reporter.Reporter(FakeRun(tmp_path), None)  # type: ignore[arg-type]
    for took in (0.0, 2.0):
        written.clear()
        began = now
        for step in range(1000):
            now += 1.0
            followed.line({"step": step, "loss": 1.0})
        spent = took * len(written)
        assert len(written) <= (now - began) / reporter.EVERY + 1
        assert spent <= 0.02 * (now - began)
        assert written


class SecretKeys(PluginConfig):
    hub_token: str = key("hf_hunter2", "A secret.")
    place: str = key("https://me:hunter2@place/x", "An address with a login.")


def test_secrets_are_in_no_file(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    run.plugins = {"mine": Plugin("mine", SecretKeys())}
    reporter.Reporter(run, None)  # type: ignore[arg-type]
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "report").iterdir()]
    assert len(texts) == 3
    assert not any("hunter2" in text for text in texts)
    assert any("https://place/x" in text for text in texts)


def test_a_curve_of_any_length_keeps_its_means_and_extremes() -> None:
    curve, drawn = Curve(), random.Random(0)
    values = [drawn.random() for _ in range(50_000)]
    for step, value in enumerate(values):
        curve.add(step, value)
    columns = curve.as_json()
    each = curve.values_per_point
    assert MOST / 2 <= len(columns["step"]) <= MOST
    parts = [values[at : at + each] for at in range(0, len(values), each)]
    assert columns["mean"] == pytest.approx([np.mean(part) for part in parts], rel=1e-5)
    assert columns["low"] == pytest.approx([min(part) for part in parts], rel=1e-5)
    assert columns["high"] == pytest.approx([max(part) for part in parts], rel=1e-5)
    assert columns["step"][-1] == len(values) - 1


def test_what_is_no_finite_number_is_left_out() -> None:
    curves = Curves()
    curves.add({"step": 1, "loss": float("nan"), "word": "x", "flag": True, "grad_norm": float("inf"), "lr": 0.5})
    assert set(curves.by_name) == {"lr"}


def test_warnings_are_bounded_and_torn_lines_passed_over(tmp_path: Path) -> None:
    diary = Diary(tmp_path)
    for number in range(2000):
        diary.warning(f"warning {number // 2}")
    path = tmp_path / "report" / "events.jsonl"
    assert len(path.read_text(encoding="utf-8").splitlines()) == 500
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "end", "te')
    assert [event["text"] for event in Story.read(tmp_path).events[:2]] == ["warning 100", "warning 101"]
    assert read_facts(tmp_path) == {}


class Addresses(HTMLParser):
    """Every address in a page's tags, and how many scripts it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "action", "poster", "srcset")]


def test_the_page_names_no_other_file_and_nothing_breaks_out_of_its_data(output: Path) -> None:
    text = page.page(Story.read(output).as_json())
    parsed = Addresses(text)
    assert parsed.found == ["data:,"]
    assert parsed.scripts == 2
    assert "<b>run" not in text
    assert "alert(1)</script>" not in text
