"""Requests for sources, a clip, and a web server on this machine."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuner.builtin.sources import attempts
from tuner.builtin.sources.registry import SOURCES
from tuner.config import faults
from tuner.data.source import Listing, Request
from tuner.testing.clips import render_clip

VIDEO = frozenset({".mp4", ".webm"})
Listed = Callable[..., Listing]


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real clip of five frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    render_clip(path, width=32, height=32, frames=5, fps=8, seed=1)
    return path.read_bytes()


@pytest.fixture
def listed(tmp_path: Path) -> Listed:
    """Asks a source for its files; ``keys`` are the source's own."""

    def ask(kind: str, *, folder: str | None = None, suffixes: frozenset[str] = VIDEO, **keys: Any) -> Listing:
        source = SOURCES[kind]
        entry = {"id": "d", "dataset_type": "video", "instance_data_dir": folder}
        own = faults.build(source.keys, keys)
        return source.listing(Request("d", entry, own, suffixes, tmp_path / "copies", show_progress=False))

    return ask


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "PAUSE_SECONDS", 0.0)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, notes what is asked for, and fails where it is told to."""

    def send_head(self) -> Any:
        served: Served = self.server.served  # type: ignore[attr-defined]
        served.asked.append((self.command, self.path.partition("?")[0]))
        for number, (part, status) in enumerate(served.failures):
            if part in self.path:
                del served.failures[number]
                self.send_error(status)
                return None
        if self.command == "GET" and any(part in self.path for part in served.broken):
            self.send_error(503)
            return None
        return super().send_head()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Served:
    """A web server with a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str]] = []
        self.failures: list[tuple[str, int]] = []
        """parts of paths that fail once with a status"""
        self.broken: set[str] = set()
        """parts of paths whose content always fails"""
        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.served = self  # type: ignore[attr-defined]
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def fetched(self) -> list[str]:
        """Files that were sent, sorted."""
        return sorted(path for command, path in self.asked if command == "GET" and not path.endswith("/"))

    def stop(self) -> None:
        """Close the door."""
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    folder = tmp_path / "served"
    folder.mkdir()
    server = Served(folder)
    yield server
    server.stop()
