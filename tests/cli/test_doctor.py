"""``tuner doctor`` says what is there, names what is broken, hangs on nothing and shows no secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tuner.cli import app, diagnosis, doctor
from tuner.testing.plugin_env import environment, write_distribution

SECRET = "hf_do_not_show_me"


def test_a_machine_that_can_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        diagnosis, "GROUPS", {name: diagnosis.GROUPS[name] for name in ("programs", "network", "environment")}
    )
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for words in ("Python", "safetensors", "HF_HUB_OFFLINE is set", "there is a token", "set, not shown", "```"):
        assert words in result.output, words
    assert SECRET not in result.output
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert found["well"] is True
    assert SECRET not in json.dumps(found)


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = write_distribution(
        tmp_path, "tuner-broken", {"broken": "tuner_broken:Broken"}, modules={"tuner_broken": "import no_such_thing\n"}
    )
    monkeypatch.setenv("PYTHONPATH", environment(site)["PYTHONPATH"])
    monkeypatch.setattr(diagnosis, "GROUPS", {"plugins": diagnosis.plugins})
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "to mend: broken: tuner-broken 0.1.0: plugin 'broken' failed to import" in result.output
    assert "Traceback" not in result.output


def test_what_hangs_or_crashes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE", 0.01)
    assert doctor.asked("device") == [("bad", "device", "no answer within 0.01 s")]
    monkeypatch.undo()
    [(mark, _, said)] = doctor.asked("no such group")
    assert mark == "bad"
    assert "KeyError" in said


def test_home_and_logins_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    assert (
        diagnosis._masked("/home/alice/models and https://me:pass@hub.example/x")
        == "~/models and https://hub.example/x"
    )


def test_a_dead_hub_is_a_note() -> None:
    mark, name, said = diagnosis._reachable("http://127.0.0.1:9")
    assert (mark, name) == ("note", "hub")
    assert "cannot be reached" in said
