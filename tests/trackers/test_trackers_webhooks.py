"""What a webhook is posted, by a server of our own that keeps it."""

from __future__ import annotations

import base64
import email
import json
import logging
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tuner.builtin import outbox
from tuner.builtin.webhook import post
from tuner.builtin.webhook.post import Webhook
from tuner.builtin.webhook.settings import Settings, read
from tuner.errors import TunerError

Run = Callable[..., Path]


class Server(ThreadingHTTPServer):
    """Keeps what is posted; answers with ``status``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.posted: list[tuple[str, bytes]] = []
        self.status = 204
        self.first: list[int | str] = []
        """what comes of the first messages instead: a status, ``close``, ``nonsense``, ``endless`` or ``stall``"""
        self.closed = Event()
        self.poured = 0

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
        instead = self.server.first.pop(0) if self.server.first else None
        if instead == "endless":
            self.send_response(200)
            self.send_header("Content-Length", str(2**33))
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(2**20))
                    self.server.poured += 1
            except OSError:
                self.close_connection = True
                return
        if instead in ("close", "stall"):
            if instead == "stall":
                self.server.closed.wait(30)
            self.close_connection = True
            return
        self.server.posted.append((self.headers["Content-Type"], body))
        self.send_response(instead if isinstance(instead, int) else self.server.status)
        if instead == 307:
            self.send_header("Location", "/elsewhere")
        if instead == 429:
            self.send_header("Retry-After", "0")
        if instead == "nonsense":
            self.send_header("Content-Length", "999")
            self.end_headers()
            self.wfile.write(b"<html>it is all")
            self.close_connection = True
            return
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
    made.closed.set()
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
    told = [each for each in server.messages if each["event"] == "progress"]
    assert [each["step"] for each in told] == [2, 3]  # each begins another tenth of the four
    assert all(each["seconds_left"] >= 0 and " left" in each["message"] for each in told)
    messages = [each for each in server.messages if each["event"] != "progress"]
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
    monkeypatch.setattr(post, "TRIES", 0)
    caplog.clear()
    assert (run(tmp_path / "again", webhook_config=path) / "checkpoint-4").is_dir()
    assert "the server cannot be reached" in caplog.text
    assert "SECRET" not in caplog.text
    written_files = [each for each in (tmp_path / "again").rglob("*") if each.is_file()]
    assert {"manifest.json", "index.html", "run.json", "events.jsonl", "train.jsonl"} <= {
        each.name for each in written_files
    }
    assert not any(b"SECRET" in each.read_bytes() for each in written_files)


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
    monkeypatch.setattr(post, "BYTES", 100)
    large, small = tmp_path / "large.mp4", tmp_path / "small.mp4"
    large.write_bytes(bytes(101))
    small.write_bytes(bytes(100))
    Webhook(Settings(callback_url=server.address), "out").post("info", "validation", "clips", {}, [large, small])
    [message] = server.messages
    assert message["message"] == "clips (too large to be posted: large.mp4)"
    assert [each["name"] for each in message["files"]] == ["small.mp4"]


@pytest.mark.parametrize("fault", [429, 503, "close", "nonsense"])
def test_a_server_that_fails_once_gets_every_message(server: Server, fault: int | str) -> None:
    server.first = [fault]
    Webhook(Settings(webhook_type="raw", callback_url=server.address), "run").post("info", "start", "hello", {})
    assert server.messages[-1]["message"] == "hello"


def test_a_server_that_stalls_ends_no_run_and_is_waited_for_no_longer_than_promised(
    run: Run, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "PATIENCE", 0.5)
    server.first = ["stall"] * 20
    assert (run(tmp_path / "out", webhook_config=written(tmp_path, server)) / "checkpoint-4").is_dir()
    assert "webhook_config does not answer: the run ends without it" in caplog.text


def test_a_preview_is_posted_with_its_picture(server: Server, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from tuner.builtin.webhook.reporter import WebhookReporter
    from tuner.validate.results import Preview

    picture = tmp_path / "step-05.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(picture)
    told: Any = SimpleNamespace(step=7, total_steps=9, output_dir=tmp_path, log=logging.getLogger("tuner"))
    reporter = WebhookReporter(told, Webhook(Settings(callback_url=server.address), "run"))
    reporter.preview(told, Preview("cat", "a cat", 5, 20, picture))
    outbox.finish([reporter.outbox], at_once=False)
    [message] = [each for each in server.messages if each["event"] == "preview"]
    assert (message["sampling_step"], message["of"], message["prompt"]) == (5, 20, "a cat")
    assert base64.b64decode(message["files"][0]["base64"]) == picture.read_bytes()


@pytest.mark.parametrize("fault", [307, 404, 429, 500])
def test_what_a_server_refuses_with_is_said_and_only_one_that_is_busy_is_asked_again(
    server: Server, fault: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(post, "LONGEST_WAIT", 0.0)
    server.first = [fault] * 9
    with pytest.raises(RuntimeError, match=f"the server answers {fault}"):
        Webhook(Settings(callback_url=server.address), "run").post("info", "start", "hello", {})
    assert len(server.posted) == (post.TRIES + 1 if fault in (429, 500) else 1)


def test_a_server_that_breaks_off_puts_the_address_into_nobodys_log(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(post, "LONGEST_WAIT", 0.0)
    caplog.set_level(logging.DEBUG)
    server.first = ["close"] * 9
    with pytest.raises(RuntimeError, match="cannot be reached"):
        Webhook(Settings(callback_url=server.address), "run").post("info", "start", "hello", {})
    server.first = []
    Webhook(Settings(callback_url=server.address), "run").post("info", "start", "hello", {})
    assert "SECRET" not in caplog.text


def test_an_answer_without_an_end_is_not_read(server: Server) -> None:
    server.first = ["endless"]
    Webhook(Settings(callback_url=server.address), "run").post("info", "start", "hello", {})
    assert server.poured < 64


@pytest.mark.parametrize("name", ["webhook_url", "callback_url", "webhook_type", "log_level"])
def test_an_address_in_a_wrong_place_is_not_shown(tmp_path: Path, name: str) -> None:
    path = tmp_path / "webhook.json"
    address = "https://example.com/SECRET"
    path.write_text(json.dumps({name: [address] if name.endswith("url") else address}))
    with pytest.raises(TunerError, match=name) as caught:
        read(path)
    assert "SECRET" not in str(caught.value)
