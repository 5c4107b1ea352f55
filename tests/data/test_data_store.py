"""The store: what is written is read back bit for bit, and nothing cut or changed is taken for whole."""

from __future__ import annotations

import importlib.util
import resource
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tuner.builtin.encoding import reading
from tuner.builtin.encoding.store import Store, make_key
from tuner.errors import ConfigError, DataError

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


def test_a_packed_entry_is_read_by_any_store_and_a_switch_keeps_what_is_there(store: Store) -> None:
    packing, written = Store(store.root, compress=True), entry()
    packing.write(KEY, written, {})
    assert packing.path(KEY).name == store.path(KEY).name == f"{KEY}.safetensors.zst"
    for each in (store, packing):
        read = each.read(KEY)
        assert all(torch.equal(read[name], written[name]) for name in written)
        assert each.is_whole(KEY)
    assert not any(map(len, store.lacking([KEY]))), "the key being off is no reason to encode again"
    other = make_key("b")
    store.write(other, written, {})
    assert packing.read(other).keys() == written.keys()
    assert not any(map(len, packing.lacking([other])))


def test_an_entry_has_one_form(store: Store) -> None:
    packing = Store(store.root, compress=True)
    for each, suffix in ((packing, ".zst"), (store, ".safetensors"), (packing, ".zst")):
        each.write(KEY, entry(), {})
        (only,) = (path for path in store.root.rglob(f"{KEY}*"))
        assert only.suffix == suffix


@pytest.mark.parametrize("cut", [0, 3, 12, -1], ids=["empty", "in the magic", "in the block", "last byte"])
def test_a_cut_packed_entry_is_not_whole(store: Store, cut: int) -> None:
    packing = Store(store.root, compress=True)
    packing.write(KEY, entry(), {})
    path = packing.path(KEY)
    path.write_bytes(path.read_bytes()[:cut])
    assert not store.is_whole(KEY)
    with pytest.raises(DataError, match="damaged"):
        store.read(KEY)


def test_no_flipped_byte_of_a_packed_entry_goes_unnoticed(store: Store) -> None:
    packing = Store(store.root, compress=True)
    packing.write(KEY, {"a": torch.arange(6.0)}, {})
    whole = packing.path(KEY).read_bytes()
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        packing.path(KEY).write_bytes(bytes(flipped))
        if store.is_whole(KEY):
            assert torch.equal(store.read(KEY)["a"], torch.arange(6.0))


def test_without_zstandard_a_packed_entry_is_one_error_that_names_the_extra(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(store.root, compress=True).write(KEY, entry(), {})
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for work in (lambda: store.read(KEY), lambda: store.is_whole(KEY), lambda: store.lacking([KEY])):
        with pytest.raises(ConfigError, match=r"zstandard(.|\n)*difftuner\[zstd\]"):
            work()


def test_the_benchmark_of_the_cache_still_runs(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "data_cache.py"
    spec = importlib.util.spec_from_file_location("data_cache_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark  # dataclasses look their module up
    spec.loader.exec_module(benchmark)
    assert benchmark.starts(tmp_path, entries=3, numbers=10).row_count == 3
    assert 0 < benchmark.measure(b"the same again " * 1000, level=1).ratio < 0.1


def test_an_entry_is_hashed_once_and_again_when_somebody_wrote_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, hashed = Store(tmp_path), []
    plain = reading.fits
    monkeypatch.setattr(reading, "fits", lambda *words: (hashed.append(1), plain(*words))[1])
    written = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4),
    }
    store.write(KEY, written, {})
    for _ in range(3):
        read = Store(tmp_path).read(KEY)
        assert read.keys() == written.keys()
        for name, tensor in written.items():
            assert torch.equal(read[name], tensor)
            assert read[name].dtype == tensor.dtype
    assert len(hashed) == 1
    path = store.path(KEY)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        store.read(KEY)
