"""What will not happen although the config says so is told, once for each reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.builtin import pending
from tuner.builtin.pending import PendingPlugin
from tuner.builtin.pending.keys import PendingKeys
from tuner.config import warnings
from tuner.config.faults import build
from tuner.config.keys import CoreConfig


def plugin(**values: object) -> PendingPlugin:
    return PendingPlugin("pending", build(PendingKeys, values))


def test_keys_without_effect_are_told_when_set_away_from_their_default() -> None:
    values = {"disable_benchmark": True, "push_to_hub": "false"}
    told = list(warnings.pending({"core": CoreConfig(), "pending": build(PendingKeys, values)}, values))
    assert told == ["disable_benchmark has no effect yet: the base model is not rendered at step 0"]


def test_keys_with_one_reason_share_a_line() -> None:
    values = {"push_to_hub": True, "push_checkpoints_to_hub": True, "hub_model_id": "a/b"}
    [told] = warnings.pending({"pending": build(PendingKeys, values)}, values)
    assert told == "push_to_hub, push_checkpoints_to_hub, hub_model_id have no effect yet: nothing is uploaded"


def test_a_missing_login_is_told_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(pending, "find_spec", lambda name: object())
    core, asking = CoreConfig(), plugin(report_to="wandb", push_to_hub=True)
    assert [line.rpartition("; ")[2] for line in asking.warnings(core)] == ["`wandb login`", "`hf auth login`"]
    monkeypatch.setattr(pending, "find_spec", lambda name: None)
    assert any("pip install wandb" in line for line in asking.warnings(core))
    monkeypatch.setattr(pending, "find_spec", lambda name: object())
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "present")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password none\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert list(asking.warnings(core)) == []


def test_nothing_is_said_where_nothing_is_asked() -> None:
    assert list(plugin().warnings(CoreConfig())) == []
    assert list(warnings.pending({"core": CoreConfig()}, ())) == []
