"""The store: what is written is read back bit for bit, and nothing cut or changed is taken for whole."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tuner.data.store import Store, make_key
from tuner.errors import DataError

KEY = make_key("a", 1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def entry() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"latents": torch.randn(4, 3, 6, 10), "states": torch.randn(7, 5).to(torch.bfloat16), "n": torch.tensor(3)}


def test_what_is_written_is_read(store: Store) -> None:
    written = entry() | {"view": torch.arange(12.0).view(3, 4).T}
    store.write(KEY, written, {"caption": "两只猫"})
    read = store.read(KEY)
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) and read[name].dtype == written[name].dtype for name in written)
    with safe_open(store.path(KEY), "pt") as file:
        assert file.metadata()["caption"] == "两只猫"


def test_every_part_of_a_key_counts() -> None:
    keys = {make_key("text", 1, "ab", "c"), make_key("text", 1, "a", "bc"), make_key("text", 2, "ab", "c")}
    assert len(keys) == 3


@pytest.mark.parametrize("cut", [0, 7, 60, -1], ids=["empty", "in the length", "in the header", "last byte"])
def test_a_cut_entry_is_not_whole(store: Store, cut: int) -> None:
    store.write(KEY, entry(), {})
    data = store.path(KEY).read_bytes()
    store.path(KEY).write_bytes(data[:cut])
    assert not store.is_whole(KEY)
    with pytest.raises(DataError, match="damaged"):
        store.read(KEY)


def test_every_flipped_byte_of_tensors_and_header_is_noticed(store: Store) -> None:
    store.write(KEY, {"a": torch.arange(6.0)}, {})
    whole = store.path(KEY).read_bytes()
    assert store.is_whole(KEY)
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        store.path(KEY).write_bytes(bytes(flipped))
        if store.is_whole(KEY):
            # Only what says nothing about the tensors may change unnoticed: padding and the names of metadata.
            assert torch.equal(store.read(KEY)["a"], torch.arange(6.0))


def test_a_missing_entry_is_an_error(store: Store) -> None:
    assert not store.has(KEY)
    assert not store.is_whole(KEY)
    with pytest.raises(DataError, match="missing"):
        store.read(KEY)


def test_a_key_cannot_leave_the_folder(store: Store) -> None:
    with pytest.raises(ValueError, match="not a key"):
        store.path("../../etc/passwd")


def test_a_full_disk_is_one_error_and_leaves_nothing_behind(store: Store) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the system now refuses to write beyond
    try:
        with pytest.raises(DataError, match="the disk is full"):
            store.write(KEY, {"latents": torch.randn(64, 64)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not store.has(KEY)
    assert not [path for path in store.root.rglob("*") if path.is_file()]
    store.write(KEY, entry(), {})
    assert store.is_whole(KEY)
