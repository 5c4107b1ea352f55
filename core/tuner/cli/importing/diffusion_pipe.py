"""diffusion-pipe: its training TOML and its dataset TOML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from tuner.cli.importing import diffusion_pipe_data, shared
from tuner.cli.importing.draft import Draft, Rule, flat, joint, moot, same, switched
from tuner.cli.importing.read import Read, read
from tuner.errors import ConfigError

TOOL = "diffusion-pipe"
FOLDERS = {
    "t2v-1.3b": "t2v-480p-1.3b-2.1",
    "t2v-14b": "t2v-480p-14b-2.1",
    "i2v-14b-720p": "i2v-14b-2.1-720p",
    "i2v-14b": "i2v-14b-2.1",
    "flf2v-14b": "flf2v-14b-2.1",
    "ti2v-5b": "ti2v-5b-2.2",
    "t2v-a14b": "t2v-14b-2.2",
    "i2v-a14b": "i2v-14b-2.2",
}
"""Part of the name of the official checkpoint folder -> our flavour; the first that is in it counts."""
PIPELINE = "one model is not divided over GPUs by layers: fsdp_enable spreads its weights"
EVAL = "loss on held-out clips: eval_steps_interval, and a dataset of `dataset_type: eval`"
OPTIMIZERS = shared.OPTIMIZERS | {"adamw8bitkahan": "bnb-adamw8bit"}

TABLE: dict[str, Rule] = {
    "output_dir": same("output_dir", "one run a folder here; each run has a dated folder in it there"),
    "dataset": joint("data_backend_config"),
    "eval_datasets": moot(EVAL),
    "epochs": same("num_train_epochs"),
    "max_steps": same("max_train_steps"),
    "micro_batch_size_per_gpu": joint("train_batch_size"),
    "image_micro_batch_size_per_gpu": joint("batch_tokens", "batch_tokens gives small clips larger batches"),
    "pipeline_stages": moot(PIPELINE),
    "partition_method": moot(PIPELINE),
    "partition_split": moot(PIPELINE),
    "gradient_accumulation_steps": same("gradient_accumulation_steps"),
    "gradient_clipping": same("max_grad_norm"),
    "warmup_steps": joint("lr_warmup_steps"),
    "lr_scheduler": joint("lr_scheduler"),
    "force_constant_lr": joint("learning_rate"),
    "blocks_to_swap": joint("enable_group_offload, group_offload_resident_blocks"),
    "pseudo_huber_c": joint("loss_type, huber_c", "the scale differs by a factor 2c"),
    "eval_every_n_epochs": moot(EVAL),
    "eval_every_n_steps": moot(EVAL),
    "eval_every_n_examples": moot(EVAL),
    "eval_before_first_step": moot(EVAL),
    "eval_micro_batch_size_per_gpu": moot(EVAL),
    "image_eval_micro_batch_size_per_gpu": moot(EVAL),
    "eval_gradient_accumulation_steps": moot(EVAL),
    "disable_block_swap_for_eval": moot(EVAL),
    "save_every_n_epochs": same("checkpoint_epoch_interval", "a LoRA file and a checkpoint are one thing here"),
    "save_every_n_steps": joint("checkpoint_step_interval"),
    "save_every_n_examples": moot("checkpoints are made by steps, epochs or minutes"),
    "checkpoint_every_n_epochs": joint("checkpoint_epoch_interval"),
    "checkpoint_every_n_minutes": same("checkpoint_minutes_interval"),
    "activation_checkpointing": joint("gradient_checkpointing", "`unsloth` keeps checkpoints on the host: `offload`"),
    "reentrant_activation_checkpointing": moot("never reentrant"),
    "save_dtype": moot("LoRA files have the precision of lora_dtype"),
    "caching_batch_size": joint("vae_batch_size, text_embed_batch_size"),
    "map_num_proc": same("probe_processes"),
    "compile": joint("dynamo_backend"),
    "steps_per_print": same("logging_steps"),
    "video_clip_mode": joint("video.cut"),
    "x_axis_examples": moot("trackers have steps"),
    "upload_hf_from_epoch": moot("see push_checkpoints_to_hub"),
    "huggingface_repo": joint("hub_model_id, push_to_hub"),
    "model.type": joint("model_family"),
    "model.ckpt_path": joint(
        "model_flavour", "Wan's own layout there; diffusers' layout here: the flavour's repository"
    ),
    "model.diffusers_path": same("pretrained_model_name_or_path"),
    "model.transformer_path": joint("pretrained_transformer_model_name_or_path"),
    "model.llm_path": joint("pretrained_t5_model_name_or_path"),
    "model.vae_path": joint("pretrained_vae_model_name_or_path"),
    "model.dtype": same("mixed_precision", values={"bfloat16": "bf16", "float32": "no"}),
    "model.transformer_dtype": joint("base_model_precision", "weights have a scale each here; a plain cast there"),
    "model.timestep_sample_method": joint("flow_use_uniform_schedule"),
    "model.sigmoid_scale": joint("flow_sigmoid_scale"),
    "model.shift": same("flow_schedule_shift"),
    "model.flux_shift": joint("flow_schedule_auto_shift", "by the tokens of pictures there, of the whole clip here"),
    "model.min_t": joint("model_flavour", "0 to 1 in both; an expert's range is the model's own here"),
    "model.max_t": joint("model_flavour", "0 to 1 in both; an expert's range is the model's own here"),
    "adapter.type": joint("lora_type"),
    "adapter.rank": joint("lora_rank"),
    "adapter.alpha": same("lora_alpha", "the rank when absent, in both"),
    "adapter.dropout": same("lora_dropout"),
    "adapter.dtype": same("lora_dtype", values={"bfloat16": "bf16", "float32": "fp32"}),
    "adapter.init_from_existing": same("init_lora", "a file here, a folder there", convert=str),
    "adapter.decompose_factor": joint("lycoris_config"),
    "adapter.fuse_adapters": moot("merge them into the base first: tuner merge"),
    "optimizer.type": same("optimizer", values=OPTIMIZERS),
    "optimizer.lr": same("learning_rate", "per optimizer step in both: it is not scaled by batch or GPUs"),
    "optimizer.betas": joint("optimizer_config"),
    "optimizer.weight_decay": joint("optimizer_config"),
    "optimizer.eps": joint("optimizer_config"),
    "optimizer.gradient_release": same("gradient_release", convert=switched),
    "optimizer.stabilize": moot("an option of that optimizer's own 8-bit code"),
    "monitoring.enable_wandb": joint("report_to"),
    "monitoring.wandb_tracker_name": same("tracker_project_name"),
    "monitoring.wandb_run_name": same("tracker_run_name"),
}
INTO_OPTIMIZER = ("betas", "weight_decay", "eps")


def translate(files: list[Read]) -> Draft:
    """The config for a training TOML, and for the dataset TOML that it names or that is given. Raises ConfigError."""
    draft = Draft(TOOL)
    main = next((file for file in files if "directory" not in file.data), None)
    data = next((file for file in files if "directory" in file.data), None)
    if main is None:
        raise ConfigError(
            "this is a list of datasets without the training config", where=files[0].path, remedy="name both files"
        )
    given = flat(main.data)
    draft.apply(given, TABLE)
    draft.settings |= {"model_family": "wan", "model_type": "lora" if "adapter" in main.data else "full"}
    _model(draft, given, main.path)
    _levels(draft, given)
    _adapter(draft, given)
    _training(draft, given)
    _saving(draft, given)
    diffusion_pipe_data.translate(draft, data or _named(given, main.path), given)
    shared.cleared(draft.settings)
    return draft


def _named(given: Mapping[str, Any], config: Path) -> Read:
    path = Path(str(given.get("dataset", "dataset.toml")))
    near = [place for place in (path, config.parent / path, config.parent / path.name) if place.is_file()]
    if not near:
        raise ConfigError("the config names a dataset file that is not there", where=path, remedy="name it too")
    return read(near[0])


def _model(draft: Draft, given: Mapping[str, Any], where: Path) -> None:
    if given.get("model.type") != "wan":
        raise ConfigError(f"the model {given.get('model.type')!r} has no counterpart", where=where, allowed="wan")
    path = str(given.get("model.ckpt_path", given.get("model.diffusers_path", "")))
    folder = PurePath(path.rstrip("/")).name.lower()
    flavour = next((name for part, name in FOLDERS.items() if part in folder), None)
    if flavour == "i2v-14b-2.1" and "720p" in folder:
        flavour = "i2v-14b-2.1-720p"
    if flavour is None:
        draft.none("model.ckpt_path", path, "the folder's name tells no flavour: set model_flavour yourself")
        flavour = "t2v-480p-1.3b-2.1"
    draft.settings["model_flavour"] = flavour
    ours, low, high = "pretrained_transformer_model_name_or_path", *_range(given)
    transformer = given.get("model.transformer_path")
    if flavour.endswith("14b-2.2"):
        if "model.min_t" not in given and "model.max_t" not in given:
            which = "high" if "high" in str(transformer).lower() else "low"
            boundary = shared.BOUNDARY[flavour[:3]]
            low, high = (boundary, 1.0) if which == "high" else (0.0, boundary)
            draft.none(
                "model.min_t, model.max_t", "0 to 1", f"the {which}-noise expert is trained on its own range alone"
            )
        if shared.expert(draft, "model.min_t, model.max_t", flavour[:3], low, high) == "low":
            ours = "pretrained_transformer_2_model_name_or_path"
    else:
        shared.levels(draft, "model.min_t, model.max_t", low, high)
    for key, target in (
        ("model.transformer_path", ours),
        ("model.llm_path", "pretrained_t5_model_name_or_path"),
        ("model.vae_path", "pretrained_vae_model_name_or_path"),
    ):
        if file := given.get(key):
            if PurePath(str(file)).name in ("low_noise_model", "high_noise_model"):
                draft.none(key, file, "a folder in Wan's own layout: the flavour's repository has this expert")
            else:
                shared.model_file(draft, key, file, target)
    kind = str(given.get("model.transformer_dtype", given.get("model.dtype", "bfloat16")))
    if kind.startswith("float8"):
        draft.settings["base_model_precision"] = "fp8-scaled"
    elif kind == "nf4":
        draft.settings["base_model_precision"] = "nf4-bnb"


def _range(given: Mapping[str, Any]) -> tuple[float, float]:
    return float(given.get("model.min_t", 0)), float(given.get("model.max_t", 1))


def _levels(draft: Draft, given: Mapping[str, Any]) -> None:
    way = str(given.get("model.timestep_sample_method", "logit_normal"))
    if way == "uniform":
        draft.put("model.timestep_sample_method", way, "", flow_use_uniform_schedule=True)
    elif way == "logit_normal":
        scale = float(given.get("model.sigmoid_scale", 1.0))
        draft.put("model.timestep_sample_method", way, "", flow_sigmoid_scale=scale)
    else:
        draft.none("model.timestep_sample_method", way, "no counterpart; known are logit_normal, uniform")
    if switched(given.get("model.flux_shift", False)):
        draft.settings["flow_schedule_auto_shift"] = True


def _adapter(draft: Draft, given: Mapping[str, Any]) -> None:
    kind, rank = str(given.get("adapter.type", "")), int(float(given.get("adapter.rank", 32)))
    if kind == "lora":
        draft.settings |= {"lora_rank": rank}
        draft.settings.setdefault("lora_alpha", rank)
        draft.put("adapter.type", kind, "every matrix of the blocks", lora_target_modules=["all-linear"])
    elif kind == "lokr":
        draft.settings["lora_rank"] = min(rank, 10000)
        draft.settings.setdefault("lora_alpha", 1)
        factor = int(given.get("adapter.decompose_factor", -1))
        shared.lycoris(draft, "adapter.type, adapter.rank", kind, {"algo": "lokr", "factor": factor})
    elif kind:
        draft.none("adapter.type", kind, "no counterpart; known are lora, lokr")


def _training(draft: Draft, given: Mapping[str, Any]) -> None:
    config = {key: given[f"optimizer.{key}"] for key in INTO_OPTIMIZER if f"optimizer.{key}" in given}
    if config:
        draft.settings["optimizer_config"] = config
        shared.optimizer(draft, "optimizer")
    if "force_constant_lr" in given:
        draft.settings["learning_rate"] = given["force_constant_lr"]
    warmup = int(given.get("warmup_steps", 0))
    curve = str(given.get("lr_scheduler", "constant"))
    if curve in shared.SCHEDULERS:
        curve = "constant_with_warmup" if curve == "constant" and warmup else curve
        draft.put("lr_scheduler", given.get("lr_scheduler", "constant"), "", lr_scheduler=curve, lr_warmup_steps=warmup)
    else:
        draft.none("lr_scheduler", curve, f"no counterpart; known are {', '.join(shared.SCHEDULERS)}")
    batch = given.get("micro_batch_size_per_gpu", 1)
    if isinstance(batch, list):
        draft.none(
            "micro_batch_size_per_gpu", batch, "by size: the smallest is used, and batch_tokens gives others more"
        )
        batch = min(size for _, size in batch)
    draft.settings["train_batch_size"] = batch
    way = given.get("activation_checkpointing", False)
    if isinstance(way, str):
        draft.settings["gradient_checkpointing"] = "offload" if way == "unsloth" else True
    else:
        draft.settings["gradient_checkpointing"] = bool(way)
    if given.get("blocks_to_swap"):
        shared.offload(draft, "blocks_to_swap", given["blocks_to_swap"])
        draft.settings["gradient_checkpointing"] = draft.settings["gradient_checkpointing"] or True
    if size := given.get("caching_batch_size"):
        draft.settings |= {"vae_batch_size": int(size), "text_embed_batch_size": int(size)}
    if "pseudo_huber_c" in given:
        draft.settings |= {"loss_type": "huber", "huber_c": given["pseudo_huber_c"]}
    if switched(given.get("compile", False)):
        draft.settings["dynamo_backend"] = "inductor"


def _saving(draft: Draft, given: Mapping[str, Any]) -> None:
    draft.settings["checkpoint_step_interval"] = int(given.get("save_every_n_steps", 0))
    if "checkpoint_every_n_epochs" in given:
        every = min(given["checkpoint_every_n_epochs"], given.get("save_every_n_epochs", 10**9))
        draft.settings["checkpoint_epoch_interval"] = int(every)
    if "huggingface_repo" in given:
        draft.settings |= {"hub_model_id": given["huggingface_repo"], "push_to_hub": True}
    on = switched(given.get("monitoring.enable_wandb", False))
    draft.settings["report_to"] = "tensorboard,wandb" if on else "tensorboard"
    draft.put(
        "monitoring.enable_wandb", on, "TensorBoard is always written there", report_to=draft.settings["report_to"]
    )
