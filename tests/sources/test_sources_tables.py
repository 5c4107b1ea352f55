"""Tables of files and captions."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.builtin.datasets.probe import probe
from tuner.builtin.sources.mirror import found_at
from tuner.builtin.sources.tables import captions
from tuner.data.source import Listing
from tuner.errors import ConfigError, DataError

Listed = Callable[..., Listing]


@pytest.fixture
def folder(tmp_path: Path, clip: bytes) -> Path:
    """Three clips."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for name in ("one.mp4", "sub/two cats.mp4", "三.mp4"):
        (folder / name).write_bytes(clip)
    return folder


def told(listing: Listing) -> dict[str, tuple[str, ...]]:
    """Captions by relative name, of every file."""
    return {
        Path(each.path).relative_to(listing.root).as_posix(): listing.captions.get(each.path, ())
        for each in listing.files
    }


ROWS: list[dict[str, Any]] = [
    {"file_name": "one.mp4", "caption": "one; with, separators"},
    {"file_name": "sub/two cats.mp4", "caption": ["first", "second"]},
    {"file_name": "三.mp4", "caption": "三"},
]
EXPECTED = {
    "one.mp4": ("one; with, separators",),
    "sub/two cats.mp4": ("first", "second"),
    "三.mp4": ("三",),
}


def write(path: Path, rows: list[dict[str, Any]], *, delimiter: str = ",", encoding: str = "utf-8") -> Path:
    """A table of ``rows``, by the suffix of ``path``."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".jsonl", ".json"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("[" + ",".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines), encoding=encoding)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\r\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: json.dumps(each) if isinstance(each, list) else each for name, each in row.items()})
        path.write_bytes(text.getvalue().encode(encoding))
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_a_byte_order_mark_and_any_separator(folder: Path, listed: Listed, delimiter: str) -> None:
    table = write(folder / "list.csv", ROWS, delimiter=delimiter, encoding="utf-8-sig")
    listing = listed("csv", manifest=str(table))
    assert told(listing) == EXPECTED
    assert listing.root == folder
    assert not listing.notes


@pytest.mark.parametrize(("kind", "name"), [("jsonl", "l.jsonl"), ("manifest", "l.json"), ("manifest", "l.csv")])
def test_other_tables(folder: Path, listed: Listed, kind: str, name: str) -> None:
    assert told(listed(kind, manifest=str(write(folder / name, ROWS)))) == EXPECTED


def test_parquet_with_lists(folder: Path, listed: Listed) -> None:
    rows = [{**row, "caption": [row["caption"]] if isinstance(row["caption"], str) else row["caption"]} for row in ROWS]
    assert told(listed("parquet", manifest=str(write(folder / "l.parquet", rows)))) == EXPECTED


def test_columns_of_other_names_and_a_root_elsewhere(folder: Path, tmp_path: Path, listed: Listed) -> None:
    table = write(tmp_path / "t.csv", [{"id": 1, "clip": "one.mp4", "description": "eins"}])
    listing = listed("csv", folder=str(folder), manifest=str(table), file_column="clip", caption_column="description")
    assert told(listing) == {"one.mp4": ("eins",)}


def test_a_file_in_two_rows_has_both_captions(folder: Path, listed: Listed) -> None:
    rows = [
        {"path": "one.mp4", "text": "a"},
        {"path": "./sub/../one.mp4", "text": "b"},
        {"path": "one.mp4", "text": "a"},
    ]
    assert told(listed("csv", manifest=str(write(folder / "t.csv", rows)))) == {"one.mp4": ("a", "b")}


def test_files_outside_the_root_are_under_what_they_share(
    folder: Path, tmp_path: Path, listed: Listed, clip: bytes
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.mp4").write_bytes(clip)
    rows = [{"path": "one.mp4"}, {"path": str(tmp_path / "other" / "x.mp4")}]
    listing = listed("csv", manifest=str(write(folder / "t.csv", rows)))
    assert told(listing) == {"data/one.mp4": (), "other/x.mp4": ()}
    assert not listing.captions


def test_files_that_are_not_there_are_named(folder: Path, listed: Listed) -> None:
    rows = [{"path": "one.mp4"}, {"path": "gone.mp4"}, {"path": "sub/two cats.mp4"}, {"path": "picture.png"}]
    listing = listed("csv", manifest=str(write(folder / "t.csv", rows)))
    assert len(listing.files) == 2
    assert any("not there: 1: gone.mp4" in note for note in listing.notes)
    assert any("another kind, left out: 1" in note for note in listing.notes)


def test_no_file_there_is_one_error(folder: Path, listed: Listed) -> None:
    table = write(folder / "t.csv", [{"path": f"gone{number}.mp4"} for number in range(12)])
    with pytest.raises(DataError, match=r"no file that t\.csv names(.|\n)*gone0\.mp4(.|\n)*and 2 more"):
        listed("csv", manifest=str(table))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"file_column": "pathh"}, r"no column 'pathh'(.|\n)*path, words(.|\n)*did you mean 'path'"),
        ({"caption_column": "word"}, r"no column 'word'(.|\n)*did you mean 'words'"),
    ],
)
def test_a_column_that_is_not_there(folder: Path, listed: Listed, keys: Mapping[str, str], message: str) -> None:
    table = write(folder / "t.csv", [{"path": "one.mp4", "words": "x"}])
    with pytest.raises(ConfigError, match=message):
        listed("csv", manifest=str(table), **keys)


def test_no_column_of_files(folder: Path, listed: Listed) -> None:
    table = write(folder / "t.csv", [{"clip": "one.mp4", "words": "x"}])
    with pytest.raises(ConfigError, match=r"no column of files(.|\n)*clip, words(.|\n)*file_column"):
        listed("csv", manifest=str(table))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"path,caption\none.mp4,a, b\n", r"line 2(.|\n)*in quotes"),
        ("t.csv", b"path,caption\none.mp4\n", r"1 cells, and there are 2 columns(.|\n)*line 2"),
        ("t.csv", b'path,caption\none.mp4,"a\n', r"cannot be read(.|\n)*line"),
        ("t.csv", b"path,caption\n ,a\n", r"names no file(.|\n)*line 2"),
        ("t.csv", b"", "empty"),
        ("t.csv", b"path,caption\none.mp4,\xff\n", "UTF-8"),
        ("t.jsonl", b'{"path": "one.mp4"}\n\n{"path": one}\n', r"cannot be read(.|\n)*line 3"),
        ("t.jsonl", b'{"path": "one.mp4"}\n["one.mp4"]\n', r"no object(.|\n)*line 2"),
        ("t.jsonl", b'{"path": "one.mp4"}\n{"file": "one.mp4"}\n', r"names no file(.|\n)*line 2"),
        ("t.jsonl", b'{"path": "one.mp4", "caption": {"a": 1}}\n', r"caption is no text(.|\n)*line 1"),
        ("t.json", b'{"path": "one.mp4"}', "no list of objects"),
        ("t.parquet", b"PAR1 nothing", "Parquet file cannot be read"),
    ],
)
def test_broken_tables_name_the_line(folder: Path, listed: Listed, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        listed("manifest", manifest=str(folder / name))


def test_a_table_that_is_not_there(listed: Listed, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the table does not exist"):
        listed("csv", manifest=str(tmp_path / "gone.csv"))


def test_a_table_of_no_known_kind(listed: Listed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"suffix '\.xlsx' is not known"):
        listed("manifest", manifest=str(tmp_path / "gone.xlsx"))


def test_addresses_are_fetched_once_and_dead_ones_named(
    served: Any, folder: Path, listed: Listed, clip: bytes, tmp_path: Path
) -> None:
    (served.folder / "a b.mp4").write_bytes(clip)
    rows = [
        {"url": f"{served.address}/a%20b.mp4?signature=verysecretvalue", "caption": "from afar"},
        {"url": f"{served.address}/dead.mp4?signature=verysecretvalue", "caption": "nothing"},
        {"url": str(folder / "one.mp4"), "caption": "from here"},
    ]
    table = write(folder / "t.csv", rows)
    listing = listed("csv", manifest=str(table))
    assert sorted(listing.captions.values()) == [("from afar",), ("from here",)]
    assert {Path(found.path).read_bytes() for found in listing.files} == {clip}
    (note,) = listing.notes
    assert "/dead.mp4 (not found)" in note
    assert "verysecretvalue" not in note
    index = tmp_path / "copies" / "addresses.sqlite3"
    assert b"verysecretvalue" not in index.read_bytes()
    served.asked.clear()
    (folder / "t.csv").write_text("\n".join(line for line in table.read_text().splitlines() if "dead" not in line))
    again = listed("csv", manifest=str(table))
    assert again.files == listing.files
    assert not served.asked, "what was fetched is not asked for again"


def test_a_table_and_its_files_at_an_address(served: Any, listed: Listed, clip: bytes) -> None:
    (served.folder / "clips").mkdir()
    (served.folder / "clips" / "a #1.mp4").write_bytes(clip)
    write(served.folder / "clips" / "t.jsonl", [{"file_name": "a #1.mp4", "caption": "old"}])
    assert list(listed("jsonl", manifest=f"{served.address}/clips/t.jsonl").captions.values()) == [("old",)]
    write(served.folder / "clips" / "t.jsonl", [{"file_name": "a #1.mp4", "caption": "a new one"}])
    listing = listed("jsonl", manifest=f"{served.address}/clips/t.jsonl")
    assert list(listing.captions.values()) == [("a new one",)], "the table is asked for again"
    served.stop()
    offline = listed("jsonl", manifest=f"{served.address}/clips/t.jsonl")
    assert offline.captions == listing.captions
    assert any("copy from before" in note for note in offline.notes)


def test_without_pyarrow_the_extra_is_named(folder: Path, listed: Listed, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write(folder / "t.parquet", [{"path": "one.mp4"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pyarrow is not installed(.|\n)*difftuner\[parquet\]"):
        listed("parquet", manifest=str(table))


def test_files_that_share_no_folder_have_the_root_of_the_disk(folder: Path, tmp_path: Path) -> None:
    path = str(folder / "one.mp4")
    (probed,) = probe(Listing(Path("/"), [found_at(path)]), tmp_path / "index", show_progress=False)
    assert Path("/") / probed.name == Path(path)


@given(st.lists(st.text(max_size=20), max_size=5))
def test_a_list_of_captions_is_the_same_written_as_json(texts: list[str]) -> None:
    expected = tuple(dict.fromkeys(stripped for text in texts if (stripped := text.strip())))
    assert captions(texts, "here") == expected
    if texts:
        assert captions(json.dumps(texts), "here") == expected


@pytest.mark.parametrize("text", ["[close-up] of a cat", "[1, 2]", '["a", 1]', "[a"])
def test_a_caption_may_begin_with_a_bracket(text: str) -> None:
    assert captions(text, "here") == (text,)
