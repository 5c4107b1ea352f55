"""SimpleTuner: most of its keys are ours; what is not is taken out and said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.cli.importing import shared
from tuner.cli.importing.draft import HIDDEN, SECRET, Draft, Row, Rule, is_secret, joint, moot, same
from tuner.cli.importing.read import Read, read
from tuner.config.load import bare_name
from tuner.errors import ConfigError

TOOL = "simpletuner"
MADE = "made by itself here"
PIXELS = "of pictures alone"

TABLE: dict[str, Rule] = {
    "data_backend_config": joint(
        "data_backend_config", "a copy is written, without the entries and keys that are not ours"
    ),
    "user_prompt_library": joint("user_prompt_library", "a copy is written"),
    "lycoris_config": joint("lycoris_config", "the same file"),
    "model_family": joint("model_family", "wan, and what other plugins bring"),
    "resume_from_checkpoint": moot("checkpoints of another tool cannot be resumed; init_lora starts from a LoRA file"),
    "aspect_bucket_rounding": same("aspect_bucket_rounding", convert=int),
    "num_validation_images": moot("a clip for each prompt"),
    "validation_using_datasets": moot("see validation_images"),
    "validation_torch_compile": moot("dynamo_backend compiles for training and validation"),
    "validation_disable_unconditional": joint("validation_prompt"),
    "metadata_update_interval": moot(MADE),
    "aspect_bucket_worker_count": same("probe_processes"),
    "dataloader_prefetch": moot(MADE),
    "dataloader_prefetch_qlen": moot(MADE),
    "max_workers": moot(MADE),
    "read_batch_size": moot(MADE),
    "image_processing_batch_size": moot(MADE),
    "preserve_data_backend_cache": moot("a cache is never removed"),
    "skip_file_discovery": moot("an unchanged folder is looked through without opening a file"),
    "vae_cache_ondemand": moot("everything is encoded before training"),
    "vae_cache_disable": moot("everything is encoded before training"),
    "num_workers": moot(MADE),
    "num_processes": moot("processes are given to the launcher: tuner launch"),
    "num_machines": moot("processes are given to the launcher: tuner launch"),
    "training_num_processes": moot("processes are given to the launcher: tuner launch"),
    "training_num_machines": moot("processes are given to the launcher: tuner launch"),
    "training_dynamo_backend": same("dynamo_backend", convert=lambda name: str(name).lower()),
    "allow_tf32": moot("matrices are bf16; float32 stays exact"),
    "disable_tf32": moot("float32 stays exact"),
    "weight_dtype": moot("see base_model_default_dtype"),
    "flux_schedule_shift": same("flow_schedule_shift"),
    "flux_schedule_auto_shift": same("flow_schedule_auto_shift"),
    "prediction_type": moot("always flow matching"),
    "snr_gamma": moot("for noise prediction; flow matching has loss_weighting"),
    "offset_noise": moot("for noise prediction"),
    "noise_offset": moot("for noise prediction"),
    "input_perturbation": moot("the noisy input is not perturbed further"),
    "min_snr_gamma": moot("for noise prediction; flow matching has loss_weighting"),
    "lora_initialisation_style": same("lora_init_type"),
    "adam_beta1": joint("optimizer_config"),
    "adam_beta2": joint("optimizer_config"),
    "adam_epsilon": joint("optimizer_config"),
    "adam_weight_decay": joint("optimizer_config"),
    "optimizer_beta1": joint("optimizer_config"),
    "optimizer_beta2": joint("optimizer_config"),
    "optimizer_release_gradients": same("gradient_release"),
    "i_know_what_i_am_doing": moot("nothing needs it"),
    "override_dataset_config": moot("a changed dataset is encoded anew where it changed"),
    "disable_multi_gpu": moot("processes are given to the launcher: tuner launch"),
    "accelerate_extra_args": moot("processes are given to the launcher: tuner launch"),
    "push_to_hub_background": moot("always"),
    "model_card_note": moot(MADE),
    "crop": moot("a key of each dataset"),
    "caption_strategy": moot("a key of each dataset"),
    "instance_prompt": moot("a key of each dataset"),
    "instance_data_dir": moot("a key of each dataset"),
    "vae_dtype": moot("the VAE has its own precision"),
    "text_encoder_3_precision": moot("there is one text encoder"),
    "text_encoder_4_precision": moot("there is one text encoder"),
}
"""What differs. Every key that `docs/config.md` lists goes by its own name."""
DATA: dict[str, Rule] = {
    "dataset_type": moot("entries of this type have no counterpart: left out"),
    "parquet": moot('`"type": "parquet", "manifest": "<the table>"`: see docs/sources.md'),
    "vae_cache_clear_each_epoch": joint("variants"),
    "conditioning": moot("conditioning that is made by a generator is not offered"),
    "hash_filenames": moot("cache files are always named by content"),
    "preserve_data_backend_cache": moot("a cache is never removed"),
    "write_batch_size": moot("see the core key"),
    "audio": moot("clips are trained without sound"),
    "video.is_i2v": moot("the flavour says whether a first frame is given"),
}
ADAM = {
    "adam_beta1": ("betas", 0),
    "adam_beta2": ("betas", 1),
    "optimizer_beta1": ("betas", 0),
    "optimizer_beta2": ("betas", 1),
    "adam_epsilon": ("eps", None),
    "adam_weight_decay": ("weight_decay", None),
}


def translate(files: list[Read]) -> Draft:
    """The config, the list of datasets and the prompts, of the files and of those they name. Raises ConfigError."""
    draft = Draft(TOOL)
    given: dict[str, Any] = {}
    data = next((file for file in files if isinstance(file.data, list)), None)
    library = next((file for file in files if _prompts(file)), None)
    for file in files:
        if isinstance(file.data, Mapping) and "algo" in file.data:
            given["lycoris_config"] = str(file.path)
        elif isinstance(file.data, Mapping) and file is not library:
            for key, value in file.data.items():
                name = bare_name(str(key))
                given[name.lower() if file.kind == "environment" else name] = value
    folder = files[0].path.parent
    if given:
        _config(draft, given)
        data = data or _named(given.get("data_backend_config"), folder)
        library = library or _named(given.get("user_prompt_library"), folder)
    if isinstance(given.get("data_backend_config"), list):
        draft.entries = [dict(each) for each in given["data_backend_config"]]
    if data is not None:
        _entries(draft, data)
    if library is not None:
        draft.prompts = dict(library.data)
    shared.cleared(draft.settings)
    return draft


def _prompts(file: Read) -> bool:
    """Whether a file is a prompt library: texts, or objects with a prompt."""
    data = file.data
    if file.kind != "data" or not isinstance(data, Mapping) or not data or "model_family" in data:
        return False
    return all(isinstance(each, str) or (isinstance(each, Mapping) and "prompt" in each) for each in data.values())


def _named(named: Any, folder: Path) -> Read | None:
    """The file that the config names, as it stands or beside the config; None where there is none."""
    if not isinstance(named, str):
        return None
    places = (Path(named), folder / named, folder / Path(named).name)
    near = next((place for place in places if place.is_file()), None)
    if near is None:
        raise ConfigError(
            "the config names a file that is not there", where=named, remedy="name it too: tuner import FILE FILE"
        )
    return read(near)


def _config(draft: Draft, given: Mapping[str, Any]) -> None:
    """Our own keys as they are; the table's by it."""
    from tuner.config.owners import KeyIndex
    from tuner.selection import Catalog, Wanted

    catalog = Catalog()
    index = KeyIndex(catalog, Wanted.read({}).certain(catalog))
    for key, value in given.items():
        place = index.find(key)
        if key in TABLE or is_secret(key) or place is None:
            draft.apply({key: value}, TABLE)
        else:
            draft.settings[place.key] = value
            draft.rows.append(Row(key, value, place.key, "" if place.key == key else "another name for it"))
    for key in ("model_family", "lycoris_config"):
        if given.get(key):
            draft.settings[key] = given[key]
    found: dict[str, Any] = {}
    for key, (name, number) in ADAM.items():
        if key in given and number is None:
            found[name] = float(given[key])
        elif key in given:
            found.setdefault(name, [0.9, 0.999])[number] = float(given[key])
    if found:
        config = draft.settings.get("optimizer_config")
        draft.settings["optimizer_config"] = {**(config if isinstance(config, Mapping) else {}), **found}


def _entries(draft: Draft, data: Read) -> None:
    """Entries of kinds that are ours, with keys that are ours."""
    from tuner.builtin.datasets.entries import KINDS
    from tuner.config.describe import facts

    for number, given in enumerate(data.data):
        kind, where = str(given.get("dataset_type", "image")), f"{data.path.name}[{number}]."
        if kind not in KINDS:
            draft.none(f"{where}dataset_type", kind, "entries of this type have no counterpart: left out")
            continue
        fields = KINDS[kind].model_fields
        known = set(fields) | {alias for info in fields.values() for alias in facts(info).aliases}
        local = str(given.get("type", "local")) == "local"
        entry: dict[str, Any] = {}
        for key, value in given.items():
            if local and is_secret(key):
                draft.rows.append(Row(where + key, HIDDEN, "", SECRET))
            elif key == "video" and isinstance(value, Mapping):
                entry[key] = {name: each for name, each in value.items() if name != "is_i2v"}
                draft.apply({f"video.{name}": each for name, each in value.items() if name == "is_i2v"}, DATA, where)
            elif key in known or not local:
                entry[key] = value
            else:
                draft.apply({key: value}, DATA, where)
        draft.entries.append(entry)
