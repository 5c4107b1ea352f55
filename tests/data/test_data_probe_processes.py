"""Probing in processes that may die, and the index: idle on a second start, complete after an interruption."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tuner.builtin.datasets import probe as probing
from tuner.builtin.datasets import probe_pool
from tuner.builtin.datasets.probe import Probed, forget_missing
from tuner.builtin.datasets.probe_index import INDEX_NAME, open_index
from tuner.builtin.datasets.probe_pool import CRASHED
from tuner.builtin.datasets.scanning import PICTURE_SUFFIXES, VIDEO_SUFFIXES, local_listing
from tuner.errors import DataError
from tuner.testing.clips import render_clip

ALL_SUFFIXES = VIDEO_SUFFIXES | PICTURE_SUFFIXES
SIZE = {"width": 64, "height": 48}


def probe_folder(folder: Path, index: Path, *, processes: int = 0, **wanted: bool) -> list[Probed]:
    return list(probing.probe(local_listing(folder, ALL_SUFFIXES), index, processes=processes, **wanted))


def write_worker(folder: Path, code: str) -> Path:
    """A script ``own_probe.py`` for the probing processes: ``code`` runs before each file; its names go to a log."""
    log = folder / "probed names.log"
    indented = "".join(f"    {line}\n" for line in code.splitlines())
    (folder / "own_probe.py").write_text(
        "import os, signal, time\n"
        "from tuner.builtin.datasets import probe_file as module\noriginal = module.probe_file\n"
        f"def probe_file(path):\n    open({str(log)!r}, 'a').write(path.name + '\\n')\n{indented}"
        "    return original(path)\n"
        "module.probe_file = probe_file\nmodule.serve()\n"
    )
    return log


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], list[str]]]:
    """Have ``code`` run in the probing processes before each file; the answer says which names were probed."""

    def write(code: str) -> Callable[[], list[str]]:
        log = write_worker(tmp_path, code)
        monkeypatch.setattr(probe_pool, "WORKER", str(tmp_path / "own_probe.py"))
        return lambda: log.read_text().splitlines() if log.exists() else []

    return write


def test_a_second_start_opens_only_what_changed(
    clips: Path, tmp_path: Path, written: Callable[[str], Callable[[], list[str]]]
) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    (folder / "bad.mp4").write_text("no video")
    first = probe_folder(folder, tmp_path / "index")
    probed = written("pass")
    assert probe_folder(folder, tmp_path / "index") == first
    assert probed() == []
    os.utime(folder / "wide.mp4", ns=(1, 1))
    assert probe_folder(folder, tmp_path / "index") == first
    assert probed() == ["wide.mp4"]


def test_several_processes_find_the_same(clips: Path, tmp_path: Path) -> None:
    alone = probe_folder(clips, tmp_path / "one", processes=1)
    assert probe_folder(clips, tmp_path / "two", processes=2) == alone
    assert [each.name for each in alone] == sorted(each.name for each in alone)


def test_what_was_probed_before_an_interruption_is_kept(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = probing.probe_all

    def interrupted(*args: object) -> object:
        nonlocal calls
        for result in original(*args):  # type: ignore[arg-type]
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(probing, "probe_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe_folder(clips, tmp_path)
    with open_index(tmp_path) as index:
        assert len(index.rows()) == 2
    assert all(each.facts for each in probe_folder(clips, tmp_path))


def test_a_file_on_which_the_decoder_crashes_is_named_and_the_rest_is_kept(
    clips: Path, tmp_path: Path, written: Callable[[str], Callable[[], list[str]]]
) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    shutil.copy(folder / "wide.mp4", folder / "deadly 💥.mp4")
    shutil.copy(folder / "wide.mp4", folder / "lethal.mp4")
    probed = written("if path.name[0] in 'dl': os.kill(os.getpid(), signal.SIGSEGV)")
    results = {each.name: each for each in probe_folder(folder, tmp_path / "index", processes=2)}
    assert {name for name, each in results.items() if each.reason == CRASHED} == {"deadly 💥.mp4", "lethal.mp4"}
    assert all(each.facts for name, each in results.items() if name[0] not in "dl")
    assert probed().count("lethal.mp4") == 2, "it had a second chance"
    so_far = len(probed())
    probe_folder(folder, tmp_path / "index")
    assert len(probed()) == so_far, "it is not tried again"


def test_processes_that_do_not_start_are_an_error_and_no_reason_against_files(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_pool, "WORKER", str(tmp_path / "nowhere.py"))
    with pytest.raises(DataError, match="does not start"):
        probe_folder(clips, tmp_path)
    monkeypatch.undo()
    assert all(each.facts for each in probe_folder(clips, tmp_path))


def test_a_process_that_was_killed_once_is_no_reason(
    clips: Path, tmp_path: Path, written: Callable[[str], Callable[[], list[str]]]
) -> None:
    mark = tmp_path / "killed"
    written(f"if not os.path.exists({str(mark)!r}): open({str(mark)!r}, 'w'); os.kill(os.getpid(), signal.SIGKILL)")
    assert all(each.facts for each in probe_folder(clips, tmp_path / "index", processes=1))
    assert mark.exists()


def test_two_runs_at_once_probe_each_file_once(clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    log = write_worker(tmp_path, "time.sleep(0.2)")
    (tmp_path / "run.py").write_text(
        "from pathlib import Path\nfrom tuner.builtin.datasets import probe, probe_pool, scanning\n"
        f"probe_pool.WORKER = {str(tmp_path / 'own_probe.py')!r}\n"
        f"listing = scanning.local_listing(Path({str(folder)!r}), scanning.VIDEO_SUFFIXES)\n"
        f"print(list(probe.probe(listing, Path({str(tmp_path / 'index')!r}), processes=1, show_progress=False)))\n"
    )
    runs = [
        subprocess.Popen([sys.executable, str(tmp_path / "run.py")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert said[0] == said[1]
    assert sorted(log.read_text().splitlines()) == sorted(path.name for path in folder.glob("*.mp4"))


def test_an_interrupted_run_keeps_what_it_probed_and_leaves_no_process(clips: Path, tmp_path: Path) -> None:
    log = write_worker(tmp_path, f"open({str(tmp_path / 'ids')!r}, 'a').write(f'{{os.getpid()}} ')\ntime.sleep(0.3)")
    (tmp_path / "run.py").write_text(
        "from pathlib import Path\nfrom tuner.builtin.datasets import probe, probe_pool, scanning\n"
        f"probe_pool.WORKER = {str(tmp_path / 'own_probe.py')!r}\n"
        f"listing = scanning.local_listing(Path({str(clips)!r}), scanning.VIDEO_SUFFIXES)\n"
        f"probe.probe(listing, Path({str(tmp_path / 'index')!r}), processes=1, show_progress=False)\n"
    )
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert said.count("Traceback") == 1
    assert "KeyboardInterrupt" in said
    with open_index(tmp_path / "index") as index:
        assert 1 <= len(index.rows()) <= 2
    for process in map(int, (tmp_path / "ids").read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_removed_files_are_forgotten(clips: Path, tmp_path: Path) -> None:
    folder, index = tmp_path / "clips", tmp_path / "index"
    shutil.copytree(clips, folder)
    names = [each.name for each in probe_folder(folder, index)]
    (folder / names[0]).unlink()
    assert forget_missing(index, local_listing(folder, VIDEO_SUFFIXES)) == 1
    with open_index(index) as opened:
        assert len(opened.rows()) == len(names) - 1
    for name in names[1:]:
        (folder / name).unlink()
    render_clip(folder / "new.mp4", **SIZE, frames=3, fps=16, seed=1)
    probe_folder(folder, index)
    with open_index(index) as opened:
        assert list(opened.rows()) == [str(folder / "new.mp4")], "most were gone"


def test_files_that_another_dataset_keeps_in_the_same_index_are_not_forgotten(clips: Path, tmp_path: Path) -> None:
    folder, index = tmp_path / "more", tmp_path / "index"
    probe_folder(clips, index)
    render_clip(folder / "new.mp4", **SIZE, frames=3, fps=16, seed=1)
    probe_folder(folder, index)
    with open_index(index) as opened:
        assert len(opened.rows()) == len(local_listing(clips, VIDEO_SUFFIXES).files) + 1


def test_a_damaged_index_is_put_aside_and_made_again(clips: Path, tmp_path: Path) -> None:
    first = probe_folder(clips, tmp_path)
    (tmp_path / INDEX_NAME).write_bytes(b"not a database" * 100)
    assert probe_folder(clips, tmp_path) == first
    assert list(tmp_path.glob(f"{INDEX_NAME}.damaged-*"))


def test_an_index_of_another_version_is_filled_afresh(clips: Path, tmp_path: Path) -> None:
    first = probe_folder(clips, tmp_path)
    connection = sqlite3.connect(tmp_path / INDEX_NAME)
    connection.execute("DROP TABLE files")
    connection.execute("CREATE TABLE files (path TEXT)")
    connection.execute("PRAGMA user_version = 999")
    connection.commit()
    connection.close()
    assert probe_folder(clips, tmp_path) == first


def test_probing_processes_import_nothing_heavy() -> None:
    heavy = ("torch", "diffusers", "numpy", "rich")
    code = f"import sys, tuner.builtin.datasets.probe_file; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
