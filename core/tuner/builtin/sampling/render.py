"""Rendering the validation prompts: latents of all of them first, then one decoding phase, then the files.

Sampling and decoding are phases, so that the VAE is loaded once and only when it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner import __version__
from tuner.builtin.sampling.images import encoded_images, picture_name
from tuner.builtin.sampling.media import poster, write_mp4, write_png
from tuner.builtin.sampling.prompts import Prompt
from tuner.builtin.sampling.settings import Settings
from tuner.builtin.sampling.sheet import Row, write_contact_sheet
from tuner.data.progress import progress
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
    """What became of one prompt."""

    prompt: Prompt
    latents: Tensor
    """(1, C, F', h, w) on the CPU"""

    @property
    def finite(self) -> bool:
        """Whether the latents are numbers; a diverged model's are not."""
        return bool(torch.isfinite(self.latents).all())


def render(run: Run, model: Model, prompts: Sequence[Prompt], settings: Settings) -> list[Path]:
    """Render ``prompts`` into ``output_dir/validation/step-<n>/``; returns the media written, on the main process.

    With other weights than the trained ones in place, files are named for them: ``cat@ema.mp4`` beside ``cat.mp4``.
    Expects evaluation mode, no gradients, and ``run.text_cache`` (the validation stage gives all three).
    Every process samples, since a sharded network needs them all; only the main one decodes and writes.
    """
    renderings = _sample_all(run, model, prompts, settings)
    if not run.is_main:
        return []
    folder = run.output_dir / "validation" / f"step-{run.step}"
    written: list[Path] = []
    rows: list[Row] = []
    files: dict[str, list[str]] = {}
    for rendering, frames in _decode_all(run, model, renderings):
        media = _write_clip(folder, rendering.prompt.slug + _mark(run), frames, settings.fps)
        files[rendering.prompt.slug] = [path.name for path in media]
        written += media
        rows.append(Row(rendering.prompt.nickname, rendering.prompt.text, frames))
    if rows:
        sheet = folder / _marked(SHEET, run)
        title = f"step {run.step}  ·  {run.variant} weights" if run.variant else f"step {run.step}"
        write_contact_sheet(sheet, rows, title=title, subtitle=_subtitle(model, settings))
        written.append(sheet)
    _write_record(folder / _marked(RECORD, run), run, model, prompts, settings, files)
    return written


def _mark(run: Run) -> str:
    """What stands behind the name of a file that shows other weights than the trained ones."""
    return f"@{run.variant}" if run.variant else ""


def _marked(name: str, run: Run) -> str:
    """The file name ``name`` with that mark before its suffix."""
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}{_mark(run)}.{suffix}"


def _sample_all(run: Run, model: Model, prompts: Sequence[Prompt], settings: Settings) -> list[Rendering]:
    """Latents of every prompt, with one bar over all their steps."""
    assert run.text_cache is not None, "validation needs the text cache"
    encoded = run.text_cache
    negative = _on(run, encoded(settings.negative))
    renderings = []
    images = {prompt: encoded_images(run, model.spec, prompt) for prompt in prompts}
    with progress("rendering", len(prompts) * settings.steps, show=run.is_main) as advance:
        for prompt, given in images.items():
            if given is None:
                run.log.warning("validation of %r has no frame to start from: nothing is rendered", prompt.nickname)
                continue
            with _counted(advance, settings.steps) as on_step:
                watching = _watching(run, model, prompt, settings)
                request = settings.request(_on(run, encoded(prompt.text)), negative, on_step, _on(run, given), watching)
                renderings.append(Rendering(prompt, model.sample(request).detach().to("cpu", torch.float32)))
    return renderings


def _watching(run: Run, model: Model, prompt: Prompt, settings: Settings) -> Callable[[int, Tensor], None] | None:
    """What tells the plugins each step of a clip's rendering; None where none of them listens."""
    announce = run.announcer("on_sampling_step") if run.is_main else None
    if announce is None:
        return None

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


def _subtitle(model: Model, settings: Settings) -> str:
    return "  ·  ".join(
        (
            model.spec.flavour,
            f"{settings.width}x{settings.height}",
            f"{settings.frames} frames at {settings.fps:g} per second",
            f"{settings.steps} {settings.scheduler} steps",
            f"guidance {settings.guidance:g}",
            f"seed {settings.seed}",
        )
    )


def _started(run: Run, model: Model, prompt: Prompt) -> dict[str, str]:
    """The file that the clip started from, of a model that takes one."""
    name = picture_name(run, prompt) if model.spec.frames_taken else None
    return {} if name is None else {"image": name}


def _write_record(
    path: Path,
    run: Run,
    model: Model,
    prompts: Sequence[Prompt],
    settings: Settings,
    files: Mapping[str, list[str]],
) -> None:
    """Everything that is needed to render the same again."""
    record: dict[str, Any] = {
        "tuner": __version__,
        "step": run.step,
        **({"weights": run.variant} if run.variant else {}),
        "model": {
            "family": model.spec.family,
            "flavour": model.spec.flavour,
            "base": model.spec.public_base,
            "network": model.active,
        },
        "settings": settings.record(),
        "prompts": [
            {
                "nickname": prompt.nickname,
                "prompt": prompt.text,
                "files": files.get(prompt.slug, []),
                **_started(run, model, prompt),
                **({} if prompt.slug in files else {"failed": _fault(run, model, prompt)}),
            }
            for prompt in prompts
        ],
    }
    atomic_write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _fault(run: Run, model: Model, prompt: Prompt) -> str:
    """Why nothing was rendered for a prompt."""
    return "no frame to start from" if encoded_images(run, model.spec, prompt) is None else "non-finite latents"
