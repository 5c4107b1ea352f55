"""``memory_preset``: settings chosen for a device before a run begins, shown, recorded, and kept when it goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tuner import pipeline
from tuner.assembly import Assembly, assemble, settle
from tuner.builtin.planner import PlannerPlugin, fit, preset
from tuner.builtin.planner.candidates import Candidates
from tuner.builtin.planner.costs import Shape
from tuner.cli import app
from tuner.data.samples import Bucket
from tuner.errors import ConfigError, PluginError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig
from tuner.run import Run
from tuner.testing.clips import render_clip
from tuner.testing.project import flat_config, video_entry
from tuner_wan.tiny import build_tiny

GIB = 2**30
CLIP = Shape(Bucket(81, 480, 832), 1)
LARGE = {"model_family": "wan", "model_flavour": "t2v-480p-14b-2.1", "plan_card": "H100"}


def for_clips(**keys: Any) -> Assembly:
    """A config without data, whose planner is to choose for clips of 832x480, 81 frames."""
    assembly = assemble({**LARGE, **keys})
    planner = assembly.plugins["planner"]
    assert isinstance(planner, PlannerPlugin)
    planner.shapes = [CLIP]
    return assembly


def test_the_fastest_settings_that_fit_are_set_and_their_plugins_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    plain = for_clips()
    assert "offload" not in plain.plugins
    settled = settle(for_clips(memory_preset="12G"))
    candidates = Candidates.of(Run(plain.core, plain.plugins, plain.explicit), [CLIP], None)
    best = fit.fit(candidates, 12 * GIB).choices[0]
    assert best.device <= 12 * GIB < candidates.assess({}).device
    assert settled.proposed.keys() == best.changes.keys()
    assert {"offload", "checkpointing"} <= settled.plugins.keys()
    assert settled.core.gradient_checkpointing == settled.proposed["gradient_checkpointing"]
    shown = capsys.readouterr().out
    assert "memory_preset: " in shown
    assert "of 12.0 GiB, most in caching (text encoder)" in shown
    assert "too much" in shown
    for name in settled.proposed:
        assert name in shown
    assert settle(settled) is settled, "what is settled is not asked again"


def test_keys_that_the_user_set_stay_as_they_are() -> None:
    own = {"gradient_checkpointing": True, "group_offload_use_stream": False, "text_encoder_offload": False}
    settled = settle(for_clips(memory_preset="40G", **own))
    assert not settled.proposed.keys() & own.keys()
    assert settled.core.gradient_checkpointing is True
    assert "enable_group_offload" not in settled.proposed, "its lever would need the stream"
    assert settled.proposed, "something else was found"


def test_nothing_is_set_where_the_config_fits(capsys: pytest.CaptureFixture[str]) -> None:
    own = {"gradient_checkpointing": True}
    assembly = for_clips(memory_preset="200G", **own)
    assert settle(assembly) is assembly
    assert "it fits as it is, and nothing is set" in capsys.readouterr().out


def test_where_nothing_fits_the_least_is_said() -> None:
    with pytest.raises(
        ConfigError, match=r"nothing fits 1\.0 GiB: the least is \d+\.\d GiB, in training, with"
    ) as caught:
        settle(for_clips(memory_preset="1G"))
    assert '"enable_group_offload": true' in caught.value.what


@pytest.mark.parametrize(
    ("word", "said"),
    [("auto", "there is no CUDA device here"), ("much", "'much' is no size of memory")],
)
def test_what_names_no_size_is_one_clear_error(word: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=said) as caught:
        settle(for_clips(memory_preset=word))
    assert caught.value.where == "memory_preset"


def test_auto_takes_what_is_free_on_the_device_and_leaves_a_twentieth(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(name="NVIDIA GeForce RTX 3090", total_memory=24 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert preset.limit("auto") == pytest.approx(19 * GIB)
    by_device = settle(for_clips(memory_preset="auto", plan_card=None))
    by_size = settle(for_clips(memory_preset="19G", plan_card="RTX 3090"))
    assert by_device.proposed == by_size.proposed != {}


class Proposes(Plugin[PluginConfig]):
    """Proposes what it is told to."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        super().__init__("proposes", PluginConfig())
        self.answer = answer

    @hookimpl
    def propose_settings(self, run: Run) -> Mapping[str, Any]:
        """The answer."""
        return self.answer


def test_any_plugin_may_propose_what_the_user_left_open(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tuner")
    assembly = assemble({**LARGE, "learning_rate": 1e-3})
    assembly.manager.add("proposes", Proposes({"enable_chunked_feed_forward": True, "vae_enable_tiling": True}))
    settled = settle(assembly)
    assert settled.core.vae_enable_tiling
    assert settled.core.learning_rate == 1e-3
    assert "chunked_ff" in settled.plugins
    assert any("plugins loaded for it: chunked_ff" in each.getMessage() for each in caplog.records)
    taken = assemble({**LARGE, "learning_rate": 1e-3})
    taken.manager.add("proposes", Proposes({"learning_rate": 1.0}))
    with pytest.raises(PluginError, match="a plugin proposes keys that the config sets: learning_rate"):
        settle(taken)
    twice = assemble(LARGE)
    for name in ("one", "two"):
        twice.manager.add(name, Proposes({"vae_enable_tiling": True}))
    with pytest.raises(PluginError, match="'vae_enable_tiling' is offered by plugin"):
        settle(twice)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("preset")
    build_tiny(home / "model", layers=4)
    for index in range(2):
        render_clip(home / "clips" / f"clip {index}.mp4", width=32, height=32, frames=5, fps=16, seed=index)
    return home


def settings(folder: Path, **keys: Any) -> dict[str, Any]:
    """A run of the tiny model. Its encoders are planned as Wan's own: UMT5 takes 11 GiB, streamed 1.3 GiB."""
    videos = video_entry(folder / "clips", resolution=32, frames=5)
    usual = {"max_train_steps": 2, "lora_rank": 2, "gradient_checkpointing": True, "memory_preset": "2G"}
    return flat_config(folder, videos, family="wan", **(usual | keys))


def recorded(folder: Path, step: int) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "output" / f"checkpoint-{step}" / "manifest.json").read_text())
    return manifest


def test_a_run_records_what_was_chosen_and_goes_on_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.run(assemble(settings(folder)))
    first = recorded(folder, 2)
    assert first["proposed"] == {"text_encoder_offload": True}
    assert first["config"]["text_encoder_offload"] is True
    assert "offload" in first["plugins"]

    def never(*_: object) -> None:
        raise AssertionError("a run that goes on chooses nothing")

    with monkeypatch.context() as patched:
        patched.setattr(preset, "choose", never)
        caplog.set_level(logging.INFO, "tuner")
        pipeline.run(assemble(settings(folder, max_train_steps=3, resume_from_checkpoint="latest")))
    assert recorded(folder, 3)["proposed"] == first["proposed"]
    assert any("memory_preset: as in" in each.getMessage() for each in caplog.records)
    another = assemble(settings(folder, memory_preset="100G", resume_from_checkpoint="latest"))
    assert settle(another) is another, "for another size settings are chosen anew"
    own = assemble(settings(folder, resume_from_checkpoint="latest", text_encoder_offload=False))
    assert settle(own) is own, "and what the user sets now stands"


def test_check_and_plan_show_the_same_settings(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings(folder, output_dir=str(tmp_path / "output"))))
    runner = CliRunner()
    shown = [runner.invoke(app, [command, "--config", str(config)]) for command in ("check", "plan")]
    assert [each.exit_code for each in shown] == [0, 0], shown[0].output + shown[1].output
    tables = [each.output.partition("memory_preset: ")[2].splitlines()[:4] for each in shown]
    assert tables[0] == tables[1]
    assert "text_encoder_offload: true" in "".join(tables[0])
    assert "weights of text encoder" in shown[1].output
    left = runner.invoke(app, ["check", "--config", str(config), "--without", "planner"])
    assert "set aside: memory_preset (plugin 'planner' is left out)" in left.output
