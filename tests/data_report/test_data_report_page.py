"""The page and the table of the data, the quarantine, and the warning about sizes that are not trained."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tuner.builtin.buckets import bucket_size
from tuner.builtin.data_report.page import NAME, write_page
from tuner.builtin.datasets.prepare import prepare
from tuner.builtin.epochs.plan import Plan
from tuner.builtin.sampling.trained_sizes import untrained
from tuner.config.keys import CoreConfig
from tuner.data.samples import Prepared
from tuner.run import Run
from tuner.spec import LatentGeometry, ModelSpec, NetworkSpec
from tuner.testing.clips import render_clip

SPEC = ModelSpec(
    family="fake",
    flavour="fake-tiny",
    base="none",
    networks=(NetworkSpec("n", 1, 8, 1, 8, 8, 8, 4),),
    latents=LatentGeometry(channels=4, stride_time=4, stride_space=8),
    size_multiple=16,
    fps=16.0,
    adapter_targets=(),
)
MakeData = Callable[..., tuple[Run, Prepared, Plan]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    clips = tmp_path / "clips"
    for name, width, height, frames in (("wide", 96, 64, 9), ("tall & <b>", 64, 96, 9), ("short", 96, 64, 3)):
        render_clip(clips / f"{name}.mp4", width=width, height=height, frames=frames, fps=16, seed=len(name))
        (clips / f"{name}.txt").write_text(f"<script>alert('{name}')</script>", encoding="utf-8")
    (clips / "sub").mkdir()
    (clips / "sub" / "broken.mp4").write_bytes(b"no clip")
    (clips / "sub" / "broken.txt").write_text("words", encoding="utf-8")
    return clips


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> MakeData:
    def made(**core: Any) -> tuple[Run, Prepared, Plan]:
        video = {
            "id": "clips",
            "dataset_type": "video",
            "instance_data_dir": str(folder),
            "resolution": 64,
            "video": {"num_frames": 9},
        }
        text = {"id": "text", "dataset_type": "text_embeds", "default": True}
        keys = {
            "output_dir": tmp_path / "output",
            "cache_dir": tmp_path / "cache",
            "max_train_steps": 4,
            "resolution": 64,
        }
        config = CoreConfig(data_backend_config=[video, text], **(keys | core))
        run = Run(config, {}, frozenset(core))
        run.spec = SPEC
        data = prepare(config, SPEC, show_progress=False)
        return run, data, Plan(data.samples, data.datasets, seed=0, batch_size=1)

    return made


class Page(HTMLParser):
    """What a browser would see: tags, addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are closed in order"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_bucket_with_a_picture_and_everything_left_out(make: MakeData) -> None:
    run, data, plan = make()
    page = Page(write_page(run, data, plan).read_text(encoding="utf-8"))
    assert not page.open
    assert page.tags.count("img") == 2
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses), (
        "nothing leaves the machine"
    )
    assert "script" not in page.tags
    assert "b" in page.tags  # ours, around numbers
    for words in (
        "80x48, 9 frames",
        "48x80, 9 frames",
        "alert('wide')",
        "tall & <b>.mp4",
        "short.mp4",
        "broken.mp4",
    ):
        assert words in page.text, words
    assert re.search(r"4\s*steps(?! per)", page.text)


def test_it_is_written_once_for_the_same_data_and_anew_for_other_data(make: MakeData, folder: Path) -> None:
    run, data, plan = make()
    path = write_page(run, data, plan)
    os.utime(path, (1, 1))
    assert write_page(*make()).stat().st_mtime == 1
    (folder / "wide.txt").write_text("other words", encoding="utf-8")
    assert "other words" in write_page(*make()).read_text(encoding="utf-8")
    assert path.stat().st_mtime != 1
    assert [each.name for each in run.output_dir.iterdir()] == [NAME]


def test_a_picture_that_cannot_be_drawn_is_said(make: MakeData, folder: Path) -> None:
    run, data, plan = make()
    (folder / "wide.mp4").write_bytes(b"gone")
    page = Page(write_page(run, data, plan).read_text(encoding="utf-8"))
    assert page.tags.count("img") == 1
    assert "no picture: a clip cannot be decoded" in page.text


# --- quarantine -------------------------------------------------------------------------------------------


def test_nothing_is_moved_without_the_key(make: MakeData, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    _, data, _ = make(delete_problematic_images=True)
    assert sorted(folder.rglob("*")) == before
    assert any("nothing is ever deleted" in note for note in data.report.datasets[0].notes)


def test_broken_files_are_moved_with_their_words_and_only_they(make: MakeData, folder: Path, tmp_path: Path) -> None:
    content = (folder / "sub" / "broken.mp4").read_bytes()
    _, data, _ = make(quarantine_problematic_files=True)
    quarantine = tmp_path / "cache" / "vae" / "clips" / "quarantine"
    assert (quarantine / "sub" / "broken.mp4").read_bytes() == content
    assert (quarantine / "sub" / "broken.txt").read_text(encoding="utf-8") == "words"
    assert (folder / "short.mp4").is_file(), "too short is not broken"
    assert any("1 files that cannot be decoded were moved" in note for note in data.report.datasets[0].notes)
    lines = [json.loads(line) for line in (quarantine / "moved.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["from"] for line in lines] == [str(folder / "sub" / f"broken.{end}") for end in ("mp4", "txt")]
    assert lines[0]["reason"]


def test_what_is_in_the_quarantine_already_is_not_overwritten(make: MakeData, folder: Path, tmp_path: Path) -> None:
    make(quarantine_problematic_files=True)
    (folder / "sub" / "broken.mp4").write_bytes(b"another one")
    make(quarantine_problematic_files=True)
    kept = tmp_path / "cache" / "vae" / "clips" / "quarantine" / "sub"
    assert {path.read_bytes() for path in kept.glob("broken*.mp4")} == {b"no clip", b"another one"}


def test_a_caption_that_another_file_shares_stays(make: MakeData, folder: Path) -> None:
    (folder / "sub" / "broken.webm").write_bytes((folder / "wide.mp4").read_bytes())
    make(quarantine_problematic_files=True)
    assert not (folder / "sub" / "broken.mp4").exists()
    assert (folder / "sub" / "broken.txt").exists()


# --- the size of validation clips -------------------------------------------------------------------------


def test_a_size_that_is_not_trained_is_said_with_what_would_train_it(make: MakeData) -> None:
    run, data, _ = make(validation_resolution="80x48")
    assert untrained(run, SPEC, data) is None
    run, data, _ = make(validation_resolution="160x96")
    said = untrained(run, SPEC, data) or ""
    assert "renders at 160x96" in said
    assert "80x48" in said
    found = re.search(r"resolution ([\d.]+) \(pixel_area\)", said)
    assert found
    size = bucket_size(160, 96, resolution=float(found[1]), unit="pixel_area", multiple=16, rounding=2)
    assert size == (160, 96)
