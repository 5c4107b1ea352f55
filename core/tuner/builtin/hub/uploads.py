"""Uploads one after the other, each in a process of its own, tried again where that may help.

A process, not a thread: it can be ended when a server stalls, whatever the library waits for, and its hashing and
sending take nothing from the run but what the machine has left over.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

from tuner.builtin.hub.jobs import Job, clear
from tuner.builtin.progress import progress

PAUSES = (5.0, 15.0, 30.0, 60.0, 120.0, 240.0)
"""Seconds before each further attempt."""
PATIENCE = 120.0
"""Seconds without a sign of life after which an attempt is ended, beside those that a file's bytes take."""
SLOWEST = 50_000
"""Bytes a second that an upload has at least."""
MEGABYTE = 1_000_000


class Uploads:
    """The uploads of one run. Nothing here raises or makes the run wait, but :meth:`finish`."""

    def __init__(self, output_dir: Path, repository: str, private: bool, log: logging.Logger) -> None:
        """Begin. ``repository``: ``name`` or ``owner/name``; ``private``: whether it is, where it is made."""
        clear(output_dir)
        self._output_dir, self._repository, self._private, self._log = output_dir, repository, private, log
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._ending = self._abandoned = False
        self._child: subprocess.Popen[str] | None = None
        self._address = repository
        self._uploaded: list[str] = []
        self._missing: dict[str, str] = {}
        self._sent = 0
        self._reasons: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
        self._thread.start()

    def offer(self, job: Job) -> None:
        """Have it uploaded soon. A checkpoint that still waits makes room for a newer one."""
        with self._changed:
            for old in [each for each in self._waiting if each.replaceable and job.replaceable]:
                self._waiting.remove(old)
                self._lose(old, f"{job.name} came before its turn")
            self._waiting.append(job)
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until all is uploaded or given up, with a bar."""
        with self._changed:
            self._ending = True
            total = max(1, sum(job.bytes for job in self._waiting) // MEGABYTE)
            self._changed.notify_all()
            seen = self._sent
        with progress(f"uploading to {self._address} (MB)", total) as advance:
            while self._thread.is_alive():
                self._thread.join(0.2)
                done = (self._sent - seen) // MEGABYTE
                seen += done * MEGABYTE
                if done:
                    advance(done)

    def abandon(self, why: str) -> None:
        """End at once: what is not uploaded stays here."""
        with self._changed:
            self._ending = self._abandoned = True
            while self._waiting:
                self._lose(self._waiting.popleft(), why)
            if self._child is not None:
                self._child.kill()
            self._changed.notify_all()
        self._thread.join(PATIENCE)

    def report(self) -> dict[str, Any]:
        """``address`` of the repository, names of what was ``uploaded``, and of what is ``missing`` with the reason."""
        missing = {name: why for name, why in self._missing.items() if name not in self._uploaded}
        return {"address": self._address, "uploaded": list(self._uploaded), "missing": missing}

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._upload(job)
            except Exception as error:  # whatever it is, the run goes on
                self._lose(job, f"{type(error).__name__}: {error}")
            finally:
                job.release()
        clear(self._output_dir)

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending)
            return self._waiting.popleft() if self._waiting else None

    def _upload(self, job: Job) -> None:
        """Try until it is uploaded, cannot be, or is not wanted any more."""
        for pause in (*PAUSES, None):
            answer = self._attempt(job)
            if answer["event"] == "done":
                self._uploaded.append(job.name)
                self._log.info("hub: uploaded %s: %s", job.name, answer["address"])
                return
            why = str(answer["why"])
            if why not in self._reasons:
                self._reasons.add(why)
                self._log.warning("hub: %s is not uploaded yet: %s; the run goes on", job.name, why)
            if answer.get("final") or pause is None or self._unwanted(job, pause):
                self._lose(job, why)
                return

    def _unwanted(self, job: Job, pause: float) -> bool:
        """Wait ``pause`` seconds; whether a newer checkpoint, or an order to stop, came meanwhile."""

        def over() -> bool:
            newer = job.replaceable and any(each.replaceable for each in self._waiting)
            return self._abandoned or newer

        with self._changed:
            return self._changed.wait_for(over, timeout=pause)

    def _attempt(self, job: Job) -> dict[str, Any]:
        """What a process of its own says in the end about uploading ``job``."""
        with self._changed:
            if self._abandoned:
                return {"event": "failed", "final": True, "why": "the run ended before it was uploaded"}
            self._child = child = subprocess.Popen(
                [sys.executable, "-m", "tuner.builtin.hub.upload"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is for the run, which decides
            )
        try:
            return self._followed(child, job)
        finally:
            child.kill()
            child.wait()
            self._child = None

    def _followed(self, child: subprocess.Popen[str], job: Job) -> dict[str, Any]:
        """Hand the job over and listen; a child that is silent for too long is ended."""
        assert child.stdin is not None
        assert child.stdout is not None
        order = {
            "repository": self._repository,
            "private": self._private,
            "message": job.message,
            "files": [[name, str(path)] for name, path in job.files],
        }
        stalled = threading.Event()
        answer: dict[str, Any] | None = None
        timer = self._timer(child, stalled, 0)
        try:
            child.stdin.write(json.dumps(order) + "\n")
            child.stdin.flush()
            for line in child.stdout:
                timer.cancel()
                said = json.loads(line)
                timer = self._timer(child, stalled, said.get("bytes", 0))
                self._sent += said.get("sent", 0)
                self._address = said.get("repository", self._address)
                if said["event"] == "kept":
                    self._log.info("hub: %s of %s was not written by tuner and is kept", said["path"], self._address)
                if said["event"] in ("done", "failed"):
                    answer = said
        except OSError as error:
            return {"event": "failed", "why": f"the upload could not be started: {error}"}
        finally:
            timer.cancel()
        silence = "the hub gave no sign of life" if stalled.is_set() else "the process that uploads ended"
        return answer or {"event": "failed", "why": silence}

    def _timer(self, child: subprocess.Popen[str], stalled: threading.Event, count: int) -> threading.Timer:
        """Ends ``child`` when it is silent for longer than sending ``count`` bytes may take."""

        def end() -> None:
            stalled.set()
            child.kill()

        timer = threading.Timer(PATIENCE + count / SLOWEST, end)
        timer.daemon = True
        timer.start()
        return timer

    def _lose(self, job: Job, why: str) -> None:
        self._missing[job.name] = why
        job.release()
