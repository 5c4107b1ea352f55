"""What will not happen although the config says so is told, once for each reason."""

from __future__ import annotations

import pytest

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


def test_a_missing_login_is_told_with_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = plugin(push_to_hub=True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert [line.rpartition("; ")[2] for line in asking.warnings(CoreConfig())] == ["`hf auth login`"]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "present")
    assert list(asking.warnings(CoreConfig())) == []


def test_nothing_is_said_where_nothing_is_asked() -> None:
    assert list(plugin().warnings(CoreConfig())) == []
    assert list(warnings.pending({"core": CoreConfig()}, ())) == []
