"""musubi-tuner: the arguments of its Wan training script, in a shell script or TOML, and its dataset TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.cli.importing import musubi_data, shared
from tuner.cli.importing.draft import Draft, Row, Rule, joint, literal, moot, options, same, switched
from tuner.cli.importing.read import Read, read, read_text
from tuner.errors import ConfigError, nearest

TOOL = "musubi-tuner"
TASKS = {
    "t2v-1.3B": "t2v-480p-1.3b-2.1",
    "t2v-14B": "t2v-480p-14b-2.1",
    "t2i-14B": "t2v-480p-14b-2.1",
    "i2v-14B": "i2v-14b-2.1",
    "flf2v-14B": "flf2v-14b-2.1",
    "t2v-A14B": "t2v-14b-2.2",
    "i2v-A14B": "i2v-14b-2.2",
}
LEVELS: Mapping[str, tuple[Mapping[str, Any], bool]] = {
    "sigma": ({"flow_use_uniform_schedule": True}, True),
    "uniform": ({"flow_use_uniform_schedule": True}, False),
    "sigmoid": ({}, False),
    "shift": ({}, True),
    "flux_shift": ({"flow_schedule_auto_shift": True}, False),
}
"""Their way to draw noise levels -> ours, and whether `discrete_flow_shift` counts."""
DEVICE = "a choice of the data loader or the machine, made by itself here"
NAMED = "files have fixed names here; the folder of the run has this name instead"

TABLE: dict[str, Rule] = {
    "task": joint("model_flavour", "for Wan 2.2 the range of timesteps says which expert"),
    "dit": joint("pretrained_transformer_model_name_or_path", "the low-noise expert where two are given"),
    "dit_high_noise": joint("pretrained_transformer_model_name_or_path", "both experts are trained in turn"),
    "vae": joint("pretrained_vae_model_name_or_path"),
    "t5": joint("pretrained_t5_model_name_or_path"),
    "clip": moot("taken from the model's own repository"),
    "dataset_config": joint("data_backend_config"),
    "mixed_precision": same("mixed_precision", values={"bf16": "bf16", "no": "no"}),
    "fp8_base": joint("base_model_precision", "weights have a scale each here, as with fp8_scaled"),
    "fp8_scaled": joint("base_model_precision"),
    "fp8_t5": joint("text_encoder_1_precision"),
    "blocks_to_swap": joint("enable_group_offload, group_offload_resident_blocks"),
    "gradient_checkpointing": same("gradient_checkpointing", convert=switched),
    "gradient_checkpointing_cpu_offload": joint("gradient_checkpointing"),
    "sdpa": moot("PyTorch's attention is what is used by itself"),
    "xformers": joint("attention_mechanism"),
    "flash_attn": joint("attention_mechanism"),
    "flash3": joint("attention_mechanism"),
    "sage_attn": joint("attention_mechanism", "for validation only: it has no backward there"),
    "split_attn": moot("samples of a batch have one length here"),
    "learning_rate": same("learning_rate", "per optimizer step in both: it is not scaled by batch or GPUs"),
    "optimizer_type": same("optimizer", values=shared.OPTIMIZERS),
    "optimizer_args": same("optimizer_config", convert=options),
    "lr_scheduler": same("lr_scheduler", values=shared.SCHEDULERS),
    "lr_warmup_steps": joint("lr_warmup_steps", "a fraction is one of all steps"),
    "lr_scheduler_num_cycles": same("lr_num_cycles", convert=int),
    "lr_scheduler_power": same("lr_power", convert=float),
    "max_grad_norm": same("max_grad_norm"),
    "gradient_accumulation_steps": same("gradient_accumulation_steps", convert=int),
    "max_train_steps": joint("max_train_steps"),
    "max_train_epochs": joint("num_train_epochs", "stands above max_train_steps there, and here by its absence"),
    "seed": same("seed", "the noise of a seed is not the same", convert=int),
    "network_module": joint("lora_type"),
    "network_dim": same("lora_rank", convert=int),
    "network_alpha": same("lora_alpha", "the scale is alpha / rank in both; 1 when absent there", convert=float),
    "network_dropout": same("lora_dropout", convert=float),
    "network_args": joint("lycoris_config", "options of LyCORIS; of plain LoRA see the rows of each"),
    "network_weights": same("init_lora"),
    "dim_from_weights": moot("set lora_rank to that of the file: tuner inspect FILE"),
    "base_weights": moot("merge them into the base first: tuner merge"),
    "base_weights_multiplier": moot("merge them into the base first: tuner merge"),
    "scale_weight_norms": moot("the norms of LoRA matrices are not limited"),
    "timestep_sampling": joint("flow_use_uniform_schedule, flow_schedule_shift"),
    "discrete_flow_shift": joint("flow_schedule_shift", "counts for shift and sigma alone there"),
    "sigmoid_scale": joint("flow_sigmoid_scale"),
    "weighting_scheme": joint("loss_weighting"),
    "logit_mean": joint("flow_sigmoid_scale", "a mean other than 0 has no counterpart"),
    "logit_std": joint("flow_sigmoid_scale"),
    "mode_scale": moot("`weighting_scheme: mode` has no counterpart"),
    "min_timestep": joint("model_flavour", "0 to 1000 there; an expert's range is the model's own here"),
    "max_timestep": joint("model_flavour", "0 to 1000 there; an expert's range is the model's own here"),
    "timestep_boundary": joint("model_flavour", "the model's own boundary counts"),
    "preserve_distribution_shape": moot("always: levels are drawn from the truncated distribution"),
    "num_timestep_buckets": moot("levels are drawn for each sample by itself"),
    "offload_inactive_dit": moot("always: the expert whose turn it is not is on the host"),
    "guidance_scale": moot("of HunyuanVideo; Wan takes none in training"),
    "output_dir": joint("output_dir"),
    "output_name": joint("output_dir", NAMED),
    "save_every_n_epochs": same("checkpoint_epoch_interval", convert=int),
    "save_every_n_steps": joint("checkpoint_step_interval"),
    "save_last_n_epochs": joint("checkpoints_total_limit", "checkpoints are counted here, epochs there"),
    "save_last_n_steps": joint("checkpoints_total_limit", "checkpoints are counted here, steps there"),
    "save_state": moot("always: every checkpoint can be resumed"),
    "save_state_on_train_end": moot("always: every checkpoint can be resumed"),
    "save_precision": moot("LoRA files have the precision of lora_dtype"),
    "resume": moot("the state of another tool cannot be resumed; init_lora starts from its LoRA file"),
    "max_data_loader_n_workers": moot(DEVICE),
    "persistent_data_loader_workers": moot(DEVICE),
    "num_cpu_threads_per_process": moot(DEVICE),
    "ddp_timeout": moot(DEVICE),
    "ddp_gradient_as_bucket_view": moot(DEVICE),
    "ddp_static_graph": moot(DEVICE),
    "num_processes": moot("processes are given to the launcher: tuner launch"),
    "log_with": same("report_to", values={"tensorboard": "tensorboard", "wandb": "wandb", "all": "tensorboard,wandb"}),
    "logging_dir": moot("logs are in output_dir"),
    "log_prefix": moot("logs are in output_dir"),
    "log_tracker_name": same("tracker_project_name"),
    "log_tracker_config": moot("trackers are set up by their own environment variables"),
    "wandb_run_name": same("tracker_run_name"),
    "log_config": moot("every checkpoint has the whole config"),
    "sample_prompts": joint("user_prompt_library"),
    "sample_every_n_steps": same("validation_step_interval", convert=int),
    "sample_every_n_epochs": same("validation_epoch_interval", convert=int),
    "sample_at_first": joint("disable_benchmark"),
    "vae_cache_cpu": moot("`vae_enable_tiling: true` saves memory"),
    "vae_dtype": moot("the VAE has its own precision"),
    "vae_spatial_tile_sample_min_size": moot("`vae_enable_tiling: true` saves memory"),
    "dynamo_backend": same("dynamo_backend", convert=lambda name: str(name).lower()),
    "compile": joint("dynamo_backend"),
    "huggingface_repo_id": joint("hub_model_id, push_to_hub"),
    "huggingface_repo_visibility": same("hub_private", values={"private": True, "public": False}),
    "huggingface_repo_type": moot("always a model repository"),
    "huggingface_path_in_repo": moot("the run is at the top of its repository"),
    "save_state_to_huggingface": same("push_checkpoints_to_hub", convert=switched),
    "async_upload": moot("always"),
    "training_comment": moot("metadata is written by itself"),
    "metadata_title": moot("metadata is written by itself"),
    "metadata_author": moot("metadata is written by itself"),
    "metadata_description": moot("metadata is written by itself"),
    "metadata_license": moot("metadata is written by itself"),
    "metadata_tags": moot("metadata is written by itself"),
}
ATTENTION = {"xformers": "xformers", "flash_attn": "flash", "flash3": "_flash_3"}


def translate(files: list[Read]) -> Draft:
    """The config for musubi-tuner's files: arguments in a script or TOML, and the dataset TOML. Raises ConfigError."""
    draft, given = Draft(TOOL), _given(files)
    draft.settings |= {"model_family": "wan", "model_type": "lora"}
    draft.apply(given, TABLE)
    _model(draft, given)
    _memory(draft, given)
    _levels(draft, given)
    _adapter(draft, given)
    _length(draft, given)
    _output(draft, given)
    named = given.get("dataset_config")
    data = next((file for file in files if "datasets" in file.data), None)
    musubi_data.translate(draft, data, named, files[0].path.parent)
    _samples(draft, given, files[0].path.parent)
    shared.cleared(draft.settings)
    return draft


def _given(files: list[Read]) -> dict[str, Any]:
    """All arguments: those of files they name, and over them their own. Raises ConfigError."""
    found: dict[str, Any] = {}
    for file in files:
        if "datasets" not in file.data:
            found |= {key.replace("-", "_"): value for key, value in flat_sections(file.data).items()}
    if named := found.pop("config_file", None):
        path = Path(str(named))
        path = path if path.is_file() else files[0].path.parent / path
        found = {**flat_sections(read(path).data), **found}
    return found


def flat_sections(data: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a TOML, whose sections have no meaning."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat_sections(value) if isinstance(value, Mapping) else {key: value}
    return found


def _model(draft: Draft, given: Mapping[str, Any]) -> None:
    task = str(given.get("task", "t2v-14B"))
    if task not in TASKS:
        raise ConfigError(
            f"the task {task!r} of {TOOL} has no counterpart", allowed=TASKS, nearest=nearest(task, TASKS)
        )
    flavour, both = TASKS[task], "dit_high_noise" in given
    draft.settings["model_flavour"] = flavour
    first, second = "pretrained_transformer_model_name_or_path", "pretrained_transformer_2_model_name_or_path"
    low, high = (float(given.get(key, top)) / 1000 for key, top in (("min_timestep", 0), ("max_timestep", 1000)))
    ours = first
    if "A14B" in task and both:
        draft.settings["model_flavour"] = f"{flavour}-both"
        shared.model_file(draft, "dit_high_noise", given["dit_high_noise"], first)
        ours = second
    elif "A14B" in task:
        which = shared.expert(draft, "min_timestep, max_timestep", task[:3], low, high)
        ours = second if which == "low" else first
    else:
        shared.levels(draft, "min_timestep, max_timestep", low, high)
    for key, target in (
        ("dit", ours),
        ("vae", "pretrained_vae_model_name_or_path"),
        ("t5", "pretrained_t5_model_name_or_path"),
    ):
        if key in given:
            shared.model_file(draft, key, given[key], target)


def _memory(draft: Draft, given: Mapping[str, Any]) -> None:
    if _on(given, "fp8_base") or _on(given, "fp8_scaled"):
        draft.settings["base_model_precision"] = "fp8-scaled"
    if _on(given, "fp8_t5"):
        draft.settings["text_encoder_1_precision"] = "fp8-scaled"
    if int(given.get("blocks_to_swap") or 0):
        shared.offload(draft, "blocks_to_swap", given["blocks_to_swap"])
        draft.settings["gradient_checkpointing"] = True
    if _on(given, "gradient_checkpointing_cpu_offload"):
        draft.settings["gradient_checkpointing"] = "offload"
    for key, kernel in ATTENTION.items():
        if _on(given, key):
            draft.settings["attention_mechanism"] = kernel
    if _on(given, "sage_attn"):
        draft.settings |= {"attention_mechanism": "sageattention", "attention_usage": "inference"}
    if _on(given, "compile"):
        draft.settings["dynamo_backend"] = "inductor"
    if "mixed_precision" not in given:
        draft.none("mixed_precision", "no", "not given; bf16 is kept, which saves half the memory")


def _levels(draft: Draft, given: Mapping[str, Any]) -> None:
    """How noise levels are drawn, and what the loss is weighted by."""
    way, shift = str(given.get("timestep_sampling", "sigma")), float(given.get("discrete_flow_shift", 1.0))
    scheme = str(given.get("weighting_scheme", "none"))
    if way not in LEVELS:
        draft.none("timestep_sampling", way, f"no counterpart; known are {', '.join(LEVELS)}. Ours is logit-normal")
        return
    ours, shifted = LEVELS[way]
    found = dict(ours)
    if way in ("sigmoid", "shift", "flux_shift"):
        found["flow_sigmoid_scale"] = float(given.get("sigmoid_scale", 1.0))
    elif way == "sigma" and scheme == "logit_normal":
        found = {"flow_sigmoid_scale": float(given.get("logit_std", 1.0))}
        if float(given.get("logit_mean", 0)):
            draft.none("logit_mean", given["logit_mean"], "the normal number has mean 0 here")
    if shifted and shift != 1.0:
        found["flow_schedule_shift"] = shift
    draft.put("timestep_sampling", way, "and what belongs to it; `sigma` is the default there", **found)
    if scheme in ("sigma_sqrt", "cosmap"):
        draft.settings["loss_weighting"] = scheme
    elif scheme not in ("none", "logit_normal"):
        draft.none("weighting_scheme", scheme, "no counterpart; the loss is not weighted")


def _adapter(draft: Draft, given: Mapping[str, Any]) -> None:
    for key, theirs, ours, value in (
        ("lora_rank", "network_dim", "lora_rank", 4),
        ("lora_alpha", "network_alpha", "lora_alpha", 1.0),
        ("learning_rate", "learning_rate", "learning_rate", 2e-6),
    ):
        if key not in draft.settings:
            draft.default(theirs, value, **{ours: value})
    words = given.get("network_args") or []
    extra = options(words)
    if str(given.get("network_module", "")).startswith("lycoris"):
        shared.lycoris(draft, "network_module, network_args", words, {"algo": "lora", **extra})
        return
    draft.put(
        "network_module", given.get("network_module"), "every matrix of the blocks", lora_target_modules=["all-linear"]
    )
    for name, value in extra.items():
        draft.none(
            f"network_args: {name}",
            value,
            "see lora_target_modules and lora_rank_pattern" if "patterns" in name else "no counterpart",
        )


def _length(draft: Draft, given: Mapping[str, Any]) -> None:
    steps, epochs = given.get("max_train_steps"), given.get("max_train_epochs")
    if epochs:
        draft.settings["num_train_epochs"] = int(epochs)
    elif steps:
        draft.settings["max_train_steps"] = int(steps)
    else:
        draft.default("max_train_steps", 1600, max_train_steps=1600)
    if "optimizer_type" not in given:
        draft.default("optimizer_type", "AdamW", optimizer="adamw")
    shared.optimizer(draft, "optimizer_args")
    if "lr_scheduler" not in given:
        draft.default("lr_scheduler", "constant", lr_scheduler="constant")
    warmup = float(given.get("lr_warmup_steps") or 0)
    if warmup >= 1:
        draft.settings["lr_warmup_steps"] = int(warmup)
    elif warmup and "max_train_steps" in draft.settings:
        draft.settings["lr_warmup_steps"] = round(warmup * draft.settings["max_train_steps"])
    elif warmup:
        draft.none("lr_warmup_steps", warmup, "a fraction of steps that epochs decide: set lr_warmup_steps yourself")
    if draft.settings.get("lr_scheduler") == "constant" and "lr_warmup_steps" in draft.settings:
        draft.none("lr_warmup_steps", warmup, "has no effect with a constant rate there; constant_with_warmup has one")
        del draft.settings["lr_warmup_steps"]


def _output(draft: Draft, given: Mapping[str, Any]) -> None:
    parts = [str(given[key]) for key in ("output_dir", "output_name") if given.get(key)]
    if parts:
        draft.settings["output_dir"] = str(Path(*parts))
    epochs = int(given.get("save_every_n_epochs") or 0)
    every = draft.settings["checkpoint_step_interval"] = int(given.get("save_every_n_steps") or 0)
    for key, between in (("save_last_n_epochs", epochs), ("save_last_n_steps", every)):
        if given.get(key) and between:
            draft.settings["checkpoints_total_limit"] = max(1, -(-int(given[key]) // between))
    if "huggingface_repo_id" in given:
        draft.settings |= {"hub_model_id": given["huggingface_repo_id"], "push_to_hub": True}


def _samples(draft: Draft, given: Mapping[str, Any], folder: Path) -> None:
    if not given.get("sample_prompts"):
        return
    draft.settings["disable_benchmark"] = not _on(given, "sample_at_first")
    path = Path(str(given["sample_prompts"]))
    text = read_text(path if path.is_file() else folder / path)
    if path.suffix != ".txt":
        draft.none("sample_prompts", str(path), "prompts in a .txt file are read; put these into it one a line")
        return
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    for number, line in enumerate(prompts, 1):
        musubi_data.prompt(draft, f"prompt_{number}", line)
    why = "flags behind a prompt are its own settings there and here"
    draft.rows.append(Row("sample_prompts", f"{len(prompts)} prompts", "user_prompt_library", why))


def arguments(text: str) -> dict[str, Any]:
    """The arguments of the training script in a shell script: of the last command that trains.

    Shell variables (``NAME=value`` lines) are filled in; others stay as they are.
    """
    import shlex

    joined = re.sub(r"[\\^`][ \t]*\r?\n", " ", text)
    variables = {
        name: value.strip("\"'")
        for name, value in re.findall(r"^\s*(?:export\s+|set\s+)?(\w+)=(\S+)\s*$", joined, re.M)
    }
    lines = [line for line in joined.splitlines() if "train" in line and "--" in line and line.lstrip()[:1] != "#"]
    if not lines:
        return {}
    line = re.sub(r"\$\{?(\w+)\}?", lambda found: variables.get(found[1], found[0]), lines[-1])
    script = re.search(r"\S*train\S*\.py\S*", line)
    words = shlex.split(line[script.end() :] if script else line, comments=True)
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = literal(value) if equals else True
        elif name:
            value = literal(word) if "=" not in word else word
            old = found[name]
            found[name] = value if old is True else [*(old if isinstance(old, list) else [old]), value]
    return found


def _on(given: Mapping[str, Any], key: str) -> bool:
    return key in given and switched(given[key])
