"""Dataset repositories of the hub, on a server of this machine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tuner.testing.hub import Hub

HERE = Path(__file__).parent
Ask = Callable[..., list[dict[str, Any]]]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue()


def repositories(clip: bytes) -> dict[str, dict[str, bytes]]:
    """What the hub has."""
    other, third = clip + b"2", clip + b"3"
    metadata = b"file_name,caption\na.mp4,eins\ngone.mp4,nichts\n"
    embedded = [
        {"video": {"bytes": clip, "path": "x/one.mp4"}, "caption": "first"},
        {"video": {"bytes": other, "path": None}, "caption": "second"},
        {"video": {"bytes": clip, "path": "again.mp4"}, "caption": "first, again"},
        {"video": {"bytes": b"no clip", "path": None}, "caption": "broken"},
    ]
    return {
        "anna/plain": {
            "README.md": b"hello",
            "a.mp4": clip,
            "deep/b c.mp4": other,
            "a.txt": b"a horse",
            "big.bin": b"0",
        },
        "anna/table": {"train/metadata.csv": metadata, "train/a.mp4": clip, "train/b.mp4": other},
        "anna/splits": {
            "metadata.jsonl": b'{"file_name": "train/a.mp4", "text": "t"}\n{"file_name": "test/b.mp4", "text": "e"}\n',
            "train/a.mp4": clip,
            "test/b.mp4": other,
        },
        "anna/embedded": {
            "data/train-00000-of-00002.parquet": parquet(embedded),
            "data/train-00001-of-00002.parquet": parquet(
                [{"video": {"bytes": third, "path": "z.mp4"}, "caption": "z"}]
            ),
            "data/test-00000-of-00001.parquet": parquet([{"video": {"bytes": third, "path": "t.mp4"}, "caption": "t"}]),
        },
        "anna/evil": {"metadata.csv": b"file_name\n../../../../outside.mp4\n", "a.mp4": clip},
        "anna/gated": {"a.mp4": clip},
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    render = tmp_path_factory.mktemp("hub") / "clip.mp4"
    from tuner.testing.clips import render_clip

    render_clip(render, width=32, height=32, frames=5, fps=8, seed=1)
    server = Hub(repositories(render.read_bytes()), gated=("anna/gated",))
    yield server
    server.stop()


@pytest.fixture
def ask(hub: Any, tmp_path: Path) -> Ask:
    """Lists repositories in another process; ``settings`` are environment variables."""

    def run(*requests: dict[str, Any], **settings: str) -> list[dict[str, Any]]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            **settings,
        }
        wanted = [{"folder": str(tmp_path / "copies"), **request} for request in requests]
        done = subprocess.run(
            [sys.executable, HERE / "hub_driver.py"],
            input=json.dumps(wanted),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return answers

    return run


def of(name: str, **keys: Any) -> dict[str, Any]:
    return {"keys": {"dataset_name": name, **keys}}


def test_plain_files_are_listed_where_the_hub_keeps_them(hub: Any, ask: Ask, tmp_path: Path) -> None:
    (listing,) = ask(of("anna/plain"))
    assert listing["files"] == ["a.mp4", "deep/b c.mp4"]
    root = Path(listing["root"])
    assert root.is_relative_to(tmp_path / "hub")
    assert (root / "a.txt").read_text() == "a horse"
    assert not (root / "big.bin").exists(), "what is of no use is not downloaded"
    hub.sent.clear()
    (again,) = ask(of("anna/plain"))
    assert again == listing
    assert not hub.sent


def test_metadata_decides_and_gives_captions(ask: Ask) -> None:
    table, everything, train = ask(of("anna/table"), of("anna/splits"), of("anna/splits", split="train"))
    assert table["files"] == ["train/a.mp4"]
    assert table["captions"] == {"train/a.mp4": ["eins"]}
    assert any("no table names, left out: 1" in note for note in table["notes"])
    assert any("not there: 1: train/gone.mp4" in note for note in table["notes"])
    assert everything["captions"] == {"train/a.mp4": ["t"], "test/b.mp4": ["e"]}
    assert train["captions"] == {"train/a.mp4": ["t"]}
    assert train["files"] == ["train/a.mp4"]


def test_clips_inside_parquet_are_taken_out_once(hub: Any, ask: Ask, tmp_path: Path) -> None:
    (train,) = ask(of("anna/embedded", split="train"))
    assert sorted(train["captions"].values()) == [["first", "first, again"], ["second"], ["z"]]
    clip = hub.repositories["anna/plain"]["a.mp4"]
    contents = {(Path(train["root"]) / name).read_bytes() for name in train["files"]}
    assert contents == {clip, clip + b"2", clip + b"3"}
    assert any("another kind, left out: 1" in note for note in train["notes"])
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "copies").rglob("*.mp4")}
    again, whole = ask(of("anna/embedded", split="train"), of("anna/embedded"))
    assert again == train
    assert sorted(map(sorted, whole["captions"].values())) == [["first", "first, again"], ["second"], ["t", "z"]]
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_what_is_wrong_is_one_error_each(ask: Ask) -> None:
    answers = ask(
        of("anna/nothing"),
        of("anna/plain", revision="v9"),
        of("anna/gated"),
        of("a/b/c"),
        of("anna/splits", split="dev"),
        of("anna/table", caption_column="captoin"),
        of("anna/embedded", video_column="clip"),
        of("anna/evil"),
        of("anna/plain") | {"suffixes": [".webm"]},
    )
    expected = [
        ("ConfigError", "does not exist, or it is private"),
        ("ConfigError", "no revision 'v9'"),
        ("DataError", "is gated"),
        ("ConfigError", "owner/name"),
        ("ConfigError", "belongs to the split 'dev'"),
        ("ConfigError", "did you mean 'caption'?"),
        ("ConfigError", "no column 'clip'"),
        ("DataError", "leads out of its folder"),
        ("DataError", "can be used"),
    ]
    for answer, (kind, message) in zip(answers, expected, strict=True):
        assert (answer.get("error"), message in answer.get("message", "")) == (kind, True), answer


def test_offline_what_was_downloaded_is_used_and_the_rest_is_an_error(ask: Ask) -> None:
    (online,) = ask(of("anna/plain"))
    offline, missing = ask(of("anna/plain"), of("anna/table"), HF_HUB_OFFLINE="1")
    assert offline["files"] == online["files"]
    assert offline["root"] == online["root"]
    assert any("used as downloaded before" in note for note in offline["notes"])
    assert missing["error"] == "DataError"
    assert "not wholly in its cache" in missing["message"]


def test_a_hub_that_is_away_is_like_no_network(ask: Ask, hub: Any) -> None:
    (online,) = ask(of("anna/plain"))
    offline, missing = ask(of("anna/plain"), of("anna/table"), HF_ENDPOINT="http://127.0.0.1:9")
    assert offline["files"] == online["files"]
    assert "cannot be reached" in missing["message"]
