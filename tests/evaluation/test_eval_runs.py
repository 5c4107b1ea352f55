"""Held-out loss in whole runs: when it is measured, and that training never knows of it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tuner import pipeline
from tuner.assembly import assemble
from tuner.errors import ConfigError
from tuner.testing.opened import opened

Settings = Callable[..., dict[str, Any]]
Logged = Callable[[Path], dict[int, dict[str, float]]]


def run(settings: dict[str, Any], without: Sequence[str] = ()) -> Path:
    pipeline.run(assemble(settings, without=without))
    return Path(settings["output_dir"])


def weights(output: Path, step: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint, bit for bit: adapter, optimizer, LoRA."""
    files = sorted((output / f"checkpoint-{step}").rglob("*.safetensors"))
    assert len(files) >= 3
    return {
        f"{path.name}: {name}": tensor.numpy().tobytes() for path in files for name, tensor in load_file(path).items()
    }


def losses(output: Path) -> list[str]:
    """The log without times and without what was measured."""
    import json

    lines = map(json.loads, (output / "train.jsonl").read_text(encoding="utf-8").splitlines())
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", "samples")
    return [json.dumps({name: line[name] for name in kept}) for line in lines]


def test_training_is_bit_for_bit_the_same_with_and_without(make_settings: Settings, logged: Logged) -> None:
    keys = {"lora_dropout": 0.2, "caption_dropout_probability": 0.3}
    measured = run(make_settings(output="measured", eval_steps_interval=1, **keys))
    left_out = run(make_settings(output="left out", eval_steps_interval=1, **keys), without=("evaluation",))
    never_named = run(make_settings((), output="never named", **keys))
    assert weights(measured, 6) == weights(left_out, 6) == weights(never_named, 6)
    assert losses(measured) == losses(left_out) == losses(never_named)
    assert list(logged(measured)) == [1, 2, 3, 4, 5, 6]
    assert logged(left_out) == logged(never_named) == {}


def test_the_numbers_move_with_the_weights(make_settings: Settings, logged: Logged) -> None:
    found = logged(run(make_settings(eval_steps_interval=1)))
    assert len({each["evaluation/loss"] for each in found.values()}) == len(found)
    frozen = logged(run(make_settings(output="frozen", eval_steps_interval=1, learning_rate=1e-30)))
    assert len({each["evaluation/loss"] for each in frozen.values()}) == 1


def test_a_resumed_run_measures_the_same(make_settings: Settings, logged: Logged, tmp_path: Path) -> None:
    whole = run(make_settings(eval_steps_interval=1, checkpoint_step_interval=3))
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "train.jsonl", resumed)
    settings = make_settings(output="resumed", eval_steps_interval=1, checkpoint_step_interval=3)
    run({**settings, "resume_from_checkpoint": "latest"})
    assert logged(resumed) == logged(whole)
    assert weights(resumed, 6) == weights(whole, 6)


def test_no_step_trains_on_held_out_samples(make_settings: Settings) -> None:
    with opened(make_settings(("unseen", "other"))) as session:
        trained = {
            sample.sample_id
            for step in range(20)
            for batch in session.plan.micro_batches(step)
            for sample in batch.samples
        }
        held_out = {sample.sample_id for sample in session.run.cached.prepared.held_out}
    assert {name.partition("/")[0] for name in trained} == {"clips"}
    assert {name.partition("/")[0] for name in held_out} == {"unseen", "other"}


@pytest.mark.parametrize(
    ("keys", "steps", "moments"),
    [
        ({"eval_timesteps": 2}, [6], "at the end"),
        ({"eval_steps_interval": 4}, [4, 6], "every 4 steps, at the end"),
        ({"eval_epoch_interval": 1}, [2, 4, 6], "every epoch, at the end"),
        ({"eval_epoch_interval": 2}, [4, 6], "every 2 epochs, at the end"),
        (
            {"eval_steps_interval": 5, "validation_step_interval": 3},
            [3, 5, 6],
            "every 3 steps, every 5 steps, at the end",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_it_is_measured_when_the_keys_say(
    make_settings: Settings,
    logged: Logged,
    caplog: pytest.LogCaptureFixture,
    keys: dict[str, Any],
    steps: list[int],
    moments: str,
) -> None:
    """An epoch of four clips in batches of two has two steps."""
    with caplog.at_level(logging.INFO):
        found = logged(run(make_settings(**keys)))
    assert list(found) == steps
    (line,) = [each.getMessage() for each in caplog.records if each.getMessage().startswith("held-out loss: ")]
    assert line.endswith(moments)
    said = [each.getMessage() for each in caplog.records if ": held-out loss " in each.getMessage()]
    assert said == [f"step {step}: held-out loss {each['evaluation/loss']:.5f}" for step, each in found.items()]


def test_at_its_own_moments_no_clip_is_rendered(make_settings: Settings, logged: Logged) -> None:
    output = run(
        make_settings(
            eval_steps_interval=2,
            validation_step_interval=3,
            disable_benchmark=True,
            validation_prompt="a red square",
            validation_num_inference_steps=1,
            validation_resolution="64x64",
            validation_num_video_frames=5,
        )
    )
    assert list(logged(output)) == [2, 3, 4, 6]
    assert sorted(path.name for path in (output / "validation").iterdir()) == ["step-3", "step-6"]


def warnings_of(settings: dict[str, Any], caplog: pytest.LogCaptureFixture, **more: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pipeline.survey(assemble(settings, **more))
    said = [each.getMessage() for each in caplog.records]
    return [line for line in said if "held-out" in line or "measure" in line]


def test_what_is_missing_is_said_in_one_line(make_settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    (nobody,) = warnings_of(make_settings(("unseen", "other")), caplog)
    assert nobody.startswith("nothing measures the loss on 'unseen' and 'other': load the plugin evaluation")
    (left_out,) = warnings_of(make_settings(eval_timesteps=2), caplog, without=("evaluation",))
    assert left_out.startswith("nothing measures the loss on 'unseen': ")
    (nothing,) = warnings_of(make_settings((), eval_timesteps=2), caplog)
    assert nothing == "held-out loss is not measured: there is no dataset with dataset_type eval"
    assert warnings_of(make_settings(()), caplog) == []
    (both,) = warnings_of(make_settings(eval_timesteps=1), caplog)
    assert both == "held-out loss: 3 samples at 1 noise level, at the end"


def test_without_held_out_data_nothing_is_measured(make_settings: Settings, logged: Logged) -> None:
    assert logged(run(make_settings((), eval_steps_interval=1, max_train_steps=2))) == {}


@pytest.mark.parametrize("keys", [{"eval_timesteps": 0}, {"eval_steps_interval": -1}, {"eval_max_samples": 0}], ids=str)
def test_keys_out_of_range_are_refused(make_settings: Settings, keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        assemble(make_settings(**keys))
