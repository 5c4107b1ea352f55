"""`tuner import` of ai-toolkit, diffusion-pipe and SimpleTuner: what their keys mean here; the result passes check."""

from __future__ import annotations

import json
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
CONFIG, LIST, LIBRARY = (
    Path("config") / name for name in ("config.json", "multidatabackend.json", "user_prompt_library.json")
)
JOB = """
job: extension
config:
  name: "my_lora_v1"
  process:
    - type: 'sd_trainer'
      training_folder: "runs"
      device: cuda:0
      trigger_word: "ohwx"
      network: {type: "lora", linear: 32, linear_alpha: 16}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, hf_token: hf_abcdef}
      datasets:
        - folder_path: "clips"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          num_frames: 17
          num_repeats: 4
          resolution: [64, 80]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation: 1
        train_unet: true
        gradient_checkpointing: true
        noise_scheduler: "flowmatch"
        timestep_type: 'linear'
        content_or_style: 'style'
        optimizer: "adamw"
        lr: 1.0e-4
        optimizer_params: {weight_decay: 0.0001}
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
        colour: red
      model:
        name_or_path: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        arch: 'wan21'
        quantize: true
        quantize_te: true
      sample:
        sampler: "flowmatch"
        sample_every: 250
        width: 832
        height: 480
        num_frames: 41
        fps: 16
        prompts:
          - "[trigger] playing the guitar"
          - "a second one"
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 5
        sample_steps: 30
meta: {version: '1.0'}
"""
PIPE = """
output_dir = 'runs/pipe'
dataset = 'dataset.toml'
epochs = 1000
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 2
gradient_clipping = 1.0
warmup_steps = 100
eval_every_n_epochs = 1
save_every_n_epochs = 2
checkpoint_every_n_minutes = 120
activation_checkpointing = 'unsloth'
partition_method = 'parameters'
save_dtype = 'bfloat16'
caching_batch_size = 1
steps_per_print = 1
video_clip_mode = 'single_middle'
mystery = 3

[model]
type = 'wan'
ckpt_path = 'checkpoints/Wan2.1-T2V-1.3B'
dtype = 'bfloat16'
transformer_dtype = 'float8'
timestep_sample_method = 'logit_normal'

[adapter]
type = 'lora'
rank = 8
dtype = 'bfloat16'

[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
eps = 1e-8

[monitoring]
enable_wandb = false
wandb_api_key = 'abcdef12345'
"""
PIPE_DATA = """
resolutions = [64]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 7
frame_buckets = [1, 17]

[[directory]]
path = 'clips'
num_repeats = 5
"""
SIMPLE = {
    "--model_family": "wan",
    "--model_flavour": "t2v-480p-1.3b-2.1",
    "--model_type": "lora",
    "--lora_rank": 16,
    "--learning_rate": 1e-4,
    "--checkpointing_steps": 200,
    "--max_train_steps": 100,
    "--num_train_epochs": 0,
    "--lora_initialisation_style": "gaussian",
    "--adam_weight_decay": 0.1,
    "--aspect_bucket_worker_count": 2,
    "--snr_gamma": 5,
    "--hub_token": "hf_abcdef",
    "--mystery": True,
    "--data_backend_config": "config/simple/multidatabackend.json",
    "--user_prompt_library": "config/simple/user_prompt_library.json",
    "--output_dir": "runs/simple",
}
SIMPLE_DATA: list[dict[str, Any]] = [
    {
        "id": "clips",
        "type": "local",
        "dataset_type": "video",
        "instance_data_dir": "clips",
        "resolution": 64,
        "repeats": 3,
        "hash_filenames": True,
        "video": {"num_frames": 17, "min_frames": 17, "is_i2v": False},
    },
    {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
    {"id": "old", "type": "local", "dataset_type": "caption"},
]


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


def material() -> None:
    build_tiny_t2v(Path("model"))
    render_folder(Path("clips"), count=4)


def picked(expected: dict[str, Any]) -> dict[str, Any]:
    found = plain_data(CONFIG)
    return {key: found.get(key) for key in expected}


def test_ai_toolkit(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    material()
    Path("job.yaml").write_text(JOB)
    assert call("import", "job.yaml") == 0
    out = capsys.readouterr().out
    assert out.startswith("ai-toolkit: job.yaml\n")
    assert "train.colour = red: not known here" in out
    assert "save.hf_token = (hidden)" in out
    assert "hf_abcdef" not in out + CONFIG.read_text()
    assert "train.content_or_style = style: levels follow" in out
    expected = {
        "model_flavour": "t2v-480p-1.3b-2.1",
        "base_model_precision": "fp8-quanto",
        "text_encoder_1_precision": "fp8-quanto",
        "lora_rank": 32,
        "lora_alpha": 32.0,
        "flow_use_uniform_schedule": True,
        "optimizer_config": {"weight_decay": 0.0001},
        "use_ema": True,
        "max_train_steps": 2000,
        "lr_scheduler": "constant",
        "output_dir": "runs/my_lora_v1",
        "checkpoints_total_limit": 4,
        "validation_resolution": "832x480",
    }
    assert picked(expected) == expected
    entries = plain_data(LIST)
    assert [each.get("resolution") for each in entries] == [64, 80, None]
    assert (entries[0]["video"], entries[0]["repeats"]) == ({"num_frames": 17}, 3)
    assert entries[0]["caption_prepend"] == "ohwx,"
    assert plain_data(LIBRARY)["prompt_2"] == {"prompt": "a second one", "seed": 43}
    assert plain_data(LIBRARY)["prompt_1"]["prompt"] == "ohwx playing the guitar"
    assert call("check", "--pretrained_model_name_or_path", "model") == 0


@pytest.mark.parametrize(
    ("arch", "path", "flavour"),
    [
        ("wan21", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "i2v-14b-2.1-720p"),
        ("wan22_5b", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "ti2v-5b-2.2"),
        ("wan22_14b", "ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16", "t2v-14b-2.2-both"),
        ("wan22_14b_i2v", "ai-toolkit/Wan2.2-I2V-A14B-Diffusers-bf16", "i2v-14b-2.2-both"),
    ],
)
def test_models_of_ai_toolkit(call: Call, arch: str, path: str, flavour: str) -> None:
    Path("job.yaml").write_text(JOB.replace("'wan21'", arch).replace("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", path))
    assert call("import", "job.yaml") == 0
    assert plain_data(CONFIG)["model_flavour"] == flavour


def test_the_shift_of_ai_toolkit_is_the_models(call: Call) -> None:
    Path("job.yaml").write_text(JOB.replace("'linear'", "'shift'").replace("'wan21'", "wan22_5b"))
    assert call("import", "job.yaml") == 0
    expected = {"flow_use_uniform_schedule": True, "flow_schedule_shift": 5.0, "flow_schedule_auto_shift": None}
    assert picked(expected) == expected


def test_another_model_of_ai_toolkit_is_one_error(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.yaml").write_text(JOB.replace("'wan21'", "flux"))
    assert call("import", "job.yaml") == 2
    assert "the model 'flux' has no counterpart" in capsys.readouterr().err
    assert not CONFIG.exists()


def test_diffusion_pipe(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    material()
    Path("main.toml").write_text(PIPE)
    Path("dataset.toml").write_text(PIPE_DATA)
    assert call("import", "main.toml") == 0
    out = capsys.readouterr().out
    assert out.startswith("diffusion-pipe: main.toml\n")
    assert "mystery = 3: not known here" in out
    assert "abcdef12345" not in out + CONFIG.read_text()
    expected = {
        "model_flavour": "t2v-480p-1.3b-2.1",
        "base_model_precision": "fp8-scaled",
        "lora_rank": 8,
        "lora_alpha": 8,
        "lora_dtype": "bf16",
        "optimizer": "optimi-adamw",
        "optimizer_config": {"betas": [0.9, 0.99], "weight_decay": 0.01, "eps": 1e-8},
        "gradient_checkpointing": "offload",
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 100,
        "num_train_epochs": 1000,
        "checkpoint_epoch_interval": 2,
        "checkpoint_minutes_interval": 120,
        "checkpoint_step_interval": 0,
    }
    assert picked(expected) == expected
    entries = plain_data(LIST)
    assert [each["id"] for each in entries] == ["clips", "text-embeds"], "there are no pictures in the folder"
    assert entries[0]["video"] == {"frame_buckets": [17], "cut": "middle"}
    assert (entries[0]["repeats"], entries[0]["resolution"], entries[0]["minimum_aspect_ratio"]) == (4, 64, 0.5)
    assert call("check", "--pretrained_model_name_or_path", "model", "--report_to", "none") == 0


@pytest.mark.parametrize(("low", "flavour"), [(0.9, "i2v-14b-2.2-high"), (0, "i2v-14b-2.2-low")])
def test_an_expert_in_diffusion_pipe(call: Call, low: float, flavour: str) -> None:
    high = 1 if low else 0.9
    text = PIPE.replace("Wan2.1-T2V-1.3B", "Wan2.2-I2V-A14B").replace(
        "[adapter]", f"min_t = {low}\nmax_t = {high}\n[adapter]"
    )
    Path("main.toml").write_text(text)
    Path("dataset.toml").write_text(PIPE_DATA)
    assert call("import", "main.toml", "dataset.toml") == 0
    assert plain_data(CONFIG)["model_flavour"] == flavour
    assert [each["dataset_type"] for each in plain_data(LIST)] == ["image", "video", "text_embeds"], "nobody can look"


def test_simpletuner(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    material()
    folder = Path("config/simple")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SIMPLE))
    (folder / "multidatabackend.json").write_text(json.dumps(SIMPLE_DATA))
    (folder / "user_prompt_library.json").write_text('{"fox": "a fox"}')
    assert call("import", "config/simple/config.json") == 0
    out = capsys.readouterr().out
    assert out.startswith("simpletuner: config/simple/config.json\n")
    assert "mystery = true: not known here" in out
    assert "snr_gamma = 5: for noise prediction" in out
    assert "dataset_type = caption: entries of this type" in out
    assert "hash_filenames = true: cache files" in out
    assert "hf_abcdef" not in out + CONFIG.read_text()
    expected = {
        "model_family": "wan",
        "checkpoint_step_interval": 200,
        "lora_init_type": "gaussian",
        "optimizer_config": {"weight_decay": 0.1},
        "probe_processes": 2,
        "user_prompt_library": str(LIBRARY),
        "data_backend_config": str(LIST),
    }
    assert picked(expected) == expected
    assert [each["id"] for each in plain_data(LIST)] == ["clips", "text"]
    assert plain_data(LIST)[0]["video"] == {"num_frames": 17, "min_frames": 17}
    assert plain_data(LIBRARY) == {"fox": "a fox"}
    assert call("check", "--pretrained_model_name_or_path", "model") == 0


def test_simpletuner_as_environment(call: Call) -> None:
    Path("config.env").write_text("export MODEL_FAMILY=wan\nLEARNING_RATE=5e-5 # small\n")
    assert call("import", "config.env") == 0
    assert picked({"model_family": "", "learning_rate": ""}) == {"model_family": "wan", "learning_rate": "5e-5"}


def test_files_of_two_tools_are_one_error(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.yaml").write_text(JOB)
    Path("main.toml").write_text(PIPE)
    assert call("import", "job.yaml", "main.toml") == 2
    assert (
        "the files are of several tools: job.yaml (ai-toolkit), main.toml (diffusion-pipe)" in capsys.readouterr().err
    )


def test_a_file_that_is_said_to_be_of_a_tool_and_is_not_is_one_error(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("strange.toml").write_text("colour = 3\n")
    for tool in ("ai-toolkit", "diffusion-pipe"):
        assert call("import", "strange.toml", "--from", tool) == 2
        assert capsys.readouterr().err.startswith("error: ")
    Path("job.yaml").write_text(JOB.replace("linear: 32", "linear: many"))
    assert call("import", "job.yaml") == 2
    assert "this cannot be understood as a config of ai-toolkit" in capsys.readouterr().err


def test_files_of_simpletuner_that_are_named_one_by_one(call: Call) -> None:
    Path("simple.json").write_text(json.dumps({"model_family": "wan", "lora_type": "lycoris"}))
    Path("lycoris_config.json").write_text('{"algo": "lokr", "factor": 8}')
    Path("prompts.json").write_text('{"fox": "a fox"}')
    assert call("import", "simple.json", "lycoris_config.json", "prompts.json") == 0
    assert picked({"lycoris_config": ""}) == {"lycoris_config": "lycoris_config.json"}
    assert plain_data(LIBRARY) == {"fox": "a fox"}
