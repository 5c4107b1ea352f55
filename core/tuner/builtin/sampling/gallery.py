"""Rendering the clips of ``tuner sample`` one after the other: each is whole on the disk before the next one begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tuner.builtin.progress import progress
from tuner.builtin.sampling.cells import Cell, media_paths, write_record
from tuner.builtin.sampling.images import encoded_images, sample_id
from tuner.builtin.sampling.media import poster, read_evenly, write_mp4, write_png
from tuner.builtin.sampling.sheet import COLUMNS, Row, labelled, write_contact_sheet
from tuner.errors import Stopped, TrainingError
from tuner.train.interrupt import Interrupt, watch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tuner.builtin.sampling.branches import Strength
    from tuner.builtin.sampling.prompts import Prompt
    from tuner.builtin.sampling.sample import Plan
    from tuner.model import Model, SampleRequest

SHEET, GRID = "contact-sheet.png", "grid.png"


def render(plan: Plan, model: Model, strength: Strength, todo: Sequence[Cell]) -> None:
    """Render ``todo`` into the plan's folder. Raises Stopped on SIGINT or SIGTERM, with what is whole kept."""
    steps = sum(cell.settings.steps for cell in todo)
    with watch() as interrupt, progress("rendering", steps) as advance:
        for done, cell in enumerate(todo):

            def on_step(_: int, done: int = done) -> None:
                _stop_if_asked(interrupt, done, len(todo))
                advance(1)

            write_record(plan.folder, cell, plan.record(cell))
            strength.value = 1.0 if cell.strength is None else cell.strength
            latents = model.sample(_request(plan, cell, on_step)).detach().cpu()
            if not bool(torch.isfinite(latents).all()):
                raise TrainingError(
                    f"{cell.label}: the latents are not finite",
                    remedy="try a lower strength; `tuner inspect` says whether the adapter's own numbers are finite",
                )
            frames = model.decode(latents.to(plan.run.device)).cpu().numpy()
            write_record(plan.folder, cell, plan.record(cell), _write(plan, cell, frames))
            _stop_if_asked(interrupt, done + 1, len(todo))


def _request(plan: Plan, cell: Cell, on_step: Callable[[int], None]) -> SampleRequest:
    run = plan.run
    assert run.text_cache is not None, "the prompts are not encoded"
    images = encoded_images(run, plan.spec, cell.prompt) if _is_started(plan, cell) else {}
    prompt, negative, given = (
        {name: tensor.to(run.device) for name, tensor in encoding.items()}
        for encoding in (run.text_cache(cell.prompt.text), run.text_cache(cell.settings.negative), images or {})
    )
    return cell.settings.request(prompt, negative, on_step, given)


def _is_started(plan: Plan, cell: Cell) -> bool:
    return any(each.sample_id == sample_id(cell.prompt) for each in plan.starts)


def _write(plan: Plan, cell: Cell, frames: NDArray[np.uint8]) -> list[Path]:
    """The poster and the clip; of a single frame the picture alone."""
    picture, clip = media_paths(plan.folder, cell)
    write_png(picture, poster(frames))
    if len(frames) == 1:
        return [picture]
    write_mp4(clip, frames, cell.settings.fps, comment=json.dumps(plan.record(cell), ensure_ascii=False))
    return [picture, clip]


def _stop_if_asked(interrupt: Interrupt, done: int, total: int) -> None:
    if interrupt.requested is not None and done < total:
        raise Stopped(
            f"{interrupt.requested}: {done} of {total} clips are rendered", remedy="the same command renders the rest"
        )


def write_sheets(plan: Plan, *, again: bool) -> list[Path]:
    """A row of frames for each clip, and a grid of posters where there are several strengths or seeds.

    Written beside older ones, never over them; ``again``: also where there is one.
    """
    title = ", ".join(dict.fromkeys(each.path.name for each in plan.adapters)) or plan.spec.flavour
    how = [
        f"{each.width}x{each.height}, {each.frames} frames, {each.steps} {each.scheduler} steps, "
        f"guidance {each.guidance:g}"
        for each in (cell.settings for cell in plan.cells)
    ]
    subtitle = "  ·  ".join((plan.spec.flavour, *dict.fromkeys(how)))
    rows = {SHEET: [Row(cell.label, cell.prompt.text, _frames(plan, cell)) for cell in plan.cells]}
    if len(plan.cells) > len({cell.prompt for cell in plan.cells}):
        rows[GRID] = _grid(plan)
    written = []
    for name, each in rows.items():
        path = plan.folder / name
        if path.exists() and not again:
            continue
        written.append(_free(path))
        write_contact_sheet(written[-1], each, title=title, subtitle=subtitle)
    return written


def _free(path: Path) -> Path:
    """``path``, or the first of its name and a number that is not there."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return path if not path.exists() else next(each for each in numbered if not each.exists())


def _frames(plan: Plan, cell: Cell) -> NDArray[np.uint8]:
    picture, clip = media_paths(plan.folder, cell)
    return read_evenly(clip if clip.exists() else picture, COLUMNS)


def _grid(plan: Plan) -> list[Row]:
    """Posters of each prompt: a row for each seed with the strengths beside each other; of one strength the seeds."""
    by_strength = len({cell.strength for cell in plan.cells}) > 1

    def row_of(cell: Cell) -> tuple[Prompt, int]:
        return cell.prompt, cell.seed if by_strength else 0

    rows = []
    for (prompt, seed), group in groupby(plan.cells, key=row_of):
        name = f"{prompt.nickname} · seed {seed}" if by_strength else prompt.nickname
        together = list(group)
        for start in range(0, len(together), COLUMNS):
            some = together[start : start + COLUMNS]
            pictures = [labelled(_poster(plan, each), _column(each, by_strength)) for each in some]
            rows.append(Row(name, prompt.text, np.stack(pictures)))
    return rows


def _poster(plan: Plan, cell: Cell) -> NDArray[np.uint8]:
    picture, _ = media_paths(plan.folder, cell)
    return np.asarray(read_evenly(picture, 1)[0])


def _column(cell: Cell, by_strength: bool) -> str:
    return f"{cell.strength:g}" if by_strength and cell.strength is not None else f"seed {cell.seed}"
