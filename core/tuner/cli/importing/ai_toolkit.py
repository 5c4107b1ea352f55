"""ai-toolkit: the YAML of a training job, its datasets and its sample prompts among it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from tuner.cli.importing import shared
from tuner.cli.importing.draft import Draft, Rule, flat, joint, moot, same, switched
from tuner.cli.importing.read import Read
from tuner.errors import ConfigError

TOOL = "ai-toolkit"
ARCHES = {"wan21", "wan21_i2v", "wan22_5b", "wan22_14b", "wan22_14b_t2v", "wan22_14b_i2v"}
PRECISIONS = {
    "qfloat8": "fp8-quanto",
    "float8": "fp8-torchao",
    "qint8": "int8-quanto",
    "int8": "int8-torchao",
    "uint8": "int8-torchao",
    "qint4": "int4-quanto",
    "int4": "int4-torchao",
    "uint4": "int4-torchao",
}
"""Their `qtype` -> ours; qfloat8 when absent there."""
LEVELS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "sigmoid": ({"flow_sigmoid_scale": 1.0}, ""),
    "weighted": ({"flow_use_uniform_schedule": True}, "evenly in both; its weights of the loss have no counterpart"),
    "linear": ({"flow_use_uniform_schedule": True}, "evenly in both"),
    "shift": ({"flow_use_uniform_schedule": True}, "evenly, then shifted: by 3 for Wan 2.1, by 5 for Wan 2.2"),
}
SPREAD = "frames spread evenly over the clip there; neighbouring frames here, so that motion keeps its speed"
DONE = "always, and for all datasets"
AUGMENT = "pictures and clips are not changed beyond scaling and cutting"

TABLE: dict[str, Rule] = {
    "type": moot("the kind of job"),
    "device": moot("the launcher and CUDA_VISIBLE_DEVICES choose the device"),
    "training_folder": joint("output_dir"),
    "name": joint("output_dir", "the folder is training_folder/name in both"),
    "trigger_word": joint("caption_prepend", "put before every caption, also where it is in there already"),
    "performance_log_every": moot("the log has the times of every step"),
    "sqlite_db_path": moot("of that tool's own interface"),
    "network.type": joint("lora_type"),
    "network.linear": joint("lora_rank"),
    "network.rank": joint("lora_rank"),
    "network.linear_alpha": joint("lora_alpha", "ignored there for LoRA of a transformer: its scale is 1"),
    "network.alpha": joint("lora_alpha", "ignored there for LoRA of a transformer: its scale is 1"),
    "network.dropout": same("lora_dropout"),
    "network.conv": moot("Wan's denoiser has no convolutions to adapt"),
    "network.conv_alpha": moot("Wan's denoiser has no convolutions to adapt"),
    "network.lokr_full_rank": joint("lycoris_config"),
    "network.lokr_factor": joint("lycoris_config"),
    "network.pretrained_lora_path": same("init_lora"),
    "network.network_kwargs.only_if_contains": same(
        "lora_target_modules",
        "parts of names there, ends or `re:` here",
        convert=lambda names: [f"re:.*{name}.*" for name in names],
    ),
    "network.network_kwargs.ignore_if_contains": same(
        "lora_exclude_modules", "parts of names there", convert=lambda names: [f"re:.*{name}.*" for name in names]
    ),
    "save.dtype": moot("LoRA files have the precision of lora_dtype"),
    "save.save_every": same("checkpoint_step_interval"),
    "save.max_step_saves_to_keep": same("checkpoints_total_limit"),
    "save.push_to_hub": same("push_to_hub", convert=switched),
    "save.hf_repo_id": same("hub_model_id"),
    "save.hf_private": same("hub_private", convert=switched),
    "save.save_format": moot("always the formats of lora_format"),
    "train.batch_size": same("train_batch_size"),
    "train.steps": same("max_train_steps"),
    "train.gradient_accumulation": same("gradient_accumulation_steps"),
    "train.gradient_accumulation_steps": same("gradient_accumulation_steps"),
    "train.train_unet": moot("always"),
    "train.train_text_encoder": moot("text encoders are not trained"),
    "train.gradient_checkpointing": same("gradient_checkpointing", convert=switched),
    "train.noise_scheduler": moot("always flow matching"),
    "train.timestep_type": joint("flow_use_uniform_schedule, flow_schedule_shift"),
    "train.content_or_style": moot("levels follow timestep_type alone; a higher flow_schedule_shift is rather content"),
    "train.optimizer": same("optimizer", values=shared.OPTIMIZERS),
    "train.optimizer_params": same("optimizer_config"),
    "train.lr": same("learning_rate", "per optimizer step in both"),
    "train.unet_lr": joint("learning_rate"),
    "train.lr_scheduler": same("lr_scheduler", values=shared.SCHEDULERS),
    "train.dtype": same("mixed_precision", values={"bf16": "bf16", "fp32": "no"}),
    "train.max_grad_norm": same("max_grad_norm"),
    "train.ema_config.use_ema": same("use_ema", convert=switched),
    "train.ema_config.ema_decay": same("ema_decay", "raw weights and average are both saved here, the average there"),
    "train.skip_first_sample": same("disable_benchmark", convert=switched),
    "train.disable_sampling": joint("user_prompt_library"),
    "train.force_first_sample": moot("the base is rendered first unless disable_benchmark says otherwise"),
    "train.linear_timesteps": joint("flow_use_uniform_schedule"),
    "train.switch_boundary_every": same("wan_expert_switch_steps"),
    "train.unload_text_encoder": moot("trains without captions there; captions are always encoded here"),
    "train.cache_text_embeddings": moot(DONE),
    "train.bypass_guidance_embedding": moot("Wan has no guidance embedding"),
    "train.loss_type": same("loss_type", values={"mse": "l2", "l2": "l2"}),
    "train.xformers": joint("attention_mechanism"),
    "train.sdp": moot("PyTorch's attention is what is used by itself"),
    "train.do_differential_guidance": moot("differential guidance is not offered"),
    "train.diff_output_preservation": joint("is_regularisation_data", "a dataset of its own holds to the base here"),
    "model.name_or_path": joint("pretrained_model_name_or_path"),
    "model.arch": joint("model_flavour"),
    "model.quantize": joint("base_model_precision"),
    "model.qtype": joint("base_model_precision", "an accuracy recovery adapter behind `|` has no counterpart"),
    "model.quantize_te": joint("text_encoder_1_precision"),
    "model.qtype_te": joint("text_encoder_1_precision"),
    "model.low_vram": joint("quantize_via", "weights are quantised one by one as they are read in either case"),
    "model.layer_offloading": joint("enable_group_offload"),
    "model.layer_offloading_transformer_percent": joint("group_offload_resident_blocks"),
    "model.layer_offloading_text_encoder_percent": joint("text_encoder_offload"),
    "model.model_kwargs.train_high_noise": joint("model_flavour"),
    "model.model_kwargs.train_low_noise": joint("model_flavour"),
    "model.assistant_lora_path": moot("assistant adapters are not offered"),
    "sample.sampler": moot("validation_noise_scheduler chooses the sampler; flow matching always"),
    "sample.sample_every": same("validation_step_interval"),
    "sample.width": joint("validation_resolution"),
    "sample.height": joint("validation_resolution"),
    "sample.num_frames": same("validation_num_video_frames"),
    "sample.fps": moot("clips have the model's own rate"),
    "sample.prompts": joint("user_prompt_library"),
    "sample.samples": joint("user_prompt_library"),
    "sample.neg": same("validation_negative_prompt"),
    "sample.seed": same("validation_seed"),
    "sample.walk_seed": joint("user_prompt_library", "each prompt has the next seed"),
    "sample.guidance_scale": same("validation_guidance"),
    "sample.sample_steps": same("validation_num_inference_steps"),
    "logging.log_every": same("logging_steps"),
    "logging.use_wandb": joint("report_to"),
    "logging.project_name": same("tracker_project_name"),
    "logging.run_name": same("tracker_run_name"),
    "logging.verbose": moot("the log is as long as it is"),
}
DATA: dict[str, Rule] = {
    "folder_path": joint("instance_data_dir"),
    "dataset_path": joint("instance_data_dir"),
    "caption_ext": joint("caption_strategy", shared.LINES),
    "default_caption": joint("caption_strategy, instance_prompt"),
    "caption_dropout_rate": same("caption_dropout_probability"),
    "shuffle_tokens": joint("caption_shuffle", "in every step there; alternatives that are encoded up front here"),
    "resolution": joint("resolution", "an entry for each, as there"),
    "num_frames": joint("video.num_frames, dataset_type"),
    "fps": joint("video.fps", "counts there with shrink_video_to_frames: false alone"),
    "shrink_video_to_frames": joint("video.cut", SPREAD),
    "num_repeats": joint("repeats", "passes there (1 is once), extra passes here (0 is once)"),
    "is_reg": same(
        "is_regularisation_data",
        "there the loss of these is weighed; here the base's prediction is the target",
        convert=switched,
    ),
    "mask_path": joint("conditioning_data"),
    "mask_min_value": moot("a mask counts as much as it is bright"),
    "do_i2v": moot("an image-to-video flavour always takes the first frame; wan_condition for the 5B model"),
    "cache_latents": moot(DONE),
    "cache_latents_to_disk": moot(DONE),
    "cache_text_embeddings": moot(DONE),
    "network_weight": moot("the strength of the LoRA is 1 for all datasets"),
    "random_crop": joint("crop_style"),
    "control_path": moot("control pictures are not offered"),
    "flip_x": moot(AUGMENT),
    "flip_y": moot(AUGMENT),
    "augments": moot(AUGMENT),
    "controls": moot("control pictures are not offered"),
    "trigger_word": joint("caption_prepend"),
    "buckets": moot("buckets are always made"),
    "num_workers": moot("a choice of the data loader, made by itself"),
    "prefetch_factor": moot("a choice of the data loader, made by itself"),
}


def translate(files: list[Read]) -> Draft:
    """The config for a training job. Raises ConfigError for another job, several processes or another model."""
    if len(files) != 1:
        raise ConfigError(f"a job of {TOOL} is one file", where=", ".join(str(file.path) for file in files))
    config, where = files[0].data["config"], files[0].path
    processes = config["process"]
    if not isinstance(processes, list) or len(processes) != 1 or not isinstance(processes[0], Mapping):
        raise ConfigError("a job with one process is needed", where=f"{where}, config.process")
    process = dict(processes[0])
    datasets = process.pop("datasets", [])
    sample = dict(process.get("sample") or {})
    params = (process.get("train") or {}).get("optimizer_params")
    given = {"name": config.get("name", where.stem), **flat(process)}
    for key in [key for key in given if key.startswith("train.optimizer_params.")]:
        del given[key]
    if params:
        given["train.optimizer_params"] = params
    draft = Draft(TOOL)
    draft.settings |= {"model_family": "wan", "model_type": "lora"}
    draft.apply({key: value for key, value in config.items() if key not in ("process", "name")}, {})
    draft.apply(given, TABLE)
    _model(draft, given, where)
    _adapter(draft, given)
    _training(draft, given)
    for number, own in enumerate(datasets):
        _dataset(draft, own, f"datasets[{number}].", given.get("trigger_word"))
    draft.entries.append(shared.text_embeds())
    _samples(draft, given, sample)
    shared.cleared(draft.settings)
    return draft


def _model(draft: Draft, given: Mapping[str, Any], where: Any) -> None:
    arch, path = str(given.get("model.arch", "")), str(given.get("model.name_or_path", ""))
    arch, _, way = arch.partition(":")
    if arch not in ARCHES:
        raise ConfigError(
            f"the model {arch or path!r} has no counterpart", where=f"{where}, model.arch", allowed=sorted(ARCHES)
        )
    draft.put("model.arch", given.get("model.arch"), "", model_flavour=_flavour(f"{arch}{way}", path, given))
    name = path.lower()
    if path:
        own = name.startswith(("wan-ai/", "/", "./")) or not name.startswith("ai-toolkit/")
        if own:
            draft.put("model.name_or_path", path, "in the diffusers layout", pretrained_model_name_or_path=path)
        else:
            draft.none("model.name_or_path", path, "a copy of the official weights; these are used")
    if switched(given.get("model.quantize", False)):
        kind = str(given.get("model.qtype", "qfloat8")).partition("|")[0]
        if kind in PRECISIONS:
            draft.settings["base_model_precision"] = PRECISIONS[kind]
        else:
            draft.none("model.qtype", kind, f"no counterpart; known are {', '.join(PRECISIONS)}")
    if switched(given.get("model.quantize_te", False)):
        kind = str(given.get("model.qtype_te", "qfloat8"))
        draft.settings["text_encoder_1_precision"] = PRECISIONS.get(kind, "fp8-quanto")
    if switched(given.get("model.layer_offloading", False)):
        blocks = next((n for size, n in shared.BLOCKS.items() if f"-{size}" in draft.settings["model_flavour"]), 0)
        share = float(given.get("model.layer_offloading_transformer_percent", 1.0))
        shared.offload(draft, "model.layer_offloading_transformer_percent", round(blocks * share))


def _flavour(arch: str, path: str, given: Mapping[str, Any]) -> str:
    if arch == "wan22_5b":
        return "ti2v-5b-2.2"
    if arch.startswith("wan22"):
        kind = "i2v" if "i2v" in arch else "t2v"
        high, low = (switched(given.get(f"model.model_kwargs.train_{part}_noise", True)) for part in ("high", "low"))
        return f"{kind}-14b-2.2-{'both' if high and low else 'high' if high else 'low'}"
    name = PurePath(path).name.lower()
    if "i2v" in arch or "i2v" in name:
        return "i2v-14b-2.1-720p" if "720p" in name else "i2v-14b-2.1"
    return "t2v-480p-14b-2.1" if "14b" in name else "t2v-480p-1.3b-2.1"


def _adapter(draft: Draft, given: Mapping[str, Any]) -> None:
    kind = given.get("network.type")
    rank = int(given.get("network.rank", given.get("network.linear", 4)))
    if kind is None:
        draft.put("network", None, "no adapter: the network itself is trained", model_type="full")
    elif str(kind).lower() in ("lora", "dora"):
        draft.put("network.linear", rank, "", lora_rank=rank)
        alpha = given.get("network.linear_alpha", given.get("network.alpha"))
        draft.put(
            "network.linear_alpha",
            alpha,
            "ignored there for LoRA of a transformer: its scale is 1",
            lora_alpha=float(rank),
        )
        draft.settings.setdefault("lora_target_modules", ["all-linear"])
        if str(kind).lower() == "dora":
            draft.settings |= {"use_dora": True, "lora_format": "diffusers"}
    elif str(kind).lower() == "lokr":
        full = switched(given.get("network.lokr_full_rank", True))
        factor = int(given.get("network.lokr_factor", -1))
        draft.settings |= {"lora_rank": 10000 if full else rank}
        draft.settings["lora_alpha"] = 1.0 if full else float(given.get("network.linear_alpha", 1))
        shared.lycoris(draft, "network.type, network.linear", kind, {"algo": "lokr", "factor": factor})
    else:
        draft.none("network.type", kind, "no counterpart: a LoRA is trained")
        draft.settings |= {"lora_rank": rank, "lora_alpha": float(rank)}


def _training(draft: Draft, given: Mapping[str, Any]) -> None:
    folder, name = given.get("training_folder", "output"), given["name"]
    draft.settings["output_dir"] = str(PurePath(str(folder)) / str(name))
    if "train.unet_lr" in given:
        draft.settings["learning_rate"] = given["train.unet_lr"]
    for theirs, ours, value in (
        ("train.steps", "max_train_steps", 1000),
        ("train.lr", "learning_rate", 1e-6),
        ("train.lr_scheduler", "lr_scheduler", "constant"),
    ):
        if ours not in draft.settings:
            draft.default(theirs, value, **{ours: value})
    shared.optimizer(draft, "train.optimizer_params")
    way = str(given.get("train.timestep_type", "sigmoid"))
    if switched(given.get("train.linear_timesteps", False)):
        way = "linear"
    if way in LEVELS:
        levels, why = LEVELS[way]
        shift = 5.0 if "2.2" in str(draft.settings["model_flavour"]) else 3.0
        found = {**levels, "flow_schedule_shift": shift} if way == "shift" else levels
        draft.put("train.timestep_type", way, why, **found)
    else:
        draft.none("train.timestep_type", way, f"no counterpart; known are {', '.join(LEVELS)}. Ours is logit-normal")
    if switched(given.get("logging.use_wandb", False)):
        draft.settings["report_to"] = "wandb"
    if switched(given.get("train.xformers", False)):
        draft.settings["attention_mechanism"] = "xformers"


def _dataset(draft: Draft, given: Mapping[str, Any], where: str, trigger: Any) -> None:
    """One entry for each resolution."""
    base: dict[str, Any] = {}
    draft.apply(given, DATA, where, base)
    folder, frames = given.get("folder_path", given.get("dataset_path")), int(given.get("num_frames", 1))
    if not folder:
        raise ConfigError(f"the dataset {where[:-1]} names no folder_path")
    base |= {"dataset_type": "video" if frames > 1 else "image", "instance_data_dir": str(folder)}
    if frames > 1:
        base["video"] = {"num_frames": (frames - 1) // 4 * 4 + 1}
        if not switched(given.get("shrink_video_to_frames", True)):
            base["video"] |= {"fps": given.get("fps", 16), "cut": "random"}
        else:
            draft.none(f"{where}shrink_video_to_frames", True, SPREAD)
    base["repeats"] = shared.repeats(given.get("num_repeats", 1))
    if (suffix := str(given.get("caption_ext", "txt")).lstrip(".")) != "txt":
        draft.none(f"{where}caption_ext", suffix, "captions are read from .txt files: rename them")
    if word := given.get("trigger_word", trigger):
        base["caption_prepend"] = f"{word},"
    if switched(given.get("shuffle_tokens", False)):
        base["caption_shuffle"] = {"enable": True, "count": 4}
    if switched(given.get("random_crop", False)):
        base |= {"crop": True, "crop_aspect": "preserve", "crop_style": "random"}
    if given.get("default_caption"):
        draft.none(
            f"{where}default_caption", given["default_caption"], "for files without one there: write these files"
        )
    sizes = given.get("resolution", 512)
    sizes = sizes if isinstance(sizes, list) else [sizes]
    for size in sizes:
        behind = f"-{size}" if len(sizes) > 1 else ""
        entry = {"id": shared.identity(folder, draft.entries, behind), **base}
        entry |= {"resolution": shared.square(size), "resolution_type": "pixel_area"}
        draft.entries.append(entry)
        if given.get("mask_path"):
            draft.entries.append(shared.mask(draft, entry, given["mask_path"]))


def _samples(draft: Draft, given: Mapping[str, Any], sample: Mapping[str, Any]) -> None:
    width, height = sample.get("width"), sample.get("height")
    if width and height:
        draft.settings["validation_resolution"] = f"{width}x{height}"
    if switched(given.get("train.disable_sampling", False)):
        draft.none("train.disable_sampling", True, "no prompt is written")
        return
    prompts = [*(sample.get("prompts") or []), *(sample.get("samples") or [])]
    seed, walk = int(sample.get("seed", 0)), switched(sample.get("walk_seed", False))
    for number, each in enumerate(prompts):
        own = dict(each) if isinstance(each, Mapping) else {"prompt": each}
        text = str(own.pop("prompt", "")).replace("[trigger]", str(given.get("trigger_word") or "[trigger]"))
        entry: dict[str, Any] = {"prompt": text}
        if walk:
            entry["seed"] = seed + number
        if own.get("width") and own.get("height"):
            entry["resolution"] = f"{own.pop('width')}x{own.pop('height')}"
        renamed = {
            "neg": "negative_prompt",
            "seed": "seed",
            "guidance_scale": "guidance",
            "sample_steps": "num_inference_steps",
            "num_frames": "num_video_frames",
        }
        for key, value in own.items():
            if key in renamed:
                entry[renamed[key]] = value
            else:
                draft.none(f"sample.samples[{number}].{key}", value, "no counterpart; pictures: validation_images")
        draft.prompts[f"prompt_{number + 1}"] = entry if len(entry) > 1 else text
