"""``tuner report --serve``: the page of a run that goes, on this machine alone."""

from __future__ import annotations

import json
import re
import shutil
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mimetypes import guess_type
from pathlib import Path
from threading import Lock
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from tuner.builtin.report import page
from tuner.builtin.report.diary import EVENTS, FOLDER
from tuner.builtin.report.story import Story
from tuner.errors import ConfigError
from tuner.train.log import NAME as LOG

LOOPBACK = "127.0.0.1"
PORT = 8765
NAMES = frozenset({LOOPBACK, "localhost"})
"""Hosts that a request may name: a site elsewhere whose name leads here is refused."""
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Server(ThreadingHTTPServer):
    """Serves one output folder: the page, its data, and the files that the page shows; nothing else."""

    daemon_threads = True

    def __init__(self, output_dir: Path, port: int = PORT) -> None:
        self.output_dir = output_dir
        self._lock = Lock()
        self._known: tuple[object, Story] | None = None
        try:
            super().__init__((LOOPBACK, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"port {port} of this machine cannot be listened on: {error}", remedy="name another with --port"
            ) from None

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_address[1]}/{FOLDER}/{page.NAME}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Let those who went away go; anything else is a defect and is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def story(self) -> Story:
        """The run as its files say; read again where they changed."""
        with self._lock:
            mark = tuple(_mark(path) for path in (self.output_dir / LOG, self.output_dir / FOLDER / EVENTS))
            if self._known is None or self._known[0] != mark:
                self._known = (mark, Story.read(self.output_dir))
            return self._known[1]


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with the page, its data, or a file that the page shows."""
        if (self.headers.get("Host") or "").partition(":")[0] not in NAMES:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if not path:
            self._send_head(HTTPStatus.FOUND, 0, Location=f"/{FOLDER}/{page.NAME}")
        elif path == f"{FOLDER}/{page.NAME}":
            self._send(page.page(self.server.story().as_json()), "text/html; charset=utf-8")
        elif path == f"{FOLDER}/data.json":
            self._send(json.dumps(self.server.story().as_json(), allow_nan=False), "application/json")
        elif path in self.server.story().files():
            self._send_file(self.server.output_dir / path)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_HEAD(self) -> None:
        """The same without a body."""
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a line each few seconds tells nobody anything."""

    def _send(self, text: str, kind: str) -> None:
        body = text.encode()
        self._send_head(HTTPStatus.OK, len(body), **{"Content-Type": kind, "Cache-Control": "no-store"})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_file(self, path: Path) -> None:
        """A file or the part of it that is asked for: players skip through clips by parts."""
        try:
            file = path.open("rb")
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with file:
            size = path.stat().st_size
            kind = {"Content-Type": guess_type(path.name)[0] or "application/octet-stream", "Accept-Ranges": "bytes"}
            part = _part(self.headers.get("Range"), size)
            if part is None:
                self._send_head(HTTPStatus.OK, size, **kind)
            elif not part:
                self._send_head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, **{"Content-Range": f"bytes */{size}"})
                return
            else:
                extent = f"bytes {part.start}-{part.stop - 1}/{size}"
                self._send_head(HTTPStatus.PARTIAL_CONTENT, len(part), **kind, **{"Content-Range": extent})
            if self.command != "HEAD":
                self._copy(file, part)

    def _copy(self, file: BinaryIO, part: range | None) -> None:
        if part is None:
            shutil.copyfileobj(file, self.wfile)
            return
        file.seek(part.start)
        left = len(part)
        while left and (piece := file.read(min(left, 1 << 20))):
            self.wfile.write(piece)
            left -= len(piece)

    def _send_head(self, status: HTTPStatus, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length), "X-Content-Type-Options": "nosniff"}.items():
            self.send_header(name, value)
        self.end_headers()


def _mark(path: Path) -> object:
    """What changes when a file does."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _part(header: str | None, size: int) -> range | None:
    """The bytes that a ``Range`` header asks for; None for all of them, an empty range where there are none."""
    found = _RANGE.fullmatch(header or "")
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        return range(max(0, size - int(last)), size)
    return range(int(first), min(size, int(last) + 1 if last else size))
