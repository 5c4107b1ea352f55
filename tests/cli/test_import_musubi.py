"""`tuner import` of musubi-tuner: what its options mean here, and that the result passes `tuner check`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuner import cli
from tuner.config.load import plain_data
from tuner.testing.clips import render_folder
from tuner_wan.tiny import build_tiny_t2v

Call = Callable[..., int]
SCRIPT = r"""#!/bin/bash
OUT=runs
# python wan_train_network.py --task t2v-14B
accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 src/musubi_tuner/wan_train_network.py \
    --task t2v-1.3B --dit model/transformer/diffusion_pytorch_model.safetensors \
    --vae models/Wan2.1_VAE.pth --t5 models/models_t5_umt5-xxl-enc-bf16.pth \
    --dataset_config dataset.toml --sdpa --mixed_precision bf16 --fp8_base --fp8_scaled --blocks_to_swap 20 \
    --optimizer_type AdamW --optimizer_args "weight_decay=0.1" "betas=(0.9,0.99)" \
    --learning_rate 2e-4 --gradient_checkpointing --max_data_loader_n_workers 2 \
    --network_module networks.lora_wan --network_dim 32 --timestep_sampling shift --discrete_flow_shift 3.0 \
    --max_train_epochs 16 --save_every_n_epochs 2 --save_last_n_epochs 4 --seed 42 \
    --log_with wandb --wandb_api_key abcdef12345 --no_such_option 7 \
    --sample_prompts prompts.txt --sample_every_n_epochs 2 --output_dir $OUT --output_name my-lora
"""
DATASET = """
[general]
resolution = [96, 64]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [1, 17]
frame_extraction = "head"
num_repeats = 3
"""
PROMPTS = "# mine\nA cat walks. --w 832 --h 480 --f 81 --d 1 --s 20 --l 5 --n blurry, low quality\nA dog --g 3\n"
CONFIG, LIST = Path("config/config.json"), Path("config/multidatabackend.json")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run ``tuner WORDS`` in an empty folder; its exit code."""
    monkeypatch.chdir(tmp_path)
    for variable in ("TRAINER_EXTRA_ARGS", "RANK"):
        monkeypatch.delenv(variable, raising=False)

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tuner", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    return run


def put(arguments: str, dataset: str = DATASET) -> None:
    Path("train.sh").write_text(f"python wan_train_network.py --dataset_config dataset.toml {arguments}\n")
    Path("dataset.toml").write_text(dataset)


def imported(call: Call, arguments: str, dataset: str = DATASET) -> dict[str, Any]:
    put(arguments, dataset)
    assert call("import", "train.sh", "--force") == 0
    found: dict[str, Any] = plain_data(CONFIG)
    return found


def test_a_script_of_the_smallest_model_becomes_a_config_that_passes_check(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    build_tiny_t2v(Path("model"))
    render_folder(Path("clips"), count=4)
    for name, text in (("train.sh", SCRIPT), ("dataset.toml", DATASET), ("prompts.txt", PROMPTS)):
        Path(name).write_text(text)
    assert call("import", "train.sh") == 0
    out = capsys.readouterr().out
    assert out.startswith("musubi-tuner: train.sh\n")
    assert "no_such_option = 7: not known here" in out
    assert "abcdef12345" not in out + CONFIG.read_text()
    assert "wandb_api_key = (hidden): a secret" in out
    assert "models/Wan2.1_VAE.pth: a pickle is never read" in out
    assert out.rstrip().endswith("next: look at what has no counterpart, then tuner check, then tuner run")
    found = plain_data(CONFIG)
    expected = {
        "model_flavour": "t2v-480p-1.3b-2.1",
        "lora_rank": 32,
        "lora_alpha": 1.0,
        "lora_target_modules": ["all-linear"],
        "base_model_precision": "fp8-scaled",
        "group_offload_resident_blocks": 10,
        "optimizer_config": {"weight_decay": 0.1, "betas": [0.9, 0.99]},
        "flow_schedule_shift": 3.0,
        "num_train_epochs": 16,
        "checkpoint_epoch_interval": 2,
        "checkpoint_step_interval": 0,
        "checkpoints_total_limit": 2,
        "output_dir": "runs/my-lora",
    }
    assert {key: found[key] for key in expected} == expected
    assert [(each.get("video"), each.get("repeats")) for each in plain_data(LIST)[:2]] == [
        ({"num_frames": 1, "cut": "beginning"}, 2),
        ({"num_frames": 17, "cut": "beginning"}, 2),
    ]
    prompts = plain_data(Path("config/user_prompt_library.json"))
    assert prompts["prompt_1"] == {
        "prompt": "A cat walks.",
        "resolution": "832x480",
        "num_video_frames": 81,
        "seed": 1,
        "num_inference_steps": 20,
        "guidance": 5.0,
        "negative_prompt": "blurry, low quality",
    }
    assert prompts["prompt_2"] == "A dog"
    # the tiny model has too few blocks to stream
    tiny = ("--enable_group_offload", "false", "--pretrained_model_name_or_path", "model", "--report_to", "none")
    assert call("check", *tiny) == 0


@pytest.mark.parametrize(
    ("arguments", "flavour"),
    [
        ("--task t2v-A14B --dit low.safetensors --dit_high_noise high.safetensors", "t2v-14b-2.2-both"),
        ("--task t2v-A14B --dit a.safetensors --min_timestep 875 --max_timestep 1000", "t2v-14b-2.2-high"),
        ("--task i2v-A14B --dit a.safetensors --min_timestep 0 --max_timestep 900", "i2v-14b-2.2-low"),
        ("--task i2v-14B --dit a.safetensors", "i2v-14b-2.1"),
    ],
)
def test_the_range_of_timesteps_says_which_expert(call: Call, arguments: str, flavour: str) -> None:
    found = imported(call, arguments)
    assert found["model_flavour"] == flavour
    first, second = (found.get(f"pretrained_transformer_{part}model_name_or_path") for part in ("", "2_"))
    if flavour.endswith("both"):
        assert (first, second) == ("high.safetensors", "low.safetensors")
    else:
        assert (second if flavour.endswith("low") else first) == "a.safetensors"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {"flow_use_uniform_schedule": True}),
        (
            "--timestep_sampling sigma --discrete_flow_shift 5",
            {"flow_use_uniform_schedule": True, "flow_schedule_shift": 5.0},
        ),
        ("--timestep_sampling sigmoid --sigmoid_scale 1.5 --discrete_flow_shift 5", {"flow_sigmoid_scale": 1.5}),
        ("--timestep_sampling flux_shift", {"flow_schedule_auto_shift": True, "flow_sigmoid_scale": 1.0}),
        ("--weighting_scheme logit_normal --logit_std 0.8", {"flow_sigmoid_scale": 0.8}),
        ("--weighting_scheme cosmap", {"flow_use_uniform_schedule": True, "loss_weighting": "cosmap"}),
    ],
)
def test_noise_levels_are_drawn_as_there(call: Call, arguments: str, expected: dict[str, Any]) -> None:
    found = imported(call, f"--task t2v-14B {arguments}")
    assert {key: value for key, value in found.items() if key.startswith(("flow_", "loss_"))} == expected


def test_defaults_that_are_not_ours_are_written(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    found = imported(call, "--task t2v-14B")
    assert (found["lora_rank"], found["lora_alpha"], found["learning_rate"]) == (4, 1.0, 2e-6)
    assert (found["max_train_steps"], found["lr_scheduler"]) == (1600, "constant")
    assert "network_alpha = 1.0 -> lora_alpha = 1.0  (not given: the default there)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "video"),
    [
        ('frame_extraction = "chunk"\ntarget_frames = [25]', {"cut": "uniform", "num_frames": 25}),
        (
            'frame_extraction = "uniform"\ntarget_frames = [25]\nframe_sample = 4',
            {"cut": "uniform", "num_frames": 25, "windows": 4},
        ),
        ('frame_extraction = "full"\nmax_frames = 13', {"frame_buckets": [5, 9, 13]}),
        ("target_frames = [28]\nsource_fps = 30.0", {"cut": "beginning", "num_frames": 25, "fps": 16}),
    ],
)
def test_frames(call: Call, keys: str, video: dict[str, Any]) -> None:
    imported(call, "--task t2v-14B", f'[[datasets]]\nvideo_directory = "clips"\nresolution = [960, 544]\n{keys}\n')
    entry = plain_data(LIST)[0]
    assert entry["video"] == video
    assert (entry["crop"], entry["crop_aspect_buckets"]) == (True, [1.7647])


def test_nothing_is_overwritten_and_what_is_wrong_is_one_error(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    imported(call, "--task t2v-14B")
    before = CONFIG.read_text()
    assert call("import", "train.sh") == 2
    assert CONFIG.read_text() == before
    assert "nothing is overwritten" in capsys.readouterr().err
    put("--task t2v-14B --seed 7")
    assert call("import", "train.sh", "--force") == 0
    assert next(Path("config").glob("config.json.*.bak")).read_text() == before
    Path("notes.sh").write_text("ls\n")
    Path("strange.toml").write_text("colour = 3\n")
    for words, message in (
        (("notes.sh",), "no training command is in this script"),
        (("strange.toml",), "this is a config of no known tool"),
        (("missing.sh",), "the file does not exist"),
        (("train.sh", "--from", "musubi"), "did you mean 'musubi-tuner'?"),
    ):
        assert call("import", *words, "--output", "new") == 2
        assert message in capsys.readouterr().err
    put("--task t2v-99B")
    assert call("import", "train.sh", "--output", "new") == 2
    assert "the task 't2v-99B'" in capsys.readouterr().err
    assert not Path("new").exists()


def test_lycoris_has_a_config_of_its_own(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    found = imported(
        call,
        "--task t2v-14B --network_module lycoris.kohya --network_dim 16 --network_alpha 8 "
        "--network_args algo=lokr factor=8 --network_weights old.safetensors",
    )
    assert found["lora_type"] == "lycoris"
    assert found["lycoris_config"] == {"algo": "lokr", "factor": 8, "linear_dim": 16, "linear_alpha": 8.0}
    assert not {key for key in found if key.startswith("lora_")} - {"lora_type"}
    assert "network_weights = old.safetensors: of plain LoRA alone" in capsys.readouterr().out


def test_options_that_our_optimizer_has_not_are_said(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    found = imported(
        call, "--task t2v-14B --optimizer_type Adafactor --optimizer_args relative_step=False weight_decay=0.1"
    )
    assert (found["optimizer"], found["optimizer_config"]) == ("adafactor", {"weight_decay": 0.1})
    assert "optimizer_args: relative_step = false: torch's Adafactor" in capsys.readouterr().out
    found = imported(call, "--task t2v-14B --optimizer_type came --optimizer_args weight_decay=0.1")
    assert not {"optimizer", "optimizer_config"} & found.keys()
    assert "optimizer_type = came: no counterpart" in capsys.readouterr().out
