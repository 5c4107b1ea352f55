"""What ``report_to`` and ``webhook_config`` accept, and what is said of a machine that lacks something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuner.builtin.trackers import TrackersConfig, TrackersPlugin, kinds
from tuner.builtin.webhook import WebhookConfig, WebhookPlugin
from tuner.builtin.webhook.settings import read
from tuner.config.keys import CoreConfig
from tuner.config.load import plain_data
from tuner.errors import ConfigError

ADDRESS = "https://example.com/hooks/SECRET"


def told(**keys: object) -> list[str]:
    return list(TrackersPlugin("trackers", TrackersConfig(**keys)).warnings(CoreConfig()))


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home of nobody who is logged in anywhere, with every library installed."""
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "COMET_API_KEY", "SWANLAB_API_KEY", "SWANLAB_MODE", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kinds, "find_spec", lambda name: object())
    return tmp_path


def test_names_come_in_any_case_and_once() -> None:
    assert kinds.asked_for(" WandB, comet_ml,tensorboard,comet ") == ("wandb", "comet", "tensorboard")
    assert kinds.asked_for("none") == kinds.asked_for("") == ()


def test_all_is_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "find_spec", lambda name: name in ("mlflow", "comet_ml") or None)
    assert kinds.asked_for("all") == ("mlflow", "comet")
    assert told(report_to="all") == told(report_to="comet")


def test_a_misspelt_tracker_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="no tracker 'tensorbord'") as raised:
        kinds.check("wandb,tensorbord", list)
    assert raised.value.nearest == "tensorboard"
    with pytest.raises(ConfigError, match="and `none`"):
        kinds.check("wandb,none", list)
    kinds.check("mine", lambda: ["mine"])


def test_a_tracker_that_is_not_installed_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "find_spec", lambda name: None)
    assert told(report_to="wandb,comet") == [
        "report_to wandb: the package is not installed; `pip install wandb`; a run is refused",
        "report_to comet: the package is not installed; `pip install comet_ml`; a run is refused",
    ]


def test_who_is_not_logged_in_is_told_that_it_stays_offline(nobody: Path) -> None:
    lines = told(report_to="wandb,comet,swanlab,tensorboard,mlflow,trackio")
    assert [line.split("`")[1] for line in lines] == ["wandb login", "comet login", "swanlab login"]
    assert all("offline" in line for line in lines)


def test_who_is_logged_in_is_told_nothing(nobody: Path) -> None:
    (nobody / ".netrc").write_text("machine api.wandb.ai login user password none\n")
    (nobody / ".netrc").chmod(0o600)
    (nobody / ".comet.config").write_text("[comet]\napi_key = 50%off\n")
    (nobody / ".swanlab").mkdir()
    (nobody / ".swanlab" / ".netrc").write_text("machine api.swanlab.cn login x password none\n")
    (nobody / ".swanlab" / ".netrc").chmod(0o600)
    assert told(report_to="wandb,comet,swanlab") == []


def test_the_example_of_a_webhook_is_read() -> None:
    [found] = read(Path(__file__).parents[2] / "config" / "webhook.json.example")
    assert (found.webhook_type, found.message_prefix, found.log_level) == ("discord", "my-run", "info")


def test_several_webhooks_may_stand_in_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", ADDRESS)
    path = tmp_path / "webhook.json"
    path.write_text(json.dumps([{"webhook_type": "raw", "callback_url": ADDRESS}, {"webhook_url": "${HOOK}"}]))
    assert [each.address for each in read(path)] == [ADDRESS, ADDRESS]
    assert isinstance(plain_data(path), list)


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"webhok_url": ADDRESS}, "webhook_url"),
        ({"webhook_type": "discrd", "webhook_url": ADDRESS}, "discord"),
        ({"webhook_url": ADDRESS.replace("https", "ftp")}, "http"),
        ({"webhook_type": "raw"}, "callback_url"),
        ("text", "object"),
    ],
)
def test_a_wrong_webhook_is_refused_without_its_address(tmp_path: Path, entry: object, fault: str) -> None:
    path = tmp_path / "webhook.json"
    path.write_text(json.dumps([entry]))
    with pytest.raises(ConfigError) as raised:
        read(path)
    assert fault in str(raised.value)
    assert "SECRET" not in str(raised.value)


def test_a_missing_webhook_file_is_told_before_the_run(tmp_path: Path) -> None:
    asking = WebhookPlugin("webhook", WebhookConfig(webhook_config=tmp_path / "webhook.json"))
    [line] = asking.warnings(CoreConfig())
    assert line.startswith("webhook_config: there is no file")
