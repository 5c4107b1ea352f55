"""Several real processes fill one cache: each does its share, and where one fails all end, with one error."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner import processes
from tuner.builtin.datasets.prepare import Prepared, prepare
from tuner.builtin.encoding.fill import build_cache
from tuner.builtin.encoding.store import Store
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError, DataError
from tuner.run import Run

WORLD = 2
Outcomes = list[tuple[int, str, str]]
CONTEXT = multiprocessing.get_context("fork")


def _joined(rank: int, address: Path, work: Callable[[int], Any], outcomes: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=WORLD)
    try:
        result: Any = work(rank)
        outcomes.put((rank, "", str(result)))
    except Exception as error:
        outcomes.put((rank, type(error).__name__, str(error)))
    torch.distributed.destroy_process_group()


@pytest.fixture
def in_processes(tmp_path: Path) -> Callable[[Callable[[int], Any]], Outcomes]:
    """Call a function with the rank in each of two connected processes: rank, error's name, its text or the result."""

    def start(work: Callable[[int], Any]) -> Outcomes:
        outcomes = CONTEXT.SimpleQueue()
        ranks = [
            CONTEXT.Process(target=_joined, args=(rank, tmp_path / "rendezvous", work, outcomes))
            for rank in range(WORLD)
        ]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(60)
        assert [each.exitcode for each in ranks] == [0, 0], "both end, none waits for the other"
        return sorted(outcomes.get() for _ in ranks)

    return start


@pytest.fixture
def core(clips: Path, make_core: Any) -> CoreConfig:
    config: CoreConfig = make_core(clips)
    return config


@pytest.fixture
def prepared(core: CoreConfig, spec: Any) -> Prepared:
    return prepare(core, spec)


def test_an_error_is_raised_where_it_happened_and_ends_the_others(in_processes: Any) -> None:
    def work(rank: int) -> None:
        with processes.together():
            if rank == 1:
                raise DataError("the disk of this one is full")

    assert in_processes(work) == [
        (0, "FailedElsewhere", "another process of this run failed"),
        (1, "DataError", "the disk of this one is full"),
    ]


def test_an_error_of_all_is_shown_by_the_first(in_processes: Any) -> None:
    def work(rank: int) -> None:
        with processes.together():
            raise ConfigError("no such folder")

    assert [error for _, error, _ in in_processes(work)] == ["ConfigError", "FailedElsewhere"]


def test_what_does_not_fail_is_not_disturbed(in_processes: Any) -> None:
    def work(rank: int) -> list[int]:
        with processes.together():
            processes.stop_if_one_failed()
        return processes.gather(rank * 10)

    assert in_processes(work) == [(0, "", "[0, 10]"), (1, "", "[0, 10]")]


def test_a_process_alone_needs_no_group() -> None:
    with pytest.raises(DataError), processes.joined(), processes.together():
        raise DataError("plain")
    processes.stop_if_one_failed()
    assert processes.gather("one") == ["one"]


def test_two_make_the_same_entries_as_one(
    in_processes: Any, core: CoreConfig, prepared: Prepared, make_model: Any, make_hooks: Any, tmp_path: Path
) -> None:
    def work(rank: int) -> int:
        run = Run(core, {}, process_index=rank, process_count=WORLD)
        hooks = make_hooks()
        build_cache(run, make_model(), hooks, prepared, show_progress=False)
        return sum(len(each.captions) or len(each.pixels) for each in hooks.batches)

    def files() -> dict[str, dict[str, bytes]]:
        """The bytes of every tensor; those of a header hold names in any order."""
        paths = (tmp_path / "cache").rglob("*.safetensors")
        return {path.name: {name: each.numpy().tobytes() for name, each in load_file(path).items()} for path in paths}

    shares = [int(result) for _, _, result in in_processes(work)]
    spread = files()
    assert sum(shares) == len(spread), "each entry is encoded by one process"
    assert min(shares) > 0
    (tmp_path / "cache").rename(tmp_path / "spread")
    build_cache(Run(core, {}), make_model(), make_hooks(), prepared, show_progress=False)
    assert files() == spread


def test_a_full_disk_of_one_process_ends_both_and_nothing_is_half_written(
    in_processes: Any,
    core: CoreConfig,
    prepared: Prepared,
    make_model: Any,
    make_hooks: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    whole = Path.write_bytes

    def work(rank: int) -> None:
        def full(path: Path, data: bytes) -> int:
            if rank == 1 and ".safetensors" in path.name:
                whole(path, data[:20])
                raise OSError(28, "No space left on device")
            return whole(path, data)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_bytes", full)
            run = Run(core, {}, process_index=rank, process_count=WORLD)
            build_cache(run, make_model(), make_hooks(), prepared, show_progress=False)

    (_, first, _), (_, second, said) = in_processes(work)
    assert (first, second) == ("FailedElsewhere", "DataError")
    assert said.startswith("the disk is full")
    entries = [path for path in (tmp_path / "cache").rglob("*") if ".safetensors" in path.name]
    assert all(Store(path.parent.parent).is_whole(path.stem) for path in entries)


def test_the_others_stop_soon_and_do_not_finish_their_share(
    in_processes: Any, clips: Path, make_core: Any, spec: Any, make_model: Any, make_hooks: Any, tmp_path: Path
) -> None:
    """One fails at its first caption, while the other has many to go and only then looks up."""
    core = make_core(clips, core={"text_embed_batch_size": 1})
    prepared, failed, made = prepare(core, spec), tmp_path / "failed", tmp_path / "made"

    def work(rank: int) -> None:
        class Hooks(make_hooks):  # type: ignore[misc]
            def encode_batch(self, **arguments: Any) -> Any:
                if rank == 1:
                    failed.touch()
                    raise DataError("out of order")
                while not failed.exists():
                    time.sleep(0.01)
                time.sleep(0.3)
                with made.open("a") as file:
                    file.write("x")
                return super().encode_batch(**arguments)

        run = Run(core, {}, process_index=rank, process_count=WORLD)
        build_cache(run, make_model(), Hooks(), prepared, show_progress=False)

    assert [error for _, error, _ in in_processes(work)] == ["FailedElsewhere", "DataError"]
    assert not made.exists() or made.read_text() == "x", "no further than the batch it was at"


def test_a_clip_that_fails_in_one_process_is_left_out_in_both(
    in_processes: Any, clips: Path, make_core: Any, spec: Any, make_model: Any, make_hooks: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(clips, folder)
    core = make_core(folder)
    prepared = prepare(core, spec)
    (folder / "tall.mp4").write_bytes(b"overwritten")

    def work(rank: int) -> list[str]:
        run = Run(core, {}, process_index=rank, process_count=WORLD)
        cached = build_cache(run, make_model(), make_hooks(), prepared, show_progress=False)
        return [each.sample_id for each in cached.samples]

    (_, _, first), (_, _, second) = in_processes(work)
    assert first == second == str(["clips/wide two.mp4", "clips/wide.mp4"])


def test_what_is_for_one_is_refused_and_the_launchers_words_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.launched() == (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert processes.launched() == (1, 3)
    with pytest.raises(ConfigError, match=r"3 processes were launched, and `tuner cache --prune` is for one"):
        processes.refuse_several("`tuner cache --prune`")
