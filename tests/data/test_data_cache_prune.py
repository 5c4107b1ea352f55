"""Pruning takes what no dataset uses, and nothing that is not an entry."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.builtin.datasets.prepare import prepare
from tuner.builtin.encoding.encodings import entries_in_use, entry_keys
from tuner.builtin.encoding.fill import build_cache
from tuner.builtin.encoding.store import Store, make_key
from tuner.cli.prune import STALE, find_unused, remove
from tuner.files import TEMPORARY
from tuner.run import Run

USED, UNUSED, PACKED = make_key("used"), make_key("unused"), make_key("packed")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "cache")
    for each, key in ((made, USED), (made, UNUSED), (Store(made.root, compress=True), PACKED)):
        each.write(key, {"latents": torch.zeros(3)}, {})
    made.lacking([USED, UNUSED, PACKED])
    return made


def test_entries_that_nobody_uses_go_in_either_form(store: Store) -> None:
    unused = find_unused({store.root: {USED}})
    assert set(unused.files) == {store.path(UNUSED), store.path(PACKED)}
    assert unused.size == sum(path.stat().st_size for path in unused.files)
    assert unused.kept == {store.root: 1}
    remove(unused)
    assert store.is_whole(USED)
    assert not store.has(UNUSED)
    assert not store.has(PACKED)
    assert store.stamps.known().keys() == {USED}
    assert not find_unused({store.root: {USED}}).files


def test_nothing_but_entries_is_ever_looked_at(store: Store, tmp_path: Path) -> None:
    folder, name = store.path(UNUSED).parent, store.path(UNUSED).name
    elsewhere = tmp_path / "elsewhere" / name
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"a link leads here")
    foreign = [
        store.root / "clip.pt",
        store.root / name,  # the name of an entry in no place of one
        folder / "clip.pt",
        folder / "notes.safetensors",
        folder / (name + ".bak"),
        folder / f"{'0' * 64}.safetensors",  # belongs in another folder
        folder / f"{UNUSED[:40]}.safetensors",
        folder / f"{UNUSED.upper()}.safetensors",
        store.root / "zz" / name,
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not ours")
    link = folder / f"{UNUSED[:2]}{'1' * 62}.safetensors"
    link.symlink_to(elsewhere)
    (folder / f"{UNUSED[:2]}{'2' * 62}.safetensors").mkdir()
    unused = find_unused({store.root: set()})
    assert set(unused.files) == {store.path(each) for each in (USED, UNUSED, PACKED)}
    remove(unused)
    assert all(path.read_bytes() == b"not ours" for path in foreign)
    assert link.read_bytes() == b"a link leads here"


def test_half_written_entries_go_when_they_are_old(store: Store) -> None:
    folder = store.path(USED).parent
    old, new, foreign = (
        folder / f"{TEMPORARY}77-{USED}.safetensors",
        folder / f"{TEMPORARY}78-{USED}.safetensors.zst",
        folder / f"{TEMPORARY}79-notes.txt",
    )
    for path in (old, new, foreign):
        path.write_bytes(b"half")
    for path in (old, foreign):
        os.utime(path, (0, time.time() - STALE - 60))
    assert set(find_unused({store.root: {USED, UNUSED, PACKED}}).files) == {old}


def test_a_cache_that_was_not_made_yet_has_nothing_to_remove(tmp_path: Path) -> None:
    unused = find_unused({tmp_path / "never": {USED}})
    assert (dict(unused.files), unused.kept) == ({}, {tmp_path / "never": 0})


def test_exactly_what_a_run_reads_is_in_use(
    clips: Path, make_core: Any, spec: Any, model: Any, hooks: Any, make_hooks: Any, tmp_path: Path
) -> None:
    """Other frame counts and captions leave entries behind; the settings of today lose none."""
    before = make_core(clips, video={"num_frames": 5})
    build_cache(Run(before, {}), model, hooks, prepare(before, spec), ["an old prompt"], show_progress=False)
    core = make_core(clips)
    prepared = prepare(core, spec)
    build_cache(Run(core, {}), model, hooks, prepared, ["a prompt"], show_progress=False)
    used = entries_in_use(prepared, entry_keys(model, prepared, ["a prompt"]))
    unused = find_unused(used)
    assert len(unused.files) == 3 + 1, "three clips of five frames and the old prompt"
    assert set(unused.kept.values()) == {3, 8}
    remove(unused)
    idle = make_hooks()
    assert build_cache(Run(core, {}), model, idle, prepared, ["a prompt"], show_progress=False).encoded == 0
    assert idle.batches == []


def test_one_folder_under_two_names_is_one_store(
    clips: Path, make_core: Any, spec: Any, model: Any, hooks: Any, tmp_path: Path
) -> None:
    """Captions and clips in one folder, spelled differently: neither is the other's rubbish."""
    shared = tmp_path / "shared"
    core = make_core(clips, cache_dir_vae=str(shared))
    core.data_backend_config[1]["cache_dir"] = str(tmp_path / "elsewhere" / ".." / "shared")
    (tmp_path / "elsewhere").mkdir()
    prepared = prepare(core, spec)
    build_cache(Run(core, {}), model, hooks, prepared, show_progress=False)
    used = entries_in_use(prepared, entry_keys(model, prepared))
    assert len(used) == 1
    assert not find_unused(used).files
