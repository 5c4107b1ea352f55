"""Entries that were found whole are looked up and not read again, until something says otherwise."""

from __future__ import annotations

import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.builtin.datasets.prepare import prepare
from tuner.builtin.encoding import stamps
from tuner.builtin.encoding.fill import build_cache
from tuner.builtin.encoding.stamps import Stamp, Stamps
from tuner.builtin.encoding.store import Store, make_key
from tuner.errors import DataError
from tuner.run import Run

KEYS = [make_key(index) for index in range(5)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "cache")
    for index, key in enumerate(KEYS):
        made.write(key, {"latents": torch.full((2, 3), float(index))}, {})
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the entries whose content is read, as it happens."""
    seen: list[str] = []
    whole = Store.is_whole

    def is_whole(self: Store, key: str) -> bool:
        seen.append(key)
        return whole(self, key)

    monkeypatch.setattr(Store, "is_whole", is_whole)
    return seen


def rot(store: Store, key: str) -> None:
    """Change a byte of an entry behind everybody's back: size, time and inode stay."""
    path = store.path(key)
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        last = file.read(1)
        file.seek(-2, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_each_entry_is_read_once(store: Store, read: list[str]) -> None:
    missing = make_key("never written")
    assert store.lacking([*KEYS, missing]) == ([missing], [])
    assert sorted(read) == sorted(KEYS)
    read.clear()
    counted: list[int] = []
    assert Store(store.root).lacking([*KEYS, missing], advance=counted.append) == ([missing], [])
    assert read == []
    assert sum(counted) == len(KEYS) + 1


def test_what_was_written_to_is_read_again(store: Store, read: list[str]) -> None:
    store.lacking(KEYS)
    read.clear()
    store.path(KEYS[0]).write_bytes(store.path(KEYS[0]).read_bytes()[:-1])
    store.write(KEYS[1], {"latents": torch.zeros(1)}, {})
    os.utime(store.path(KEYS[2]), ns=(1, 1))
    assert store.lacking(KEYS) == ([], [KEYS[0]])
    assert sorted(read) == sorted(KEYS[:3])
    read.clear()
    assert store.lacking(KEYS) == ([], [KEYS[0]])
    assert read == [KEYS[0]], "what is damaged is never remembered as whole"


def test_rot_is_found_by_a_full_check_and_by_whoever_reads_the_entry(store: Store) -> None:
    store.lacking(KEYS)
    rot(store, KEYS[0])
    rot(store, KEYS[1])
    assert store.lacking(KEYS) == ([], [])
    with pytest.raises(DataError, match=r"damaged(.|\n)*start again"):
        store.read(KEYS[0])
    assert store.lacking(KEYS) == ([], [KEYS[0]]), "starting again mends it"
    assert store.lacking(KEYS, reread=True) == ([], [KEYS[0], KEYS[1]])
    assert store.lacking(KEYS) == ([], [KEYS[0], KEYS[1]])


def test_a_damaged_list_is_put_aside_and_begun_anew(
    store: Store, read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    store.lacking(KEYS)
    read.clear()
    store.stamps.path.write_bytes(b"this is no database, whoever wrote it" * 100)
    caplog.set_level(logging.WARNING, "tuner")
    assert store.lacking(KEYS) == ([], [])
    assert sorted(read) == sorted(KEYS)
    (aside,) = store.root.glob(f"{stamps.NAME}.damaged-*")
    assert b"no database" in aside.read_bytes()
    assert str(aside) in caplog.text
    read.clear()
    store.lacking(KEYS)
    assert read == []


def test_a_list_that_cannot_be_kept_costs_time_and_nothing_else(
    store: Store, read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    store.stamps.path.mkdir()
    caplog.set_level(logging.WARNING, "tuner")
    for _ in range(2):
        assert store.lacking(KEYS) == ([], [])
    assert len(read) == 2 * len(KEYS)
    assert caplog.text.count("out of reach") == 1


def test_a_list_of_another_version_is_not_believed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.lacking(KEYS)
    assert len(store.stamps.known()) == len(KEYS)
    monkeypatch.setattr(stamps, "VERSION", stamps.VERSION + 1)
    assert store.stamps.known() == {}


def _record(root: Path, first: int) -> None:
    for index in range(first, first + 40):
        Stamps(root).record({f"{index:064x}": Stamp(index, index, index)})


def test_processes_may_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_record, args=(tmp_path, 40 * index)) for index in range(3)]
    for each in writers:
        each.start()
    for each in writers:
        each.join(60)
    assert [each.exitcode for each in writers] == [0, 0, 0]
    assert len(Stamps(tmp_path).known()) == 120


def test_a_start_after_encoding_reads_no_entry_unless_told_to(
    clips: Path, make_core: Any, spec: Any, model: Any, hooks: Any, read: list[str]
) -> None:
    core = make_core(clips)
    prepared = prepare(core, spec)
    first = build_cache(Run(core, {}), model, hooks, prepared, show_progress=False)
    again = build_cache(Run(core, {}), model, hooks, prepared, show_progress=False)
    assert (again.encoded, read) == (0, [])
    rot(Store(first.samples[0].cache), first.video_keys[first.samples[0].sample_id, 0])
    checked = build_cache(Run(core, {}), model, hooks, prepared, show_progress=False, verify=True)
    assert (checked.encoded, checked.rebuilt) == (1, 1)
    assert len(read) == first.encoded
    assert checked.video(first.samples[0])["latents"].isfinite().all()
