"""From predicted latents to a file that people look at; what fails here is said, and rendering goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from tuner.validate.results import PREVIEWS, Preview
from tuner_preview.pictures import COLUMNS, Shown, evenly, write_moving, write_sheet
from tuner_preview.projection import Projection, fit
from tuner_preview.tiny import TinyDecoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tuner.model import Model
    from tuner.run import Run
    from tuner.validate.results import SamplingStep
    from tuner_preview.layout import Layout

EDGE = 320
"""Pixels of a preview's longer edge."""
FRAMES = 24
"""Frames of a preview at most."""
SHEET = "sheet.webp"


class Maker:
    """Makes the previews of a run, on its main process."""

    def __init__(self, file: Path | None, layout: Layout | None) -> None:
        """``file``, of that ``layout``: the tiny autoencoder; None is the projection."""
        self._file, self._layout = file, layout
        self._decoder: TinyDecoder | None = None
        self._projection: Projection | None = None
        self._shown: dict[str, list[Shown]] = {}
        self._said: set[str] = set()

    def make(self, run: Run, model: Model, sampling: SamplingStep, *, last: bool) -> None:
        """Write the preview of a sampling step, with a sheet of all of its clip when it is the ``last``; tell of it."""
        try:
            preview = self._made(run, model, sampling, last)
        except Exception as error:  # also out of memory: the device has what it had before
            self._say(run, sampling, error)
            return
        if (announce := run.announcer("on_preview")) is not None:
            announce(preview=preview)

    def _say(self, run: Run, sampling: SamplingStep, error: Exception) -> None:
        """Say what failed, once for each kind of error: most fail in every step again, with other numbers in them."""
        kind = type(error).__name__
        if kind not in self._said:
            self._said.add(kind)
            reason = str(error).strip().partition("\n")[0] or kind
            where = (sampling.name, sampling.step)
            run.log.warning("preview of %r at sampling step %d failed, rendering goes on: %s", *where, reason)

    def _made(self, run: Run, model: Model, sampling: SamplingStep, last: bool) -> Preview:
        frames = self._frames(run, model, sampling.latents)
        folder = run.output_dir / "validation" / f"step-{run.step}" / PREVIEWS / sampling.name
        path = folder / f"step-{sampling.step:0{len(str(sampling.steps))}}.webp"
        pixel_frames = (sampling.latents.shape[2] - 1) * model.spec.latents.stride_time + 1
        write_moving(path, frames, pixel_frames / sampling.fps)
        # A clip whose sampling was broken off left its previews here.
        before = [each for each in self._shown.pop(sampling.name, []) if each.step < sampling.step]
        shown = [*before, Shown(sampling.step, frames[evenly(len(frames), COLUMNS)])]
        sheet = folder / SHEET if last else None
        if sheet is not None:
            write_sheet(sheet, shown)
        else:
            self._shown = {sampling.name: shown}
        return Preview(sampling.name, sampling.prompt, sampling.step, sampling.steps, path, sheet)

    def _frames(self, run: Run, model: Model, latents: Tensor) -> NDArray[np.uint8]:
        """At most :data:`FRAMES` frames (F, H, W, 3) of ``latents`` (1, C, F', h, w)."""
        clip = latents[0].transpose(0, 1).nan_to_num()
        with torch.no_grad(), torch.autocast(clip.device.type, enabled=False):
            if self._file is None:
                pixels = _sized(self._colours(run, model).colours(clip[evenly(len(clip), FRAMES)]))
            else:
                pixels = self._decoded(clip)
        scaled = (pixels * 255).round().to("cpu", torch.uint8)
        return scaled.permute(0, 2, 3, 1).contiguous().numpy()

    def _colours(self, run: Run, model: Model) -> Projection:
        """The projection, fitted when it is first needed."""
        if self._projection is None:
            assert run.cached is not None, "validation needs the cache"
            self._projection = fit(run.cached, model, run.device)
            run.log.info(
                "previews: latents are projected to colours, fitted on the run's clips, of which it explains %.0f %%",
                100 * self._projection.explained,
            )
        return self._projection

    def _decoded(self, clip: Tensor) -> Tensor:
        """Frames (F, 3, H, W) by the tiny autoencoder, which is on the device only while it decodes."""
        assert self._file is not None
        assert self._layout is not None
        dtype = torch.float32 if clip.device.type == "cpu" else torch.float16
        if self._decoder is None:
            self._decoder = TinyDecoder.read(self._file, self._layout, dtype)
        wanted = set(evenly((len(clip) - 1) * self._layout.stride_time + 1, FRAMES))
        kept, seen = [], 0
        try:
            for piece in self._decoder.to(clip.device).frames(clip.to(dtype)):
                chosen = [index - seen for index in range(seen, seen + len(piece)) if index in wanted]
                kept += [_sized(piece[chosen].float())] if chosen else []
                seen += len(piece)
        finally:
            self._decoder.to("cpu")
        return torch.cat(kept)


def _sized(frames: Tensor) -> Tensor:
    """``frames`` (F, 3, H, W) with a longer edge of :data:`EDGE` pixels."""
    height, width = frames.shape[-2:]
    scale = EDGE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if scale < 1:
        return functional.interpolate(frames, size, mode="area")
    return functional.interpolate(frames, size, mode="bilinear", align_corners=False)
