"""Writing behind the encoder's back: bounded, complete, and loud when it fails."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.builtin.datasets.prepare import prepare
from tuner.builtin.encoding.fill import build_cache
from tuner.builtin.encoding.store import Store, make_key
from tuner.builtin.encoding.writing import Writer
from tuner.errors import DataError
from tuner.run import Run

KEYS = [make_key(index) for index in range(100)]


def entry(index: int) -> dict[str, torch.Tensor]:
    return {"latents": torch.full((4,), float(index))}


def hand_over(root: Path, keys: Iterable[str], *, waiting: int, handed: list[str] | None = None) -> None:
    """Write an entry for each key; ``handed`` are those that the writer took."""
    with Writer(waiting) as writer:
        for index, key in enumerate(keys):
            writer.write(Store(root), key, entry(index), {})
            (handed if handed is not None else []).append(key)


def test_when_the_block_ends_everything_is_on_the_disk_and_remembered(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with Writer(3) as writer:
        for index, key in enumerate(KEYS):
            writer.write(store, key, entry(index), {})
    assert all(torch.equal(store.read(key)["latents"], entry(index)["latents"]) for index, key in enumerate(KEYS))
    assert store.stamps.known().keys() == set(KEYS)


def test_no_more_wait_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    write = Store.write

    def slow(self: Store, *arguments: Any) -> None:
        assert go.wait(60)
        write(self, *arguments)

    monkeypatch.setattr(Store, "write", slow)
    handed: list[str] = []
    thread = threading.Thread(target=hand_over, args=(tmp_path, KEYS[:10]), kwargs={"waiting": 3, "handed": handed})
    thread.start()
    thread.join(0.3)
    assert len(handed) == 3
    go.set()
    thread.join(60)
    assert len(handed) == 10
    assert all(map(Store(tmp_path).is_whole, KEYS[:10]))


def test_an_error_ends_the_block_and_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    whole = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if len(written) == 4:
            whole(path, data[:20])
            raise OSError(28, "No space left on device")
        written.append(path)
        return whole(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    handed: list[str] = []
    with pytest.raises(DataError, match="the disk is full"):
        hand_over(tmp_path, KEYS, waiting=2, handed=handed)
    assert len(handed) <= 4 + 2, "the error came at once"
    files = [path.name for path in tmp_path.glob("??/*")]
    assert sorted(files) == sorted(f"{key}.safetensors" for key in KEYS[:4])


def test_an_error_of_the_very_last_entry_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Store, *arguments: Any) -> None:
        raise DataError("the cache cannot be written")

    monkeypatch.setattr(Store, "write", broken)
    with pytest.raises(DataError, match="cannot be written"), Writer(8) as writer:
        writer.write(Store(tmp_path), KEYS[0], entry(0), {})


def test_what_was_encoded_before_a_failure_is_kept(tmp_path: Path) -> None:
    def stopped_behind_the_last() -> Iterator[str]:
        yield from KEYS[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hand_over(tmp_path, stopped_behind_the_last(), waiting=8)
    assert all(map(Store(tmp_path).is_whole, KEYS[:5]))


def test_both_limits_are_those_of_the_config(
    clips: Path, make_core: Any, spec: Any, model: Any, hooks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    begin = Writer.__init__

    def counted(self: Writer, waiting: int) -> None:
        limits.append(waiting)
        begin(self, waiting)

    core = make_core(clips, core={"write_batch_size": 5})
    core.data_backend_config[1]["write_batch_size"] = 7
    threads = [thread.name for thread in threading.enumerate()]
    monkeypatch.setattr(Writer, "__init__", counted)
    build_cache(Run(core, {}), model, hooks, prepare(core, spec), show_progress=False)
    assert [each for each in limits if each > 1] == [7, 5]
    assert [thread.name for thread in threading.enumerate()] == threads, "no thread is left behind"
