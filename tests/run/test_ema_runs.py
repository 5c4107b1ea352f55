"""The average of the trained weights through whole runs: saved, rendered, exact in resume, gone without a trace."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tuner.builtin.ema import EmaConfig, EmaPlugin
from tuner.config.keys import CoreConfig
from tuner.errors import CheckpointError
from tuner.testing.killing import start
from tuner.testing.opened import opened

LORA = "pytorch_lora_weights.safetensors"
EMA = {"use_ema": True, "ema_decay": 0.6}
STEPWISE = {"checkpoint_step_interval": 1, "checkpoints_total_limit": 0}
RENDERED = {
    "validation_prompt": "a red square",
    "validation_step_interval": 3,
    "validation_num_inference_steps": 2,
    "validation_resolution": "64x64",
    "validation_num_video_frames": 5,
}


def tensors(folder) -> dict[str, dict[str, bytes]]:
    """Every tensor below ``folder``, bit for bit."""
    files = sorted(folder.rglob("*.safetensors"))
    return {
        str(path.relative_to(folder)): {name: each.numpy().tobytes() for name, each in load_file(path).items()}
        for path in files
    }


def averaged(weights: list[dict[str, torch.Tensor]], interval: int, begin: int) -> dict[str, torch.Tensor]:
    """The formula in float64: ``weights`` are those after each step, from the first on."""
    average, updated = None, 0
    for step, now in enumerate(weights, start=1):
        if step <= begin or step % interval:
            continue
        if average is None:
            average = {name: each.double() for name, each in now.items()}
        else:
            decay = 1.0
            for k in range(updated + 1, step + 1):
                s = max(0, k - begin - 1)
                decay *= min((1 + s) / (10 + s), EMA["ema_decay"]) if s else 0.0
            average = {name: decay * each + (1 - decay) * now[name].double() for name, each in average.items()}
        updated = step
    assert average is not None
    return average


@pytest.mark.parametrize(("interval", "begin"), [(1, 0), (2, 3)])
def test_the_saved_lora_is_the_average_of_those_of_all_steps(job, steps_of, capsys, interval, begin):
    keys = {**EMA, **STEPWISE, "ema_update_interval": interval, "ema_start_step": begin, "max_train_steps": 9}
    output = job.run(f"ema-lora-{interval}", **keys)
    raw = [load_file(output / f"checkpoint-{step}" / LORA) for step in range(1, 10)]
    first = begin + 1 + (begin + 1) % interval
    for step in range(1, 10):
        ours = output / f"checkpoint-{step}" / "ema" / LORA
        assert ours.exists() == (step >= first)
        if step >= first:
            expected = averaged(raw[:step], interval, begin)
            found = load_file(ours)
            assert found.keys() == expected.keys()
            for name, each in found.items():
                torch.testing.assert_close(each.double(), expected[name], rtol=1e-4, atol=1e-7)
    assert any(not torch.equal(found[name], raw[-1][name]) for name in found)
    decays = [line.get("ema/decay") for line in steps_of(output)]
    assert decays[: first - 1] == [None] * (first - 1)
    assert decays[-1] == min((1 + 8 - begin) / (10 + 8 - begin), 0.6)
    manifest = json.loads((output / "checkpoint-9" / "manifest.json").read_text())
    assert f"ema/{LORA}" in manifest["files"]
    assert f"weights:    {output / 'checkpoint-9' / 'ema' / LORA}" in capsys.readouterr().out


def test_training_is_the_same_with_an_average(job, steps_of):
    plain = job.run("ema-never", **RENDERED)
    left_out = job.run("ema-left-out", **RENDERED, **EMA, without=["ema"])
    kept = job.run("ema-kept", **RENDERED, **EMA)
    assert tensors(left_out / "checkpoint-6") == tensors(plain / "checkpoint-6")
    assert steps_of(left_out) == steps_of(plain)
    beside = tensors(kept / "checkpoint-6")
    assert {name for name in beside if "ema" in name} == {f"ema/{LORA}", "plugin.ema.safetensors"}
    assert {name: each for name, each in beside.items() if "ema" not in name} == tensors(plain / "checkpoint-6")
    for step in (3, 6):
        raw, both = (folder / "validation" / f"step-{step}" for folder in (plain, kept))
        assert {path.name: path.read_bytes() for path in raw.iterdir()} == {
            path.name: path.read_bytes() for path in both.iterdir() if "@ema" not in path.name
        }


@pytest.mark.parametrize("mode", ["none", "ema_only", "comparison"])
def test_validation_looks_at_the_weights_asked_for(job, steps_of, mode):
    keys = {**RENDERED, **EMA, "ema_validation": mode, "learning_rate": 0.5, "noise_levels_interval": 3}
    output = job.run(f"ema-{mode}", **keys)
    folder = output / "validation" / "step-6"
    names = {path.name for path in folder.iterdir()}
    raw = {"validation.mp4", "validation.png", "contact-sheet.png", "validation.json"} - {"validation.json"}
    own = {"validation@ema.mp4", "validation@ema.png", "contact-sheet@ema.png"}
    expected = {"none": raw, "ema_only": own, "comparison": raw | own}[mode]
    assert names - {"validation.json", "validation@ema.json"} == expected
    counted = [sum(each for name, each in line.items() if "/samples/" in name) for line in steps_of(output)]
    assert counted == [0, 0, 6, 0, 0, 6]
    assert not any("noise_levels" in name and "@" in name for line in steps_of(output) for name in line)
    if mode != "none":
        record = json.loads((folder / "validation@ema.json").read_text())
        assert record["weights"] == "ema"
        assert record["prompts"][0]["files"] == ["validation@ema.mp4", "validation@ema.png"]
    if mode == "comparison":
        pictures = [np.asarray(Image.open(folder / f"validation{mark}.png")) for mark in ("", "@ema")]
        assert not np.array_equal(*pictures)


def test_validation_renders_what_is_saved(job):
    """Both come from the average that has the last step in it: rendering the saved file gives the picture."""
    cached = {"validation_prompt": "shapes number 0", "validation_negative_prompt": ""}
    keys = {**RENDERED, **EMA, **cached, "learning_rate": 0.5}
    output = job.run("ema-rendered", **keys)
    saved = load_file(output / "checkpoint-6" / "plugin.ema.safetensors")
    with job.on_path(), opened(job.config("ema-again", **keys)) as session:
        from tuner.validate.stage import validate

        session.run.step = 6
        groups = session.model.network.adapter.groups
        with torch.no_grad():
            for group in groups:
                for name, each in group.parameters.items():
                    each.copy_(saved[f"transformer/{name}"])
        validate(session.run, session.model, session.manager, session.engine, session.attention)
    again = job.folder / "ema-again" / "validation" / "step-6" / "validation.png"
    there = output / "validation" / "step-6" / "validation@ema.png"
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(there)))


def test_a_run_that_was_killed_ends_with_the_same_average(job, steps_of):
    keys = {**EMA, **RENDERED, "ema_update_interval": 2, "max_train_steps": 10, "checkpoint_step_interval": 3}
    keys |= {"resume_from_checkpoint": "latest"}
    whole = job.run("ema-whole", **keys)
    killed = job.folder / "ema-killed"
    process = start(job.config("ema-killed", **keys), [str(job.distribution)])
    while process.is_alive() and not (killed / "checkpoint-3").exists():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode != 0
    assert not (killed / "checkpoint-10").exists()
    job.run("ema-killed", **keys)
    assert tensors(killed / "checkpoint-10") == tensors(whole / "checkpoint-10")
    assert steps_of(killed) == steps_of(whole)


def test_the_weights_of_full_training_have_an_average_too(job):
    keys = {"model_type": "full", "learning_rate": 1e-3, **EMA, **STEPWISE, "ema_device": "accelerator"}
    output = job.run("ema-full", **keys)
    [file] = {path.name for path in (output / "checkpoint-6").glob("transformer/*.safetensors")}
    raw = [load_file(output / f"checkpoint-{step}" / "transformer" / file) for step in range(1, 7)]
    found, expected = load_file(output / "checkpoint-6" / "ema" / "transformer" / file), averaged(raw, 1, 0)
    assert found.keys() == expected.keys()
    for name, each in found.items():
        torch.testing.assert_close(each.double(), expected[name], rtol=1e-4, atol=1e-7)


def test_an_average_that_comes_later_begins_anew_and_says_so(job, caplog, steps_of):
    job.run("ema-later", max_train_steps=3)
    with caplog.at_level(logging.WARNING):
        output = job.run("ema-later", max_train_steps=6, resume_from_checkpoint="latest", **EMA, **STEPWISE)
    assert "the checkpoint has no average of transformer: it begins anew after step 3" in caplog.messages
    first = output / "checkpoint-4"
    assert tensors(first / "ema")[LORA] == tensors(first)[LORA]
    assert [line.get("ema/decay") for line in steps_of(output)] == [None] * 3 + [0.0, 2 / 11, 3 / 12]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        job.run("ema-later", max_train_steps=8, resume_from_checkpoint="latest")
    assert "the checkpoint has averages, and use_ema is false: they are not kept any further" in caplog.messages
    assert not (output / "checkpoint-8" / "ema").exists()


def test_what_a_run_will_not_have_is_said(job, caplog):
    with caplog.at_level(logging.WARNING):
        output = job.run("ema-nothing", **EMA, ema_start_step=6, ema_validation="ema_only", **RENDERED)
    [line] = [each for each in caplog.messages if each.startswith("no average of transformer is kept")]
    assert line.endswith("it begins after ema_start_step 6, every 1 steps, and the run trains it for 6")
    yet = "ema_validation ema_only: there is no average yet, the trained weights are looked at"
    assert caplog.messages.count(yet) == 1
    assert (output / "validation" / "step-6" / "validation.png").exists()
    assert not (output / "checkpoint-6" / "ema").exists()


def test_settings_of_an_average_that_is_not_kept_are_told():
    def told(**keys: Any) -> list[str]:
        return list(EmaPlugin("ema", EmaConfig(**keys)).warnings(CoreConfig()))

    assert told(ema_decay=0.9) == ["ema_decay does nothing: use_ema is false"]
    assert told(ema_decay=0.9, ema_validation="none") == ["ema_decay, ema_validation do nothing: use_ema is false"]
    assert told(use_ema=True, ema_decay=0.9) == told(use_ema=False) == []


def test_averages_of_other_tensors_are_refused(job):
    from tuner.builtin.ema.averages import Averages

    with job.on_path(), opened(job.config("ema-other", **EMA)) as session:
        averages = Averages(session.run, session.model, EmaConfig(**EMA))
        averages.follow(1)
        state = averages.state()
        first = next(name for name in state if "/" in name)
        with pytest.raises(CheckpointError, match="is missing"):
            averages.load({name: value for name, value in state.items() if name != first})
        with pytest.raises(CheckpointError, match="'elsewhere', which is not trained"):
            averages.load({"elsewhere": {"origin": 1, "updated": 1}})
