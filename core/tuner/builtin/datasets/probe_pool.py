"""Probing files in other processes, so that a file on which the decoder crashes takes nothing else with it.

Not a pool of ``multiprocessing``: that imports the main program again in each process (a second or two), does not say
on which file a process died, and leaves processes behind when this one is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from tuner.builtin.datasets import probe_file
from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.data.source import Found
from tuner.errors import DataError

WORKER = probe_file.__file__
"""The script that each process runs: by its path, so that nothing around it is imported."""
CRASHED = "the decoder crashed on it"
FILES_EACH = 8
"""New files that are worth another process: starting one takes a fifth of a second."""
Result = tuple[Found, VideoFacts | str]


def probe_all(new: Sequence[Found], processes: int = 0) -> Iterator[Result]:
    """Probe each file, in no particular order.

    A file on which a process dies gets another try in a new process; when that dies too, its reason is
    :data:`CRASHED`.

    Arguments
        processes: how many at once; 0 is one per core.
    Raises DataError when no process can be started.
    """
    workers = min(processes or os.cpu_count() or 1, 1 + (len(new) - 1) // FILES_EACH)
    waiting = deque(new)
    results: SimpleQueue[Result | BaseException] = SimpleQueue()
    if not new:
        return
    with ThreadPoolExecutor(workers) as threads:
        for _ in range(workers):
            threads.submit(_probe_waiting, waiting, results)
        try:
            for _ in new:
                result = results.get()
                if isinstance(result, OSError):
                    raise DataError(f"no process can be started to probe files: {result}") from result
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            waiting.clear()  # else an interruption would wait for all of them


def _probe_waiting(waiting: deque[Found], results: SimpleQueue[Result | BaseException]) -> None:
    """Probe with a process of its own what is waiting, until nothing is."""
    worker: _Worker | None = None
    try:
        while waiting:
            try:
                found = waiting.popleft()
            except IndexError:  # another thread was first
                break
            worker = worker or _Worker()
            result = worker.probe(found.path)
            if result is None:
                worker.close()
                worker = _Worker()
                result = worker.probe(found.path)
            if result is None:
                worker.close()
                worker = None
            results.put((found, CRASHED if result is None else result))
    except BaseException as error:  # raised again where the results are awaited
        results.put(error)
    finally:
        if worker is not None:
            worker.close()


class _Worker:
    """A process that probes one file after the other. It ends when this one does, because nobody asks any more."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C reaches every process of a terminal's session
            encoding="ascii",
        )
        if not self._answer():
            self.close()
            raise DataError("a process that probes files does not start; see what it says above")

    def probe(self, path: str) -> VideoFacts | str | None:
        """What is in the file, the reason why that is unknown, or None when the process died of it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(path) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self._answer()
        result = json.loads(answer) if answer else None
        return VideoFacts(*result) if isinstance(result, list) else result

    def _answer(self) -> str:
        """The next line; nothing when the process is dead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return line if line.endswith("\n") else ""

    def close(self) -> None:
        """End the process; it is doing nothing."""
        self._process.kill()
        self._process.communicate()
