"""A server on this machine that speaks as much of the hub's API as downloading models and datasets needs."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories by name: their files by path, and what is refused."""

    def __init__(
        self,
        repositories: Mapping[str, Mapping[str, bytes]],
        gated: tuple[str, ...] = (),
        breaks: Mapping[str, int] | None = None,
    ) -> None:
        """Serve ``repositories``. ``breaks``: the connection breaks once after so many bytes of a file."""
        self.repositories = {name: dict(files) for name, files in repositories.items()}
        self.gated = gated
        self.sent: list[str] = []
        """files whose content was sent"""
        self.ranges: list[tuple[str, int]] = []
        """files that were asked for from some byte on"""
        self.breaks = dict(breaks or {})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.hub = self  # type: ignore[attr-defined]
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def commit(self, name: str) -> str:
        """The commit that ``main`` is at: another content, another commit."""
        files = self.repositories[name]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def stop(self) -> None:
        """Close the door."""
        self.server.shutdown()
        self.server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with the content."""
        self._answer(send=True)

    def do_HEAD(self) -> None:
        """Answer with the facts alone."""
        self._answer(send=False)

    def _answer(self, *, send: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            self._api(hub, "/".join(parts[2:4]), parts[4:])
        else:
            parts = parts[1:] if parts[0] == "datasets" else parts
            self._file(hub, "/".join(parts[:2]), "/".join(parts[4:]), send=send)

    def _api(self, hub: Hub, name: str, rest: list[str]) -> None:
        if name not in hub.repositories:
            self._reply(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif rest[:1] == ["revision"] and rest[1] not in ("main", hub.commit(name)):
            self._reply(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        elif rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}
                for path, content in hub.repositories[name].items()
            ]
            self._json(tree)
        else:
            siblings = [{"rfilename": path} for path in hub.repositories[name]]
            self._json({"id": name, "sha": hub.commit(name), "siblings": siblings, "private": False, "tags": []})

    def _file(self, hub: Hub, name: str, path: str, *, send: bool) -> None:
        if name in hub.gated:
            self._reply(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            return
        content = hub.repositories.get(name, {}).get(path)
        if content is None:
            self._reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": hub.commit(name), "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0] or 0)
        if start:
            hub.ranges.append((path, start))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if send:
            hub.sent.append(path)
        most = hub.breaks.pop(path, None) if send else None
        self._reply(206 if start else 200, content[start:], headers, send=send, most=most)

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _reply(
        self, status: int, body: bytes, headers: Mapping[str, str], *, send: bool = True, most: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send and self.command != "HEAD":
            self.wfile.write(body[:most])
            self.close_connection = most is not None

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
