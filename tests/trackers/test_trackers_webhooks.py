"""What a webhook is posted, by a server of our own that keeps it."""

from __future__ import annotations

import base64
import email
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tuner.builtin.trackers import webhook
from tuner.builtin.trackers.webhook import Webhook
from tuner.builtin.trackers.webhook_settings import Settings
from tuner.errors import TunerError

Run = Callable[..., Path]


class Server(ThreadingHTTPServer):
    """Keeps what is posted; answers with ``status``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.posted: list[tuple[str, bytes]] = []
        self.status = 204

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hooks/SECRET"

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.posted]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append((self.headers["Content-Type"], body))
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def written(folder: Path, server: Server, **keys: str) -> str:
    path = folder / "webhook.json"
    path.write_text(json.dumps({"webhook_type": "raw", "callback_url": server.address, **keys}))
    return str(path)


RENDERED = {
    "disable_benchmark": True,
    "validation_prompt": "a red square",
    "validation_step_interval": 4,
    "validation_num_inference_steps": 1,
    "validation_resolution": "64x64",
    "validation_num_video_frames": 5,
}


def test_a_run_posts_its_start_validations_checkpoints_and_end(run: Run, server: Server, tmp_path: Path) -> None:
    output = run(tmp_path / "out", webhook_config=written(tmp_path, server), **RENDERED)
    messages = server.messages
    assert [each["event"] for each in messages] == ["start", "validation", "checkpoint", "end"]
    assert {each["prefix"] for each in messages} == {"out"}
    assert messages[0]["total_steps"] == 4
    assert messages[2]["checkpoint"] == str(output / "checkpoint-4")
    files = {each["name"]: each for each in messages[1]["files"]}
    clip = next(name for name in files if name.endswith(".mp4"))
    assert files[clip]["type"] == "video/mp4"
    assert base64.b64decode(files[clip]["base64"]) == (output / "validation" / "step-4" / clip).read_bytes()


def test_an_error_is_posted_with_its_first_line(
    run: Run, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TunerError("no room on s3://login:word@bucket?sig=1", remedy="buy some")

    monkeypatch.setattr("tuner.train.loop.train_step", fail)
    with pytest.raises(TunerError):
        run(tmp_path / "out", webhook_config=written(tmp_path, server, log_level="error"))
    [message] = server.messages
    assert (message["event"], message["message"]) == ("error", "failed after step 0: no room on s3://bucket")


def test_at_debug_every_line_of_the_log_is_posted(run: Run, server: Server, tmp_path: Path) -> None:
    run(tmp_path / "out", webhook_config=written(tmp_path, server, log_level="debug"))
    lines = [each for each in server.messages if each["event"] == "log"]
    assert [each["step"] for each in lines] == [1, 2, 3, 4]
    assert all(each["loss"] > 0 for each in lines)


def test_a_webhook_that_refuses_ends_no_run_and_its_address_is_not_shown(
    run: Run, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status = 404
    path = written(tmp_path, server)
    assert (run(tmp_path / "out", webhook_config=path) / "checkpoint-4").is_dir()
    assert "webhook_config failed: the server answers 404" in caplog.text
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(webhook, "TRIES", 0)
    caplog.clear()
    assert (run(tmp_path / "again", webhook_config=path) / "checkpoint-4").is_dir()
    assert "the server cannot be reached" in caplog.text
    assert "SECRET" not in caplog.text
    assert "SECRET" not in (tmp_path / "again" / "checkpoint-4" / "manifest.json").read_text()


def test_discord_gets_messages_with_files_ten_at_a_time(server: Server, tmp_path: Path) -> None:
    files = []
    for number in range(12):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(files[-1])
    settings = Settings(webhook_type="discord", webhook_url=server.address, message_prefix="mine")
    Webhook(settings, "out").post("info", "validation", "step 4 @everyone", {}, files)
    found = []
    for kind, body in server.posted:
        parts = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body).get_payload()
        message = json.loads(parts[0].get_payload(decode=True))  # type: ignore[index, union-attr, arg-type]
        assert message["allowed_mentions"] == {"parse": []}
        found.append((message["content"], [part.get_filename() for part in parts[1:]]))  # type: ignore[union-attr, index]
    assert found == [
        ("[mine] step 4 @everyone", [f"{number}.png" for number in range(10)]),
        ("[mine] step 4 @everyone (2 of 2)", ["10.png", "11.png"]),
    ]


def test_a_file_too_large_is_named_and_left_out(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "BYTES", 100)
    large, small = tmp_path / "large.mp4", tmp_path / "small.mp4"
    large.write_bytes(bytes(101))
    small.write_bytes(bytes(100))
    Webhook(Settings(callback_url=server.address), "out").post("info", "validation", "clips", {}, [large, small])
    [message] = server.messages
    assert message["message"] == "clips (too large to be posted: large.mp4)"
    assert [each["name"] for each in message["files"]] == ["small.mp4"]
