"""musubi-tuner's dataset TOML and sample prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.cli.importing import shared
from tuner.cli.importing.draft import Draft, Rule, joint, literal, moot
from tuner.cli.importing.read import Read, read
from tuner.errors import ConfigError

FULL_FRAMES = 129
"""Frames that `frame_extraction = "full"` takes at the most when `max_frames` is absent."""
CUTS = {"head": "beginning", "chunk": "uniform", "slide": "uniform", "uniform": "uniform"}
FPS = 16
SIZE = (960, 544)

TABLE: dict[str, Rule] = {
    "resolution": joint("resolution", "width and height there; the edge of a square of that area here"),
    "video_directory": joint("instance_data_dir, dataset_type"),
    "image_directory": joint("instance_data_dir, dataset_type"),
    "video_jsonl_file": joint("manifest, type"),
    "image_jsonl_file": joint("manifest, type"),
    "cache_directory": moot("the two caches are not alike: ours goes to cache_dir"),
    "caption_extension": joint("caption_strategy", shared.LINES),
    "batch_size": joint("train_batch_size", "one for the whole run here"),
    "num_repeats": joint("repeats", "passes there (1 is once), extra passes here (0 is once)"),
    "enable_bucket": joint("crop", "false there cuts everything to one size, which is crop here"),
    "bucket_no_upscale": moot("small files are enlarged; minimum_image_size leaves them out"),
    "target_frames": joint("video.num_frames", "an entry for each length: a clip is trained at all that it fills"),
    "frame_extraction": joint("video.cut"),
    "frame_stride": moot("windows are spread evenly over the clip"),
    "frame_sample": joint("video.windows"),
    "max_frames": joint("video.frame_buckets"),
    "source_fps": joint("video.fps", "frames are taken at 16 a second; the source's rate is read from the file"),
    "control_directory": moot("control videos are of Fun Control models, which are not offered"),
}


def translate(draft: Draft, given: Read | None, named: Any, folder: Path) -> None:
    """Entries for the list of datasets. ``named`` is what the arguments call the file. Raises ConfigError."""
    if given is None and named:
        path = Path(str(named))
        path = path if path.is_file() else folder / path
        if not path.is_file():
            raise ConfigError(
                "the arguments name a dataset file that is not there",
                where=named,
                remedy="name it too: tuner import FILE FILE",
            )
        given = read(path)
    if given is None:
        draft.none("dataset_config", "not given", "no list of datasets is written: tuner import SCRIPT DATASET.toml")
        return
    general, batches = dict(given.data.get("general", {})), []
    for number, own in enumerate(given.data["datasets"]):
        entry = {**general, **own}
        draft.apply(entry, TABLE, f"datasets[{number}].")
        batches.append(int(entry.get("batch_size", 1)))
        draft.entries += _entries(draft, entry, f"datasets[{number}].")
    shared.common(draft, "train_batch_size", batches, "batch_size", "a batch size is one for all")
    draft.entries.append(shared.text_embeds())


def _entries(draft: Draft, given: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    kind = "image" if any(key.startswith("image_") for key in given) else "video"
    folder, table = given.get(f"{kind}_directory"), given.get(f"{kind}_jsonl_file")
    if folder is None and table is None:
        raise ConfigError(f"the dataset {where[:-1]} has neither a folder nor a JSONL file")
    base: dict[str, Any] = {"id": "", "dataset_type": kind}
    if table is not None:
        base |= {"type": "jsonl", "manifest": str(table), "file_column": f"{kind}_path", "caption_column": "caption"}
    else:
        base["instance_data_dir"] = str(folder)
    size = given.get("resolution", SIZE)
    base |= {"resolution": shared.square(size), "resolution_type": "pixel_area"}
    if not given.get("enable_bucket", False) and not isinstance(size, int):
        base |= {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [round(size[0] / size[-1], 4)]}
    base["repeats"] = shared.repeats(given.get("num_repeats", 1))
    if (suffix := str(given.get("caption_extension", ".txt"))) != ".txt":
        draft.none(f"{where}caption_extension", suffix, "captions are read from .txt files: rename them")
    clips = [None] if kind == "image" else _clips(draft, given, where)
    found: list[dict[str, Any]] = []
    for clip in clips:
        behind = f"-{clip['num_frames']}f" if clip and "num_frames" in clip and len(clips) > 1 else ""
        name = shared.identity(folder or table, [*draft.entries, *found], behind)
        found.append({**base, "id": name} | ({"video": clip} if clip else {}))
    return found


def _clips(draft: Draft, given: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The object ``video`` of each entry: one for each length."""
    way = str(given.get("frame_extraction", "head"))
    shared_keys: dict[str, Any] = {"fps": FPS} if "source_fps" in given else {}
    if way == "full":
        longest = int(given.get("max_frames", FULL_FRAMES))
        return [{**shared_keys, "frame_buckets": list(range(5, longest + 1, 4))}]
    if way not in CUTS:
        draft.none(f"{where}frame_extraction", way, "no counterpart: the first frames are taken")
    if way == "slide":
        draft.none(f"{where}frame_extraction", way, "windows that use the whole clip; overlap is not set by a stride")
    shared_keys["cut"] = CUTS.get(way, "beginning")
    if way == "uniform":
        shared_keys["windows"] = int(given.get("frame_sample", 1))
    lengths = sorted({(int(frames) - 1) // 4 * 4 + 1 for frames in given.get("target_frames", [1])})
    return [{"num_frames": frames, **shared_keys} for frames in lengths]


FLAGS = {
    "d": ("seed", int),
    "s": ("num_inference_steps", int),
    "l": ("guidance", float),
    "f": ("num_video_frames", int),
    "n": ("negative_prompt", str),
}
WITHOUT = {
    "g": "embedded guidance: Wan has none",
    "fs": "one for all: validation_flow_shift",
    "i": "a first frame is a file named after the prompt: validation_images",
    "ei": "a last frame is a file named after the prompt: validation_images",
    "cn": "control videos are not offered",
}


def prompt(draft: Draft, name: str, line: str) -> None:
    """A line of a prompt file, with its flags as settings of its own."""
    text, *flags = re.split(r"\s--(?=\w+\s)", line)
    own: dict[str, Any] = {"prompt": text.strip()}
    size: dict[str, Any] = {}
    for flag in flags:
        letter, _, value = flag.partition(" ")
        value = value.strip()
        if letter in ("w", "h"):
            size[letter] = literal(value)
        elif letter in FLAGS:
            key, kind = FLAGS[letter]
            own[key] = kind(value)
        else:
            draft.none(f"{name}: --{letter}", value, WITHOUT.get(letter, "no counterpart"))
    if len(size) == 2:
        own["resolution"] = f"{size['w']}x{size['h']}"
    draft.prompts[name] = own if len(own) > 1 else own["prompt"]
