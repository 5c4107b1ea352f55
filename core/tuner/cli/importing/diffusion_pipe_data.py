"""diffusion-pipe's dataset TOML: directories, each at several areas and lengths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.cli.importing import shared
from tuner.cli.importing.draft import Draft, Rule, joint, moot, switched
from tuner.cli.importing.read import Read
from tuner.errors import ConfigError

CUTS = {"single_beginning": "beginning", "single_middle": "middle", "multiple_overlapping": "uniform"}
ASPECTS = "every source keeps its own aspect, in steps that the model needs, and is cut less"

TABLE: dict[str, Rule] = {
    "resolutions": joint("resolution", "a square's side, or a pair: the area counts in both; an entry for each"),
    "enable_ar_bucket": joint("crop", "false there cuts everything to one size, which is crop here"),
    "min_ar": joint("minimum_aspect_ratio", ASPECTS),
    "max_ar": joint("maximum_aspect_ratio", ASPECTS),
    "num_ar_buckets": moot(ASPECTS),
    "ar_buckets": joint("crop_aspect_buckets", "the closest of them, by cutting, in both"),
    "frame_buckets": joint("video.frame_buckets", "the longest that a clip fills, in both; 1 is for pictures"),
    "size_buckets": moot("sizes follow from resolution and aspect"),
    "path": joint("instance_data_dir"),
    "mask_path": joint("conditioning_data", "every file needs a mask here"),
    "num_repeats": joint("repeats", "passes there (1 is once), extra passes here (0 is once)"),
    "caption_prefix": joint("caption_prepend"),
    "shuffle_tags": joint("caption_shuffle"),
    "cache_shuffle_num": joint("caption_shuffle"),
    "cache_shuffle_delimiter": joint("caption_shuffle"),
    "skip_empty_caption": moot("a file without a caption is an error that names it"),
    "control_path": moot("control pictures are not offered"),
    "default_caption": moot("for files without one there: write these files"),
}


def translate(draft: Draft, data: Read, main: Mapping[str, Any]) -> None:
    """An entry for each directory, area and kind of file. Raises ConfigError."""
    general = {key: value for key, value in data.data.items() if key != "directory"}
    draft.apply(general, TABLE, "dataset.")
    for number, own in enumerate(data.data["directory"]):
        draft.apply(own, TABLE, f"directory[{number}].")
        if "path" not in own:
            raise ConfigError(f"directory {number} has no path", where=data.path)
        _directory(draft, {**general, **own}, main, f"directory[{number}].")
    draft.entries.append(shared.text_embeds())


def _directory(draft: Draft, given: Mapping[str, Any], main: Mapping[str, Any], where: str) -> None:
    base: dict[str, Any] = {"instance_data_dir": str(given["path"])}
    base["repeats"] = shared.repeats(given.get("num_repeats", 1))
    base |= _captions(given)
    if given.get("ar_buckets"):
        aspects = [each[0] / each[1] if isinstance(each, list) else each for each in given["ar_buckets"]]
        base |= {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [round(each, 4) for each in aspects]}
    elif not switched(given.get("enable_ar_bucket", False)):
        base["crop"] = True
    else:
        base |= {
            ours: given[key]
            for key, ours in (("min_ar", "minimum_aspect_ratio"), ("max_ar", "maximum_aspect_ratio"))
            if key in given
        }
        if {"min_ar", "max_ar"} & given.keys():
            draft.none(
                f"{where}min_ar, {where}max_ar",
                [given.get("min_ar"), given.get("max_ar")],
                "files beyond these are cut to fit there, and left out here",
            )
    lengths = sorted({(int(frames) - 1) // 4 * 4 + 1 for frames in given.get("frame_buckets", [1])})
    kinds: list[tuple[str, dict[str, Any]]] = []
    if 1 in lengths:
        kinds.append(("image", {}))
    if clips := [length for length in lengths if length > 1]:
        mode = str(main.get("video_clip_mode", "single_beginning"))
        if mode not in CUTS:
            draft.none("video_clip_mode", mode, "no counterpart: the first frames are taken")
        kinds.append(("video", {"video": {"frame_buckets": clips, "cut": CUTS.get(mode, "beginning")}}))
    kinds = _present(Path(str(given["path"])), kinds)
    if len(kinds) > 1:
        draft.none(
            f"{where}path", given["path"], "an entry for pictures and one for clips: take out the one that has none"
        )
    sizes = given.get("resolutions", [512])
    for kind, own in kinds:
        for size in sizes:
            edge = shared.square(size)
            behind = (f"-{edge:g}" if len(sizes) > 1 else "") + (f"-{kind}s" if len(kinds) > 1 else "")
            entry = {"id": shared.identity(given["path"], draft.entries, behind), "dataset_type": kind, **base, **own}
            entry |= {"resolution": edge, "resolution_type": "pixel_area"}
            if isinstance(size, list) and base == base | {"crop": True} and "crop_aspect" not in base:
                entry |= {"crop_aspect": "closest", "crop_aspect_buckets": [round(size[0] / size[1], 4)]}
            draft.entries.append(entry)
            if given.get("mask_path"):
                draft.entries.append(shared.mask(draft, entry, given["mask_path"]))


def _present(folder: Path, kinds: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Those kinds that the folder has files of; all where it is not on this machine."""
    if not folder.is_dir():
        return kinds
    from tuner.builtin.datasets.scanning import PICTURE_SUFFIXES, VIDEO_SUFFIXES

    suffixes = {path.suffix.lower() for path in folder.rglob("*") if path.is_file()}
    there = {"image": bool(suffixes & PICTURE_SUFFIXES), "video": bool(suffixes & VIDEO_SUFFIXES)}
    return [kind for kind in kinds if there[kind[0]]] or kinds


def _captions(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if given.get("caption_prefix"):
        found["caption_prepend"] = str(given["caption_prefix"]).strip()
    count = int(given.get("cache_shuffle_num", 0))
    if count or switched(given.get("shuffle_tags", False)):
        delimiter = str(given.get("cache_shuffle_delimiter", ", ")).strip()
        split = {",": "comma", "": "space", ".": "period"}.get(delimiter, "comma")
        found["caption_shuffle"] = {"enable": True, "count": max(1, count), "split_on": split}
    return found
