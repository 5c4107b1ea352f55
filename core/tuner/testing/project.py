"""The flat config of a small project, for tests of whole runs: model, clips, cache and output lie in one folder.

``tuner.testing.toy`` and a family's own ``build_tiny`` make the model, ``tuner.testing.clips`` the clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEXT: Mapping[str, Any] = {"id": "text", "dataset_type": "text_embeds", "default": True}
"""The entry that says where captions' embeddings are cached."""


def video_entry(clips: Path, *, resolution: int = 64, frames: int = 9, **values: Any) -> dict[str, Any]:
    """A dataset of the clips in the folder ``clips``, captioned by their names.

    Arguments
        resolution: the shorter edge, in pixels.
        frames: taken of each clip.
        values: more keys of the entry, or others in the place of these.
    """
    return {
        "id": clips.name,
        "dataset_type": "video",
        "instance_data_dir": str(clips),
        "caption_strategy": "filename",
        "resolution": resolution,
        "resolution_type": "pixel",
        "video": {"num_frames": frames},
        **values,
    }


def flat_config(folder: Path, *entries: Mapping[str, Any], family: str = "toy", **keys: Any) -> dict[str, Any]:
    """A config over ``folder/model`` that writes to ``folder/output`` and caches in ``folder/cache``.

    Arguments
        entries: datasets; without any, the clips in ``folder/clips``.
        family: ``model_family``.
        keys: more keys, or others in the place of these.
    """
    return {
        "model_family": family,
        "pretrained_model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / "output"),
        "cache_dir": str(folder / "cache"),
        "mixed_precision": "no",
        "max_train_steps": 4,
        "lora_rank": 4,
        "data_backend_config": [*(entries or [video_entry(folder / "clips")]), dict(TEXT)],
        **keys,
    }
