"""``tuner report --serve``: what it gives, and to whom it gives nothing."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tuner.builtin.report.serve import Server
from tuner.cli import app
from tuner.errors import ConfigError

CLIP = "validation/step-1000/cat.mp4"


@pytest.fixture
def served(output: Path) -> Iterator[Server]:
    (output / "secret.txt").write_text("mine", encoding="utf-8")
    with Server(output, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def get(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def test_it_listens_on_loopback_alone(served: Server) -> None:
    assert served.socket.getsockname()[0] == "127.0.0.1"
    assert get(served, "/")[2]["Location"] == "/report/index.html"
    assert get(served, "/report/index.html")[0] == 200


def test_a_name_that_leads_here_from_elsewhere_is_refused(served: Server) -> None:
    assert get(served, "/report/index.html", Host="evil.example")[0] == 403
    assert get(served, "/report/index.html", Host="localhost:1")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt",
        "/train.jsonl",
        "/validation/",
        "/validation/step-1000/",
        "/validation/step-1000/validation.json",
        "/validation/step-1000/../../secret.txt",
        "/report/%2e%2e/secret.txt",
        "/../../etc/passwd",
        "//etc/passwd",
    ],
)
def test_nothing_but_what_the_page_shows_is_given(served: Server, path: str) -> None:
    status, body, _ = get(served, path)
    assert status == 404
    assert b"mine" not in body


def test_clips_are_given_whole_and_in_parts(served: Server, output: Path) -> None:
    whole = (output / CLIP).read_bytes()
    status, body, headers = get(served, f"/{CLIP}")
    assert (status, body, headers["Content-Type"]) == (200, whole, "video/mp4")
    status, body, headers = get(served, f"/{CLIP}", Range="bytes=10-19")
    assert (status, body, headers["Content-Range"]) == (206, whole[10:20], f"bytes 10-19/{len(whole)}")
    assert get(served, f"/{CLIP}", Range="bytes=10-")[1] == whole[10:]
    assert get(served, f"/{CLIP}", Range="bytes=-10")[1] == whole[-10:]
    assert get(served, f"/{CLIP}", Range=f"bytes={len(whole)}-")[0] == 416
    assert get(served, f"/{CLIP}", method="HEAD")[:2] == (200, b"")
    assert get(served, "/validation/step-1000/dog%20%232.mp4")[0] == 200


def test_a_port_that_is_taken_is_said(served: Server, output: Path) -> None:
    answer = CliRunner().invoke(app, ["report", str(output), "--serve", "--port", str(served.server_address[1])])
    assert isinstance(answer.exception, ConfigError)
    assert "--port" in str(answer.exception)
