"""``tuner plan --fit``: real configs, really assembled; what is proposed fits, and nothing faster was passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tuner import pipeline
from tuner.assembly import assemble, new_run
from tuner.builtin.planner.candidates import Candidates, settings_of
from tuner.builtin.planner.cards import named
from tuner.builtin.planner.costs import Shape, cost_of
from tuner.builtin.planner.fit import Fit, advice, fit, size_of
from tuner.cli import app
from tuner.data.samples import Bucket
from tuner.errors import ConfigError
from tuner.run import Run

GIB = 2**30
CLIP = Shape(Bucket(81, 480, 832), 1)
LARGE = {"model_family": "wan", "model_flavour": "t2v-480p-14b-2.1"}


def run_of(**keys: Any) -> Run:
    return new_run(assemble({**LARGE, **keys}))


def fitted(limit: float, **keys: Any) -> Fit:
    return fit(Candidates.of(run_of(**keys), [CLIP], named("H100")), limit * GIB)


@pytest.mark.parametrize(
    ("word", "size"),
    [("24G", 24 * GIB), ("24GiB", 24 * GIB), ("24 GB", 24e9), ("8192M", 8 * GIB), ("1.5g", 1.5 * GIB), ("1000", 1000)],
)
def test_sizes_as_people_write_them(word: str, size: float) -> None:
    assert size_of(word) == size


def test_what_is_no_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="'a lot' is no size of memory"):
        size_of("a lot")


def test_what_is_proposed_fits_when_it_is_assembled_anew() -> None:
    """And every other choice that fits is slower, or quantises more, or changes more."""
    found = fitted(24, train_batch_size=2)
    assert found.fits
    best = found.choices[0]
    assembly = assemble({**LARGE, "train_batch_size": 2, **best.changes})
    run = new_run(assembly)
    spec = pipeline.describe(run, assembly.manager)
    assert run.estimate is not None
    cost = cost_of(run.estimate, spec.networks[0], CLIP, named("H100"))
    assert cost.memory.on_device == best.within("training") <= best.device <= 24 * GIB
    assert cost.seconds == pytest.approx(best.work)
    assert [each.rank for each in found.choices] == sorted(each.rank for each in found.choices)
    assert all(each.device <= 24 * GIB for each in found.choices)
    assert found.present.device > 24 * GIB
    assert best.changes["enable_group_offload"] is True
    assert "base_model_precision" not in best.changes, "streaming costs no precision"


def test_where_there_is_room_memory_is_spent_on_time() -> None:
    found = fitted(140)
    assert (
        found.choices[0].changes == {"gradient_checkpointing": "selective"}
        or found.choices[0].work < found.present.work
    )
    assert found.choices[0].work < 0.9 * found.present.work


def test_where_nothing_fits_the_nearest_comes_first() -> None:
    found = fitted(1)
    assert not found.fits
    assert found.choices[0].device == min(each.device for each in found.choices)
    assert found.choices[0].changes.items() >= {"text_encoder_offload": True, "vae_enable_tiling": True}.items()


def test_a_run_must_fit_in_every_phase() -> None:
    """1.3B, 81 frames: training would fit 11 GiB as it is; UMT5 in bfloat16 and the VAE, decoding, do not."""
    rendering = {"model_flavour": "t2v-480p-1.3b-2.1", "validation_prompt": "a fox", "validation_resolution": "832x480"}
    found = fitted(10.5, **rendering, validation_num_video_frames=81, gradient_checkpointing=True)
    assert {str(each) for each in found.present.phases if each.memory.on_device > 10.5 * GIB} == {
        "caching (text encoder)",
        "validation (vae)",
    }
    assert found.fits
    for choice in found.choices:
        assert choice.changes["text_encoder_offload"] is True
        assert all(each.memory.on_device <= 10.5 * GIB for each in choice.phases)
    shorter = fitted(10.5, **rendering, validation_num_video_frames=1, gradient_checkpointing=True)
    assert "vae_enable_tiling" not in shorter.choices[0].changes


def test_combinations_that_do_not_go_together_are_named() -> None:
    assert any("needs gradient_checkpointing" in reason for reason in fitted(24).refused)


def test_the_keys_of_a_run_are_those_that_the_user_set() -> None:
    assert settings_of(run_of(lora_rank=4, enable_chunked_feed_forward=True)) == {
        **LARGE,
        "lora_rank": 4,
        "enable_chunked_feed_forward": True,
    }


def test_advice_names_single_settings_with_what_they_save_and_cost() -> None:
    lines = advice(run_of(), [CLIP], named("H100"))
    assert any(line.startswith('gradient_checkpointing: "offload" (saves 1') for line in lines)
    assert any(line.startswith("enable_group_offload: true, ") for line in lines)
    assert all("costs" in line for line in lines)
    (encoder,) = [line for line in lines if line.startswith("text_encoder_offload")]
    assert "(saves 9.9 GiB in caching (text encoder), costs 0 %" in encoder
    assert lines.index(encoder) > lines.index(next(line for line in lines if line.startswith("enable_group_offload")))
    streamed = advice(run_of(enable_group_offload=True, group_offload_use_stream=True), [CLIP], None)
    assert not any("enable_group_offload" in line for line in streamed)


def test_the_command_prints_the_settings_and_changes_no_file(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LARGE))
    arguments = ["plan", "--config", str(config), "--shape", "832x480x81", "--card", "H100", "--fit", "24G"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "settings that fit 24.0 GiB" in shown.output
    assert "not together: group offload needs gradient_checkpointing" in shown.output.replace("\n", " ")
    assert json.loads(config.read_text()) == LARGE
    printed = CliRunner().invoke(app, [*arguments, "--json"])
    found = json.loads(printed.stdout)["fit"]
    assert found["fits"]
    assert json.dumps(found["choices"][0]["changes"]) in shown.output.replace("\n", "")
    assert found["choices"][0]["device"] <= 24 * GIB
