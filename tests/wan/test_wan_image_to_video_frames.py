"""Where first and last frames come from: paired pictures, the user's pictures for validation, the datasets' clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tuner.builtin.datasets.images import image_cache
from tuner.builtin.datasets.prepare import prepare
from tuner.builtin.datasets.reading import read_datasets
from tuner.builtin.encoding.clips import read_clip
from tuner.builtin.sampling.images import chosen_pictures, starting_samples
from tuner.builtin.sampling.prompts import Prompt
from tuner.builtin.sampling.settings import Settings
from tuner.config.keys import CoreConfig
from tuner.data.samples import Prepared, Sample
from tuner.errors import ConfigError, DataError
from tuner.run import Run
from tuner.spec import LatentGeometry, ModelSpec
from tuner.testing.clips import render_clip

TEXT = {"id": "text", "dataset_type": "text_embeds", "default": True}
PROMPTS = tuple(Prompt(name, name, f"a {name}") for name in ("cat", "dog", "cow"))


def spec(condition: str = "first_frame", *, embeds: bool = True) -> ModelSpec:
    frames = {"first_frame": ("first_frame",), "first_and_last_frame": ("first_frame", "last_frame")}
    return ModelSpec(
        "wan", "the flavour", "b", (), LatentGeometry(16, 4, 8), 16, 16.0, (), condition=condition,
        conditioning_frames=frames.get(condition, ()) if embeds else (),
    )  # fmt: skip


def settings(frames: int = 9, width: int = 64, height: int = 32) -> Settings:
    return Settings(width, height, frames, 16.0, 2, 5.0, None, 1, "unipc", None, "")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for index, frames in enumerate((9, 13)):
        render_clip(folder / f"c{index}.mp4", width=64, height=32, frames=frames, fps=16, seed=index)
        (folder / f"c{index}.txt").write_text(f"clip {index}", encoding="utf-8")
    return folder


@pytest.fixture
def paired(clips: Path, tmp_path: Path) -> Callable[..., Prepared]:
    """The clips with a picture for each first frame."""
    folder = tmp_path / "starts"
    folder.mkdir()

    def make(about: ModelSpec, size: tuple[int, int] = (128, 64), **keys: Any) -> Prepared:
        for index in range(2):
            if not any(folder.glob(f"c{index}.*")):
                Image.new("RGB", size, (10 * index, 200, 90)).save(folder / f"c{index}.png")
        entries = [
            {
                "id": "clips", "dataset_type": "video", "instance_data_dir": str(clips), "resolution": 45,
                "conditioning_data": "starts", "video": {"num_frames": 9},
            },
            {
                "id": "starts", "dataset_type": "conditioning", "conditioning_type": "first_frame",
                "instance_data_dir": str(folder),
            },
            TEXT,
        ]  # fmt: skip
        core = CoreConfig(output_dir=tmp_path / "out", data_backend_config=entries, **keys)
        return prepare(core, about, show_progress=False)

    return make


def test_a_paired_picture_is_framed_as_its_clip(paired: Callable[..., Prepared]) -> None:
    data = paired(spec())
    sample = data.samples[1]
    clip = read_clip(data.decode, sample, sample.views[0], ("first_frame", "last_frame"))
    assert clip.frames.keys() == {"first_frame"}
    assert clip.pixels.shape == (3, 9, 32, 64)
    expected = torch.tensor([10.0, 200.0, 90.0]) / 127.5 - 1
    torch.testing.assert_close(clip.frames["first_frame"], expected.view(3, 1, 1, 1).expand(3, 1, 32, 64))


def test_a_model_that_takes_no_frames_says_that_pictures_are_unused(paired: Callable[..., Prepared]) -> None:
    data = paired(spec("none"))
    assert not any(sample.companions for sample in data.samples)
    assert "dataset 'starts' is not used: the flavour takes no first frame" in data.report.notes


def test_the_second_generation_takes_pictures_and_no_embeddings(paired: Callable[..., Prepared]) -> None:
    """Wan 2.2 needs no CLIP, and its first frames may be paired all the same."""
    data = paired(spec(embeds=False))
    assert all(sample.companion("first_frame") for sample in data.samples)
    assert all(sample.image_cache is None for sample in data.samples)
    assert not any("not used" in note for note in data.report.notes)


def test_pictures_of_another_aspect_and_clips_are_refused(paired: Callable[..., Prepared], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"c0\.png is 64x64, and the file itself is 64x32"):
        paired(spec(), size=(64, 64))
    for old in (tmp_path / "starts").iterdir():
        old.rename(tmp_path / old.name)
    for index in range(2):
        render_clip(tmp_path / "starts" / f"c{index}.mp4", width=64, height=32, frames=5, fps=16, seed=9)
    with pytest.raises(DataError, match="is a clip, and one frame is a picture"):
        paired(spec())


@pytest.mark.parametrize(
    ("own", "entries", "expected"),
    [
        ({"cache_dir_conditioning_image_embeds": "own"}, ["a"], "own"),
        ({"conditioning_image_embeds": "b"}, ["a", "b"], "folder-b"),
        ({}, ["a"], "folder-a"),
        ({}, [], "cache/conditioning_image_embeds"),
    ],
)
def test_where_embeddings_are_kept(own: dict[str, str], entries: list[str], expected: str, tmp_path: Path) -> None:
    listed = [
        {"id": each, "dataset_type": "conditioning_image_embeds", "cache_dir": f"folder-{each}"} for each in entries
    ]
    video = {"id": "v", "dataset_type": "video", "instance_data_dir": str(tmp_path)} | own
    core = CoreConfig(output_dir=tmp_path, cache_dir="cache", data_backend_config=[video, *listed, TEXT])
    datasets = read_datasets(core)
    assert image_cache(datasets.trained[0], datasets, core, spec()) == Path(expected)
    assert image_cache(datasets.trained[0], datasets, core, spec(embeds=False)) is None


# --- validation -------------------------------------------------------------------------------------------


@pytest.fixture
def data(clips: Path, tmp_path: Path) -> Prepared:
    entry = {"id": "clips", "dataset_type": "video", "instance_data_dir": str(clips), "resolution": 45}
    core = CoreConfig(output_dir=tmp_path / "out", data_backend_config=[entry | {"video": {"num_frames": 9}}, TEXT])
    return prepare(core, spec(), show_progress=False)


def started(data: Prepared, about: ModelSpec, tmp_path: Path, prompts: Any = PROMPTS, **keys: Any) -> list[Sample]:
    wanted = settings(**{name: keys.pop(name) for name in ("frames", "width", "height") if name in keys})
    run = Run(CoreConfig(output_dir=tmp_path / "out", **keys), plugins={})
    return starting_samples(run, about, data, prompts, wanted)


def test_clips_of_the_trained_shape_are_taken_as_they_are(data: Prepared, tmp_path: Path) -> None:
    found = started(data, spec(), tmp_path)
    assert [each.path.name for each in found] == ["c0.mp4", "c1.mp4", "c0.mp4"]
    assert [each.views for each in found] == [data.samples[turn].views for turn in (0, 1, 0)]
    assert len({each.sample_id for each in found}) == 3
    named = started(data, spec(), tmp_path, prompts=[Prompt("x", "x", "clip 1")])
    assert named[0].path.name == "c1.mp4", "the clip with the prompt for a caption"


def test_a_longer_or_larger_clip_starts_from_a_still(data: Prepared, tmp_path: Path) -> None:
    (found, *_) = started(data, spec(), tmp_path, frames=17, width=48, height=48)
    assert found.views[0].still
    clip = read_clip(data.decode, found, found.views[0]).pixels
    assert clip.shape == (3, 17, 48, 48)
    assert torch.equal(clip, clip[:, :1].expand_as(clip))
    whole = data.decode(found.path, found.views[0], found.bucket.__class__(9, 48, 48))
    assert torch.equal(clip[:, :1], whole[:, :1])


def test_held_out_clips_come_first(data: Prepared, tmp_path: Path) -> None:
    from dataclasses import replace

    apart = replace(data, samples=data.samples[:1], held_out=data.samples[1:])
    assert {each.path.name for each in started(apart, spec(), tmp_path)} == {"c1.mp4"}


def test_a_last_frame_needs_a_clip_that_is_long_enough(data: Prepared, tmp_path: Path) -> None:
    both = spec("first_and_last_frame")
    found = started(data, both, tmp_path, width=48, height=48)
    assert not any(each.views[0].still for each in found)
    assert started(data, both, tmp_path, frames=17) == []


def test_a_clean_first_frame_needs_one_picture_only(data: Prepared, tmp_path: Path) -> None:
    found = started(data, spec("clean_first_frame", embeds=False), tmp_path, frames=17)
    assert {each.bucket.frames for each in found} == {1}


def test_text_to_video_starts_from_nothing(data: Prepared, tmp_path: Path) -> None:
    assert started(data, spec("none"), tmp_path) == []


def pictures(folder: Path, *names: str, size: tuple[int, int] = (60, 40)) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(np.full((size[1], size[0], 3), len(name), np.uint8)).save(folder / name)
    return folder


def chosen(images: Any, *, with_last: bool = False) -> dict[str, tuple[str, str | None]]:
    core = CoreConfig(output_dir="out", validation_images=images)
    found = chosen_pictures(core, PROMPTS, with_last)
    return {prompt.nickname: (first.name, last and last.name) for prompt, (first, last) in found.items()}


def test_pictures_go_to_the_prompts_they_are_named_after(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", "dog.png", "b.jpg", "a.webp")
    (folder / "notes.txt").write_text("no picture")
    assert {name: first for name, (first, _) in chosen(folder).items()} == {
        "cat": "a.webp", "dog": "dog.png", "cow": "b.jpg",
    }  # fmt: skip
    listed = [folder / "b.jpg", folder / "a.webp"]
    assert [first for first, _ in chosen(listed).values()] == ["b.jpg", "a.webp", "b.jpg"]
    assert {first for first, _ in chosen(folder / "dog.png").values()} == {"dog.png"}


def test_last_frames_go_with_their_first(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", "cat.png", "cat-last.png", "x.png", "x-last.jpg")
    assert chosen(folder, with_last=True)["cat"] == ("cat.png", "cat-last.png")
    assert chosen(folder, with_last=True)["cow"] == ("x.png", "x-last.jpg")
    (folder / "x-last.jpg").rename(tmp_path / "away.jpg")
    with pytest.raises(ConfigError, match=r"x-last\.png"):
        chosen(folder, with_last=True)


@pytest.mark.parametrize("images", ["nowhere.png", ["nowhere.png"], "empty"])
def test_pictures_that_do_not_exist(images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="validation_images"):
        chosen(images)


def test_what_is_no_picture_ends_the_run_at_once(data: Prepared, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(DataError, match="no picture"):
        started(data, spec(), tmp_path, validation_images=[broken])


def test_a_last_frame_of_another_aspect_is_refused(data: Prepared, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", "cat.png")
    pictures(folder, "cat-last.png", size=(40, 60))
    with pytest.raises(ConfigError, match="aspect"):
        started(data, spec("first_and_last_frame"), tmp_path, prompts=PROMPTS[:1], validation_images=folder)
