"""A server on this machine that speaks as much of the hub's API as downloading and uploading needs."""

from __future__ import annotations

import base64
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
        self.owner = "me"
        """whose repositories are made"""
        self.writers: set[str] = {"good-token"}
        """tokens that may write"""
        self.private: set[str] = set()
        """repositories that were made private"""
        self.commits: list[tuple[str, str, list[str]]] = []
        """repository, message and files of each commit"""
        self.stored: dict[str, bytes] = {}
        """contents of large files by their hash, committed or not"""
        self.faults: list[tuple[str, int | str]] = []
        """part of a path, and what comes of a write there, once: a status, ``close``, ``stall`` or ``nonsense``"""
        self.closed = threading.Event()
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
        self.closed.set()
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

    def do_POST(self) -> None:
        """Take what is written."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._is_faulty() or not self._may_write():
            return
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.split("/")
        if path == "api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif parts[4:5] == ["preupload"]:
            self._preupload("/".join(parts[2:4]), json.loads(body))
        elif parts[4:5] == ["commit"]:
            self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])
        else:  # the check of a card's head, and of a large file that was sent
            self._json({"errors": [], "warnings": []})

    def do_PUT(self) -> None:
        """Take a large file's content."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._is_faulty():
            self._hub.stored[hashlib.sha256(body).hexdigest()] = body
            self._reply(200, b"", {})

    @property
    def _hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def _is_faulty(self) -> bool:
        """Whether something goes wrong with this request, as ``faults`` wants it."""
        hub = self._hub
        fault = next((each for each in hub.faults if each[0] in self.path), None)
        if fault is None:
            return False
        hub.faults.remove(fault)
        if isinstance(fault[1], int):
            self._reply(fault[1], b"{}", {"X-Error-Message": "as the test wants it"})
        elif fault[1] == "nonsense":
            self._reply(200, b"<html>all is well", {"Content-Type": "text/html"})
        else:
            if fault[1] == "stall":
                hub.closed.wait(60)
            self.close_connection = True
        return True

    def _may_write(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self._hub.writers:
            self._reply(401, b'{"error": "Invalid credentials"}', {"X-Error-Message": "Invalid credentials"})
        return token in self._hub.writers

    def _create(self, wanted: Mapping[str, Any]) -> None:
        hub = self._hub
        name = f"{wanted.get('organization') or hub.owner}/{wanted['name']}"
        exists = name in hub.repositories
        if not exists:
            hub.repositories[name] = {}
            if wanted.get("private") or wanted.get("visibility") == "private":
                hub.private.add(name)
        self._json({"url": f"{hub.address}/{name}", "name": name}, status=409 if exists else 200)

    def _preupload(self, name: str, wanted: Mapping[str, Any]) -> None:
        there = self._hub.repositories[name]
        files = []
        for each in wanted["files"]:
            large = each["path"].endswith((".safetensors", ".mp4"))
            content = there.get(each["path"])
            oid = None if content is None else _object_id(content, large=large)
            mode = "lfs" if large else "regular"
            files.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _batch(self, wanted: Mapping[str, Any]) -> None:
        hub = self._hub
        objects = []
        for each in wanted["objects"]:
            upload = {"href": f"{hub.address}/large/{each['oid']}"}
            verify = {"href": f"{hub.address}/verify/{each['oid']}"}
            actions = {} if each["oid"] in hub.stored else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": each["oid"], "size": each["size"], **actions})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, lines: list[Mapping[str, Any]]) -> None:
        hub = self._hub
        contents = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                contents[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                contents[value["path"]] = hub.stored[value["oid"]]
        hub.repositories[name] |= contents
        summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        hub.commits.append((name, summary, sorted(contents)))
        commit = hub.commit(name)
        self._json({"success": True, "commitUrl": f"{hub.address}/{name}/commit/{commit}", "commitOid": commit})

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

    def _json(self, value: Any, status: int = 200) -> None:
        self._reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

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


def _object_id(content: bytes, *, large: bool) -> str:
    """The name of a file's content: of a large one the hash, of a small one git's."""
    return (
        hashlib.sha256(content).hexdigest()
        if large
        else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    )
