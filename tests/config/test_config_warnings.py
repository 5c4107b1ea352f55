"""What will not happen although the config says so is told, once for each reason."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tuner.assembly import assemble
from tuner.builtin.hub import HubConfig, HubPlugin
from tuner.config import warnings
from tuner.config.faults import build
from tuner.config.keys import CoreConfig
from tuner.plugin import PluginConfig, key


class Pending(PluginConfig):
    """Keys whose feature is to come."""

    first: bool = key(False, "One.", pending="nothing is done")
    second: bool = key(False, "Another.", pending="nothing is done")
    third: str = key("no", "A third.", pending="there is none")


def test_keys_without_effect_are_told_when_set_away_from_their_default() -> None:
    values = {"third": "yes", "first": "false"}
    told = list(warnings.pending({"core": CoreConfig(), "pending": build(Pending, values)}, values))
    assert told == ["third has no effect yet: there is none"]


def test_keys_with_one_reason_share_a_line() -> None:
    values = {"first": True, "second": True}
    [told] = warnings.pending({"pending": build(Pending, values)}, values)
    assert told == "first, second have no effect yet: nothing is done"


def test_a_missing_login_is_told_with_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = HubPlugin("hub", build(HubConfig, {"push_to_hub": True}))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert ["`hf auth login`" in line for line in asking.warnings(CoreConfig())] == [True]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "present")
    assert list(asking.warnings(CoreConfig())) == []


def test_nothing_is_said_where_nothing_is_asked() -> None:
    assert list(HubPlugin("hub", HubConfig()).warnings(CoreConfig())) == []
    assert list(warnings.pending({"core": CoreConfig()}, ())) == []


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"group_offload_blocks_per_group": 3, "group_offload_use_stream": True},
            "group_offload_blocks_per_group, group_offload_use_stream do nothing: enable_group_offload is false",
        ),
        (
            {"scheduled_sampling_strategy": "biased_late"},
            "scheduled_sampling_strategy does nothing: scheduled_sampling_max_step_offset is 0",
        ),
        ({"lr_end": 1e-6}, "lr_end does nothing: lr_scheduler is constant_with_warmup"),
        ({"huber_c": 0.2}, 'huber_c does nothing: loss_type is "l2"'),
        (
            {"flow_beta_schedule_alpha": 3, "flow_beta_schedule_beta": 4},
            "flow_beta_schedule_alpha, flow_beta_schedule_beta do nothing: flow_use_beta_schedule is false",
        ),
        ({"lr_power": 2}, "lr_power does nothing: lr_scheduler is constant_with_warmup"),
        ({"model_type": "full", "lora_rank": 8, "lora_dropout": 0.1}, "lora_dropout, lora_rank do nothing: "),
    ],
)
def test_settings_of_what_is_off_are_told(keys: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tuner"):
        told = [*assemble({"model_family": "wan", **keys}).warnings, *caplog.messages]
    assert len([each for each in told if each.startswith(line)]) == 1


def test_settings_that_ask_for_nothing_or_are_used_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    idle = {"group_offload_blocks_per_group": 1, "fsdp_enable": False, "fsdp_version": 2}
    used = {
        "lr_scheduler": "polynomial",
        "lr_power": 2,
        "loss_type": "huber",
        "huber_c": 0.2,
        "enable_chunked_feed_forward": False,
    }
    with caplog.at_level(logging.WARNING, logger="tuner"):
        told = assemble({"model_family": "wan", **idle, **used}).warnings
    assert not [each for each in [*told, *caplog.messages] if "do nothing:" in each or "does nothing:" in each]
