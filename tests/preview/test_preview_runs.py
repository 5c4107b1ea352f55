"""Previews in whole runs: which files there are, who hears of them, and that nothing else changes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tuner import pipeline
from tuner.assembly import assemble
from tuner.builtin.report.story import Story
from tuner.errors import ConfigError, ModelError
from tuner.spec import LatentGeometry
from tuner.testing.toy.describe import LATENTS
from tuner_preview.layout import Layout
from tuner_preview.making import Maker

Settings = Callable[..., dict[str, Any]]
Write = Callable[..., Path]

TOY = Layout(LATENTS.channels, (8, 8, 8, 8), (1, 2, 2), LATENTS.stride_space // 8)
DUE = ["sheet.webp", "step-05.webp", "step-10.webp", "step-15.webp", "step-20.webp"]


def run(settings: dict[str, Any], without: Sequence[str] = ()) -> Path:
    pipeline.run(assemble(settings, without=without))
    return Path(settings["output_dir"])


def results(output: Path) -> dict[str, bytes]:
    """The clips, and every trained tensor, bit for bit."""
    found = {path.name: path.read_bytes() for path in (output / "validation").glob("step-*/*.mp4")}
    assert len(found) == 2
    for path in (output / "checkpoint-2").rglob("*.safetensors"):
        found |= {f"{path.name}: {name}": tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    return found


def pictures(path: Path) -> list[np.ndarray[Any, Any]]:
    with Image.open(path) as moving:
        return [np.asarray(moving.convert("RGB")) for index in range(moving.n_frames) if moving.seek(index) is None]


def test_previews_come_at_their_steps_and_change_nothing(
    make_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        output = run(make_settings())
    folder = output / "validation" / "step-2" / "previews"
    assert sorted(path.name for path in folder.iterdir()) == ["a_cat", "red"]
    for clip in folder.iterdir():
        assert sorted(path.name for path in clip.iterdir()) == DUE
        assert all(path.stat().st_size < 300_000 for path in clip.iterdir())
        assert [frame.shape for frame in pictures(clip / "step-05.webp")] == [(213, 320, 3)] * 3, "one a latent frame"
        early, late = (np.stack(pictures(clip / f"step-{step}.webp")).astype(int) for step in ("05", "20"))
        assert np.abs(early - late).mean() > 1
    with Image.open(folder / "red" / "sheet.webp") as sheet:
        assert sheet.height > 4 * 100
    assert len([line for line in caplog.messages if line.startswith("previews: latents are projected")]) == 1
    left_out = run(make_settings("left out"), without=("preview",))
    never = make_settings("never")
    del never["validation_preview"], never["validation_preview_steps"]
    assert results(output) == results(left_out) == results(run(never))
    assert not list((output.parent / "left out").rglob("previews"))
    assert not list((output.parent / "never").rglob("previews"))


def test_the_last_preview_shows_the_clip(make_settings: Settings) -> None:
    """At the last step what is predicted is what comes out; colours are fitted, and places are large."""
    output = run(make_settings())
    folder = output / "validation" / "step-2"
    preview = pictures(folder / "previews" / "red" / "step-20.webp")[1]
    clip = Image.open(folder / "red.png").resize((12, 8), Image.Resampling.BOX)
    small = Image.fromarray(preview).resize((12, 8), Image.Resampling.BOX)
    assert np.corrcoef(np.asarray(clip).ravel(), np.asarray(small).ravel())[0, 1] > 0.8


def test_listeners_hear_of_each_preview_and_the_report_shows_them(
    make_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_settings(validation_preview_steps=10, validation_step_interval=1)
    output = run({**settings, "plugins": ["toy", "preview", "listener"]})
    heard = sys.modules["preview_listener"].HEARD
    assert [(step, each.name, each.step, each.steps, whole, sheet) for step, each, whole, sheet in heard] == [
        (step, name, sampled, 20, True, sampled == 20)
        for step in (1, 2)
        for name in ("red", "a_cat")
        for sampled in (10, 20)
    ]
    assert [each.prompt for _, each, _, _ in heard[:4:2]] == ["a red square", "a cat walks"]
    heard.clear()
    assert "plugin 'listener' failed in on_preview" in caplog.text
    page = (output / "report" / "index.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    cells = {row["name"]: row["cells"] for row in data["media"]["rows"]}
    assert cells["red"]["2"]["previews"] == "../validation/step-2/previews/red/sheet.webp"
    assert set(cells) == {"red", "a_cat"}
    assert cells["red"]["2"].keys() == {"video", "picture", "previews"}
    assert Story.read(output).media.as_json() == data["media"], "and when it is made anew from the files"


def test_a_tiny_autoencoder_decodes_them(make_settings: Settings, write_tiny: Write) -> None:
    file = write_tiny(TOY)
    output = run(make_settings(validation_preview_model=str(file), validation_preview_steps=20))
    decoded = pictures(output / "validation" / "step-2" / "previews" / "red" / "step-20.webp")
    assert [frame.shape for frame in decoded] == [(213, 320, 3)] * 9, "every frame of the clip"
    fitted = run(make_settings("fitted", validation_preview_steps=20))
    other = pictures(fitted / "validation" / "step-2" / "previews" / "red" / "step-20.webp")
    assert np.abs(decoded[0].astype(int) - other[0]).mean() > 5
    assert results(output) == results(fitted)


def test_a_preview_that_fails_is_said_once_and_ends_nothing(
    make_settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(make_settings("whole"))
    caplog.clear()

    def fails(maker: Maker, run: Any, model: Any, latents: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory, {latents.sum():.4f} GiB.\nSee the documentation")

    monkeypatch.setattr(Maker, "_frames", fails)
    output = run(make_settings())
    said = [record.getMessage() for record in caplog.records if "preview of" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("preview of 'red' at sampling step 5 failed, rendering goes on: CUDA out of memory, ")
    assert said[0].endswith("GiB.")
    assert results(output) == results(whole)
    assert not list(output.rglob("*.webp"))


def test_a_diverged_model_is_previewed_black(make_settings: Settings, tmp_path: Path) -> None:
    from tuner.run import Run
    from tuner.validate.results import SamplingStep
    from tuner_preview.projection import Projection

    class Geometry:
        latents = LatentGeometry(4, 4, 8)

    class Model:
        spec = Geometry

    settings = assemble(make_settings())
    maker = Maker(None, None)
    maker._projection = Projection(torch.zeros(5, 3), 1.0)
    lost = SamplingStep("lost", "a cat", 1, 1, 16.0, torch.full((1, 4, 2, 4, 6), torch.nan))
    maker.make(Run(settings.core, settings.plugins), Model(), lost, last=True)  # type: ignore[arg-type]
    [path] = tmp_path.rglob("step-1.webp")
    assert max(frame.max() for frame in pictures(path)) == 0


@pytest.mark.parametrize("without", [(), ("sampling",)], ids=["no prompt", "no rendering"])
def test_previews_of_no_validation_are_refused(make_settings: Settings, without: tuple[str, ...]) -> None:
    settings = make_settings()
    if not without:
        del settings["user_prompt_library"]
    with pytest.raises(ConfigError, match="validation_preview shows validation clips"):
        assemble(settings, without=without)
    assemble({**settings, "validation_preview": False}, without=without)


def test_what_does_nothing_is_said(make_settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    pipeline.survey(assemble(make_settings(validation_preview_steps=21)))
    assert "no preview is made: clips are sampled in 20 steps, and validation_preview_steps is 21" in caplog.text
    off = assemble(make_settings(validation_preview=False, validation_preview_model="somewhere/else"))
    assert [line.partition(":")[0] for line in off.warnings if line.startswith("validation_preview")] == [
        "validation_preview_steps does nothing",
        "validation_preview_model does nothing",
    ]


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("missing.safetensors", "there is no file missing.safetensors"),
        ("here/missing.safetensors", "there is no file here/missing.safetensors"),
        ("/nowhere/at/all", "there is no file /nowhere/at/all"),
        ("weights.pth", "is no .safetensors file"),
        (".", "is a folder"),
        ("owner/name/weights.bin", "is no .safetensors file"),
    ],
)
def test_what_is_no_file_of_an_autoencoder_is_refused_at_once(make_settings: Settings, wish: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        assemble(make_settings(validation_preview_model=wish))


def test_an_autoencoder_for_other_latents_is_refused_before_any_weight(
    make_settings: Settings, write_tiny: Write
) -> None:
    file = write_tiny(Layout(TOY.channels + 1, TOY.widths, TOY.grows, TOY.patch))
    with pytest.raises(ModelError, match="this tiny autoencoder decodes latents of"):
        pipeline.survey(assemble(make_settings(validation_preview_model=str(file))))
    with pytest.raises(ConfigError, match="validation_preview_steps"):
        assemble(make_settings(validation_preview_steps=0))
