"""Rendering the validation prompts: latents of all of them first, then one decoding phase, then the files.

Sampling and decoding are phases, so that the VAE is loaded once and only when it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner import __version__, processes, variants
from tuner.builtin.progress import progress
from tuner.builtin.sampling.clips import Clip
from tuner.builtin.sampling.images import encoded_images, picture_name
from tuner.builtin.sampling.media import evenly, poster, read_evenly, write_mp4, write_png
from tuner.builtin.sampling.prompts import Prompt
from tuner.builtin.sampling.settings import Settings
from tuner.builtin.sampling.sheet import COLUMNS, Row, write_contact_sheet
from tuner.files import atomic_write_text
from tuner.model import Model
from tuner.validate.results import SamplingStep

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tuner.run import Run

RECORD = "validation.json"
SHEET = "contact-sheet.png"


@dataclass(frozen=True)
class Rendering:
    """What became of one clip."""

    clip: Clip
    latents: Tensor
    """(1, C, F', h, w) on the CPU"""

    @property
    def prompt(self) -> Prompt:
        """What it shows."""
        return self.clip.prompt

    @property
    def finite(self) -> bool:
        """Whether the latents are numbers; a diverged model's are not."""
        return bool(torch.isfinite(self.latents).all())


def render(run: Run, model: Model, clips: Sequence[Clip]) -> list[Path]:
    """Render ``clips`` into ``output_dir/validation/step-<n>/``; returns the media written, on the main process.

    With other weights than the trained ones in place, files are named for them: ``cat@ema.mp4`` beside ``cat.mp4``.
    Expects evaluation mode, no gradients, and ``run.text_cache`` (the validation stage gives all three).
    Processes that hold the network whole share the clips; the main one decodes and writes. The base's clips are not
    rendered again where they lie there whole.
    """
    folder = run.output_dir / "validation" / f"step-{run.step}"
    record = _record(run, model, clips)
    if run.variant == variants.BASE and processes.gather(_is_done(folder / _marked(RECORD, run), record))[0]:
        return []
    renderings = _sample_all(run, model, clips)
    if not run.is_main:
        return []
    written: list[Path] = []
    rows: list[Row] = []
    bases: list[Path] = []
    files: dict[str, list[str]] = {}
    for rendering, frames in _decode_all(run, model, renderings):
        prompt = rendering.prompt
        media = _write_clip(folder, prompt.slug + _mark(run), frames, rendering.clip.settings.fps)
        files[prompt.slug] = [path.name for path in media]
        written += media
        rows.append(Row(prompt.nickname, prompt.text, evenly(frames, COLUMNS)))
        if (before := _of_the_base(run, record, prompt)) is not None and before not in bases:
            bases.append(before)
            rows.append(Row(f"{prompt.nickname} · base model", prompt.text, read_evenly(before, COLUMNS)))
    if rows:
        sheet = folder / _marked(SHEET, run)
        title = f"step {run.step}  ·  {_called(run.variant)}" if run.variant else f"step {run.step}"
        write_contact_sheet(sheet, rows, title=title, subtitle=_subtitle(model, clips))
        written.append(sheet)
    for clip, entry in zip(clips, record["prompts"], strict=True):
        entry["files"] = files.get(clip.prompt.slug, [])
        if not entry["files"]:
            entry["failed"] = _fault(run, model, clip.prompt)
    atomic_write_text(folder / _marked(RECORD, run), json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return written


def _called(variant: str) -> str:
    return "base model" if variant == variants.BASE else f"{variant} weights"


def _mark(run: Run) -> str:
    """What stands behind the name of a file that shows other weights than the trained ones."""
    return f"@{run.variant}" if run.variant else ""


def _marked(name: str, run: Run) -> str:
    """The file name ``name`` with that mark before its suffix."""
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}{_mark(run)}.{suffix}"


def _sample_all(run: Run, model: Model, clips: Sequence[Clip]) -> list[Rendering]:
    """Latents of every clip, in their order, on the main process."""
    images = {clip: encoded_images(run, model.spec, clip.prompt) for clip in clips}
    for clip, given in images.items():
        if given is None and run.is_main:
            run.log.warning("validation of %r has no frame to start from: nothing is rendered", clip.prompt.nickname)
    possible = [clip for clip in clips if images[clip] is not None]
    if not _is_shared(run, model):
        return [Rendering(clip, latents) for clip, latents in _sampled(run, model, possible, images)]
    with processes.together():
        own = dict(_sampled(run, model, possible[run.process_index :: run.process_count], images))
    found = {clip.prompt.slug: latents for clip, latents in own.items()}
    everywhere = {slug: latents for each in processes.gather(found) for slug, latents in each.items()}
    return [Rendering(clip, everywhere[clip.prompt.slug]) for clip in possible]


def _is_shared(run: Run, model: Model) -> bool:
    """Whether each process renders some of the clips.

    All processes render all of them where a forward needs every process, and where somebody listens to the steps, which
    are told on the main process.
    """
    whole = all(each.sharding is None and each.sequence is None for each in model.networks.values())
    return run.process_count > 1 and whole and run.announcer("on_sampling_step") is None


def _sampled(
    run: Run, model: Model, clips: Sequence[Clip], images: Mapping[Clip, Mapping[str, Tensor] | None]
) -> Iterator[tuple[Clip, Tensor]]:
    """Latents (1, C, F', h, w), on the CPU, of each clip, with one bar over all their steps."""
    encoded = run.text_cache
    assert encoded is not None, "validation needs the text cache"
    with progress("rendering", sum(clip.settings.steps for clip in clips), show=run.is_main) as advance:
        for clip in clips:
            settings = clip.settings
            prompt, negative, given = (
                _on(run, each) for each in (encoded(clip.prompt.text), encoded(settings.negative), images[clip] or {})
            )
            with _counted(advance, settings.steps) as on_step, _at_strength(model, settings.strength):
                request = settings.request(prompt, negative, on_step, given, _watching(run, model, clip))
                latents = model.sample(request).detach().to("cpu", torch.float32)
            yield clip, latents


@contextmanager
def _at_strength(model: Model, strength: float) -> Iterator[None]:
    """While entered, what was trained counts as much as that."""
    with ExitStack() as stack:
        for network in model.networks.values() if strength != 1 else ():
            if network.adapter is not None and network.adapter.scaled is not None:
                stack.enter_context(network.adapter.scaled(strength))
        yield


def _watching(run: Run, model: Model, clip: Clip) -> Callable[[int, Tensor], None] | None:
    """What tells the plugins each step of a clip's rendering; None where none of them listens."""
    announce = run.announcer("on_sampling_step") if run.is_main else None
    if announce is None:
        return None
    prompt, settings = clip.prompt, clip.settings

    def predicted(step: int, latents: Tensor) -> None:
        name = prompt.slug + _mark(run)
        announce(model=model, sampling=SamplingStep(name, prompt.text, step, settings.steps, settings.fps, latents))

    return predicted


def _on(run: Run, encoding: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(run.device) for name, tensor in encoding.items()}


@contextmanager
def _counted(advance: Callable[[int], None], steps: int) -> Iterator[Callable[[int], None]]:
    """A callback for steps done; what a family did not report is counted at the end."""
    seen = 0

    def on_step(done: int) -> None:
        nonlocal seen
        advance(max(0, done - seen))
        seen = max(seen, done)

    yield on_step
    on_step(steps)


def _decode_all(
    run: Run, model: Model, renderings: Sequence[Rendering]
) -> Iterator[tuple[Rendering, NDArray[np.uint8]]]:
    """Frames (F, H, W, 3) of each rendering that is finite; the decoder is loaded once."""
    good = [rendering for rendering in renderings if rendering.finite]
    for rendering in renderings:
        if not rendering.finite:
            run.log.warning(
                "validation of %r gave non-finite latents: nothing is written for it", rendering.prompt.nickname
            )
    if not good:
        return
    with model.use(*model.spec.encoders.get("video", ())):
        for rendering in good:
            yield rendering, model.decode(rendering.latents.to(run.device)).to("cpu").numpy()


def _write_clip(folder: Path, name: str, frames: NDArray[np.uint8], fps: float) -> list[Path]:
    """The clip and its poster; of a single frame the picture alone."""
    picture, clip = folder / f"{name}.png", folder / f"{name}.mp4"
    write_png(picture, poster(frames))
    if len(frames) == 1:
        return [picture]
    write_mp4(clip, frames, fps)
    return [clip, picture]


def _subtitle(model: Model, clips: Sequence[Clip]) -> str:
    """What all clips have in common."""
    found = [clip.settings for clip in clips]
    words: list[Callable[[Settings], str]] = [
        lambda settings: f"{settings.width}x{settings.height}",
        lambda settings: f"{settings.frames} frames at {settings.fps:g} per second",
        lambda settings: f"{settings.steps} {settings.scheduler} steps",
        lambda settings: f"guidance {settings.guidance:g}",
        lambda settings: f"seed {settings.seed}",
    ]
    said = [dict.fromkeys(word(settings) for settings in found) for word in words]
    return "  ·  ".join((model.spec.flavour, *(", ".join(each) for each in said)))


def _started(run: Run, model: Model, prompt: Prompt) -> dict[str, str]:
    """The file that the clip started from, of a model that takes one."""
    name = picture_name(run, prompt) if model.spec.frames_taken else None
    return {} if name is None else {"image": name}


def _record(run: Run, model: Model, clips: Sequence[Clip]) -> dict[str, Any]:
    """Everything that is needed to render the same again; the settings of all clips, and of those that have others."""
    common = clips[0].settings.record()
    return {
        "tuner": __version__,
        "step": run.step,
        **({"weights": run.variant} if run.variant else {}),
        "model": {
            "family": model.spec.family,
            "flavour": model.spec.flavour,
            "base": model.spec.public_base,
            "network": model.active,
        },
        "settings": common,
        "prompts": [
            {
                "nickname": clip.prompt.nickname,
                "prompt": clip.prompt.text,
                "files": [],
                **_started(run, model, clip.prompt),
                **({} if (own := clip.settings.record()) == common else {"settings": own}),
            }
            for clip in clips
        ],
    }


def _is_done(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the clips of ``record`` lie beside ``path``, which says so."""
    held = _read(path)
    if held is None or {**_how(held), "prompts": None} != {**_how(record), "prompts": None}:
        return False
    same = [_how(each) for each in held["prompts"]] == [_how(each) for each in record["prompts"]]
    return same and all((path.parent / name).is_file() for each in held["prompts"] for name in each["files"])


def _how(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry as it is read from a file, without what became of it."""
    left_out = ("tuner", "files", "failed")
    plain: dict[str, Any] = json.loads(json.dumps({key: each for key, each in entry.items() if key not in left_out}))
    return plain


def _read(path: Path) -> dict[str, Any] | None:
    """A record as it was written; None where there is none that can be read."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return held if all(isinstance(each["files"], list) for each in held["prompts"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_the_base(run: Run, record: Mapping[str, Any], prompt: Prompt) -> Path | None:
    """What the base model rendered of a prompt with the same settings, if it did."""
    path = run.output_dir / "validation" / "step-0" / f"validation@{variants.BASE}.json"
    held = _read(path) if run.variant != variants.BASE else None
    now = next(each for each in record["prompts"] if each["nickname"] == prompt.nickname)
    for before in (held or {}).get("prompts", ()):
        if _shown(held, before) == _shown(record, now):
            found = next((path.parent / name for name in before["files"]), None)
            return found if found is not None and found.is_file() else None
    return None


def _shown(record: Mapping[str, Any] | None, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a clip beside the weights."""
    settings = dict(entry.get("settings") or (record or {}).get("settings") or {})
    settings.pop("strength", None)
    return _how({"prompt": entry["prompt"], "image": entry.get("image"), "settings": settings})


def _fault(run: Run, model: Model, prompt: Prompt) -> str:
    """Why nothing was rendered for a prompt."""
    return "no frame to start from" if encoded_images(run, model.spec, prompt) is None else "non-finite latents"
