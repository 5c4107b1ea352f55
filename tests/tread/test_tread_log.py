"""Runs with token routes from config to log: what each step's line says, and what ramps do to a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner import pipeline
from tuner.assembly import assemble
from tuner.errors import ConfigError
from tuner.testing.clips import render_clip
from tuner.testing.local_log import timeless_lines
from tuner_tread.ranges import keep_count
from tuner_wan.tiny import build_tiny

Run = Callable[..., Path]
BLOCKS, TOKENS, STEPS = 4, 8, 6
"""Of the tiny model, of a clip of 5 frames of 32x32, of a run."""


def routes(ratio: float) -> dict[str, Any]:
    return {"routes": [{"selection_ratio": ratio, "start_layer_idx": 1, "end_layer_idx": -2}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("routed")
    build_tiny(home / "model", layers=BLOCKS)
    for index in range(4):
        render_clip(home / "clips" / f"clip {index}.mp4", width=32, height=32, frames=5, fps=16, seed=index)
    return home


@pytest.fixture
def run(folder: Path) -> Run:
    """Runs a config over the tiny model and returns its output folder."""

    def go(output: Path, *, check: bool = False, **keys: Any) -> Path:
        video = {
            "id": "clips",
            "dataset_type": "video",
            "instance_data_dir": str(folder / "clips"),
            "caption_strategy": "filename",
            "resolution": 32,
            "video": {"num_frames": 5},
        }
        settings = {
            "model_family": "wan",
            "pretrained_model_name_or_path": str(folder / "model"),
            "output_dir": str(output),
            "cache_dir": str(folder / "cache"),
            "max_train_steps": STEPS,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "lora_rank": 2,
            "mixed_precision": "no",
            "data_backend_config": [video, {"id": "text", "dataset_type": "text_embeds", "default": True}],
        }
        (pipeline.check if check else pipeline.run)(assemble({**settings, **keys}))
        return output

    return go


def lines(output: Path) -> list[dict[str, Any]]:
    return timeless_lines(output)


def plain(output: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "tread/dropped"} for line in lines(output)]


def lora(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next((output / f"checkpoint-{STEPS}").glob("*lora*.safetensors")))


def test_each_step_says_what_share_was_dropped_and_unrouted_ones_are_unrouted(run: Run, tmp_path: Path) -> None:
    ramp = {"tread_config": routes(0.5), "tread_ratio_schedule": "linear", "tread_warmup_steps": 4}
    unrouted, ramped = run(tmp_path / "unrouted"), run(tmp_path / "ramped", **ramp)
    ratios = [0, 0.125, 0.25, 0.375, 0.5, 0.5]
    expected = [2 * (TOKENS - keep_count(TOKENS, ratio)) / (BLOCKS * TOKENS) for ratio in ratios]
    assert expected[0] == 0
    assert expected[-1] == 0.25
    assert [line["tread/dropped"] for line in lines(ramped)] == pytest.approx(expected)
    assert not any(name.startswith("tread") for line in lines(unrouted) for name in line)
    # The first step of the ramp drops nothing and is an unrouted step, bit for bit; later ones are others.
    assert plain(ramped)[0] == plain(unrouted)[0]
    assert all(one["loss"] != other["loss"] for one, other in zip(lines(ramped)[2:], lines(unrouted)[2:], strict=True))


def test_routes_that_drop_nothing_change_no_bit(run: Run, tmp_path: Path) -> None:
    unrouted = run(tmp_path / "unrouted")
    nothing = run(tmp_path / "nothing", tread_config=routes(0), tread_ratio_schedule="cosine", tread_selector="motion")
    assert plain(nothing) == plain(unrouted)
    assert [line["tread/dropped"] for line in lines(nothing)] == [0] * STEPS
    ours, theirs = lora(nothing), lora(unrouted)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_drops_what_an_undisturbed_one_does(run: Run, tmp_path: Path) -> None:
    keys = {"tread_config": routes(0.5), "tread_ratio_schedule": "cosine", "tread_selector": "motion"}
    whole = run(tmp_path / "whole", checkpoint_step_interval=3, **keys)
    shutil.copytree(whole / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = run(tmp_path / "resumed", resume_from_checkpoint="latest", **keys)
    assert lines(resumed) == lines(whole)[3:]
    assert lines(whole)[0]["tread/dropped"] == 0.25
    assert lines(whole)[-1]["tread/dropped"] == 0
    ours, theirs = lora(resumed), lora(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_selectors_train_on_tokens_of_their_own(run: Run, tmp_path: Path) -> None:
    names = ("uniform", "motion", "salience")
    losses = [
        [line["loss"] for line in lines(run(tmp_path / name, tread_config=routes(0.5), tread_selector=name))]
        for name in names
    ]
    assert losses[0] != losses[1] != losses[2] != losses[0]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"tread_ratio_schedule": "linear", "tread_warmup_steps": 7}, "tread_warmup_steps is 7, and the run has 6"),
        ({"tread_warmup_steps": 3}, "tread_warmup_steps is 3, and tread_ratio_schedule 'constant' has no warm-up"),
        ({"tread_config": routes(0.99)}, r"selection_ratio 0.99 keeps none of the 8 tokens of a clip of 32x32, 5 fr"),
        ({"tread_selector": "saliency"}, "did you mean 'salience'"),
    ],
)
def test_check_refuses_what_could_not_be_run(run: Run, tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(tmp_path / "checked", check=True, **{"tread_config": routes(0.5), **keys})
