"""The model card: what was trained, on which base, with which settings, how to use it, what it renders.

It names no folder, no dataset and no caption of the machine it was trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.builtin.hub.upload import MARK, PLACEHOLDER

if TYPE_CHECKING:
    from tuner.run import Run

SAMPLES = "samples"
"""Folder of the clips in the repository."""
MOST_CLIPS = 12
SETTINGS = (
    "model_type",
    "lora_type",
    "lora_rank",
    "lora_alpha",
    "lora_init_type",
    "use_dora",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "optimizer",
    "train_batch_size",
    "gradient_accumulation_steps",
    "mixed_precision",
    "base_model_precision",
    "flow_schedule_shift",
    "flow_schedule_auto_shift",
    "caption_dropout_probability",
    "use_ema",
    "ema_decay",
    "seed",
)
"""Keys whose values the card shows, where they are in the config."""
_STEP = re.compile(r"step-(\d+)")
_LORA = re.compile(r"(^|/)pytorch_lora_weights(\.\w+)?\.safetensors$")


@dataclass(frozen=True)
class Clip:
    """A clip of the latest validation."""

    prompt: str
    path: Path


def clips(validation: Path) -> list[Clip]:
    """The clips (or pictures) of the latest validation whose files are there, one for each prompt."""
    steps = [(int(found[1]), path) for path in validation.glob("step-*") if (found := _STEP.fullmatch(path.name))]
    for _, folder in sorted(steps, reverse=True):
        if found_here := list(_clips_in(folder)):
            return found_here[:MOST_CLIPS]
    return []


def _clips_in(folder: Path) -> Iterator[Clip]:
    try:
        record = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
        shown = [(str(each["prompt"]), [folder / str(name) for name in each["files"]]) for each in record["prompts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for prompt, files in shown:
        there = sorted((path for path in files if path.is_file()), key=lambda path: path.suffix != ".mp4")
        if there:
            yield Clip(prompt, there[0])


def text(run: Run, manifest: Mapping[str, Any], shown: Sequence[Clip], weights: Sequence[str]) -> str:
    """The card of a run.

    Arguments
        manifest: of the checkpoint it is about.
        shown: clips that lie in the repository's folder ``samples``.
        weights: paths in the repository of the files that people load.
    """
    from huggingface_hub import ModelCardData

    spec = run.spec
    assert spec is not None
    base = spec.public_base if "/" in spec.public_base else None
    kind = "image-to-video" if spec.frames_taken else "text-to-video"
    lora = any(_LORA.search(name) for name in weights)
    data = ModelCardData(
        base_model=base,
        license=spec.license or None,
        library_name="diffusers",
        pipeline_tag=kind,
        tags=[kind, spec.family, *(["lora"] if lora else []), "tuner"],
        widget=[{"text": clip.prompt, "output": {"url": f"{SAMPLES}/{clip.path.name}"}} for clip in shown] or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        MARK,
        f"# {run.output_dir.resolve().name}",
        _what(spec.public_base, spec.flavour, manifest),
        *_examples(shown),
        *_use(base, weights),
        _settings(manifest),
        _licence(spec.license, spec.public_base),
    ]
    return "\n\n".join(parts) + "\n"


def _what(base: str, flavour: str, manifest: Mapping[str, Any]) -> str:
    kind = "A full fine-tune" if manifest["config"].get("model_type") == "full" else "An adapter"
    done, total, samples = manifest["step"], manifest["total_steps"], manifest["samples"]
    return (
        f"{kind} of {base} ({flavour}), trained with `tuner` {manifest['tuner']}: step {done} of {total}, "
        f"{samples} samples, {manifest['samples_per_step']} a step."
    )


def _examples(shown: Sequence[Clip]) -> Iterator[str]:
    if not shown:
        return
    lines = ["## Examples", ""]
    for clip in shown:
        address = f"{SAMPLES}/{clip.path.name}"
        video = f'<video src="{address}" controls loop muted></video>'
        lines += [
            video if clip.path.suffix == ".mp4" else f"![]({address})",
            "",
            f"> {' '.join(clip.prompt.split())}",
            "",
        ]
    yield "\n".join(lines).rstrip()


def _use(base: str | None, weights: Sequence[str]) -> Iterator[str]:
    """How to load the weights, where their files have the name that diffusers looks for."""
    found = [name for name in weights if _LORA.search(name)]
    folder = min((name.rpartition("/")[0] for name in found), key=len, default="")  # not the averaged weights beside
    files = [name.rpartition("/")[2] for name in found if name.rpartition("/")[0] == folder]
    if not files:
        return
    below = f', subfolder="{folder}"' if folder else ""
    load = [f'pipe.load_lora_weights("{PLACEHOLDER}", weight_name="{name}"{below}{_second(name)})' for name in files]
    yield "\n".join(
        [
            "## Use",
            "",
            "In ComfyUI, put the file into `models/loras`. In diffusers:",
            "",
            "```python",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{base or "THE_BASE_MODEL"}")',
            *load,
            "```",
        ]
    )


def _second(name: str) -> str:
    """The argument that puts a file into the second of two experts."""
    return ", load_into_transformer_2=True" if "low_noise" in name or "transformer_2" in name else ""


def _settings(manifest: Mapping[str, Any]) -> str:
    config = manifest["config"]
    rows = [f"| `{name}` | {config[name]} |" for name in SETTINGS if config.get(name) not in (None, "")]
    return "\n".join(["## Settings", "", "| key | value |", "|---|---|", *rows])


def _licence(licence: str, base: str) -> str:
    told = f" ({licence})" if licence else ""
    return f"## Licence\n\nThe licence of the base model, {base}{told}, holds for what is derived from it."
