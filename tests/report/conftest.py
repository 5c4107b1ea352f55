"""A real browser without a window, and folders of runs to look at."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tuner import pipeline
from tuner.assembly import assemble
from tuner.builtin.sampling.media import write_mp4, write_png
from tuner.testing.clips import render_clip
from tuner.testing.plugin_env import importable, toy_distribution
from tuner.testing.project import flat_config, video_entry
from tuner.testing.toy import build_toy

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
STEPS = 3000
LIMIT = 30
"""Seconds to wait for the browser."""


class Browser:
    """Chromium, steered by its DevTools protocol over two pipes."""

    def __init__(self, profile: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._number, self._buffer = 0, b""
        theirs, self._out = os.pipe()
        self._in, answers = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --mute-audio"
        start = f'exec "$0" "$@" 3<&{theirs} 4>&{answers}'
        assert CHROMIUM
        arguments = [CHROMIUM, *flags.split(), "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", start, *arguments],
            pass_fds=(theirs, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser for something and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return dict(answer["result"])

    def open(self, address: str, *, width: int = 1200, dark: bool = False) -> None:
        """Load a page and wait until it is drawn."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def do(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until an expression holds in the page."""
        ends = time.monotonic() + LIMIT
        while not self.do(script):
            assert time.monotonic() < ends, f"never: {script}"
            time.sleep(0.05)

    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        found = [
            each["params"]["request"]["url"] for each in self.events if each["method"] == "Network.requestWillBeSent"
        ]
        return [address for address in found if not address.startswith(("data:", "blob:"))]

    def complaints(self) -> list[dict[str, Any]]:
        """Errors and warnings of the console, and uncaught exceptions."""
        loud = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [each for each in self.events if each["method"] in loud]

    def picture(self, path: Path) -> None:
        """Write what the window shows."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        """End the browser."""
        self._session = None
        os.write(self._out, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
        os.close(self._out)
        os.close(self._in)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], LIMIT)
            piece = os.read(self._in, 1 << 20) if ready else b""
            assert piece, "the browser does not answer"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser; without one on the machine the test is skipped."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long run: two prompts, average weights, held-out loss, and names that would break out of a page."""
    folder = tmp_path_factory.mktemp("runs") / "my <b>run"
    folder.mkdir()
    lines = []
    for step in range(1, STEPS + 1):
        line = {"step": step, "epoch": step // 100, "loss": 1 / step**0.5 + step % 7 / 50, "learning_rate": 1e-4}
        line |= {"grad_norm": 0.5, "samples": 2, "seconds": 0.25, "peak_memory_bytes": 12 * 2**30, "tread/dropped": 0.5}
        line |= {"metrics/samples_per_second": 8.0}
        if step % 100 == 0:
            line |= {f"noise_levels/loss/0.{part}": part / 10 + 1 / step for part in range(10)}
            line |= {"evaluation/loss": 1.0, "evaluation/loss@ema": 0.9, "evaluation/loss/t500": 1.1}
        lines.append(line)
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    memory = {"predicted": {"block at work": 6 * 2**30, "base weights": 2 * 2**30}, "measured": 4 * 2**30}
    (folder / "memory.json").write_text(json.dumps(memory), encoding="utf-8")
    (folder / "data_report.html").write_text("<!doctype html><title>data</title>", encoding="utf-8")
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    for name, write in (
        (".mp4", lambda path: write_mp4(path, frames, 16)),
        (".png", lambda path: write_png(path, frames[4])),
    ):
        write(folder / "validation" / "step-0" / f"cat@base{name}")
    for step in (1000, 2000, 3000):
        place = folder / "validation" / f"step-{step}"
        for name in ("cat", "cat@ema", "dog #2"):
            write_mp4(place / f"{name}.mp4", frames, 16)
            write_png(place / f"{name}.png", frames[4])
        write_png(place / "contact-sheet.png", frames[0])
        write_png(place / "previews" / "cat" / "sheet.png", frames[0])
        prompts = [
            {"nickname": "cat", "prompt": "a </script><script>alert(1)</script> cat", "files": ["cat.mp4", "cat.png"]}
        ]
        (place / "validation.json").write_text(json.dumps({"step": step, "prompts": prompts}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a toy model and clips; the plugin ``toy`` can be found."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reported")
    build_toy(folder / "model")
    for index in range(2):
        render_clip(folder / "clips" / f"clip {index}.mp4", width=96, height=64, frames=9, fps=16, seed=index)
    with importable(toy_distribution(folder / "site")):
        yield folder


@pytest.fixture
def run(workplace: Path) -> Callable[..., Path]:
    """Runs a config over the toy model and returns its output folder."""

    def go(output: Path, without: tuple[str, ...] = (), **keys: Any) -> Path:
        video = video_entry(workplace / "clips", resolution_type="pixel_area")
        usual = {"output_dir": str(output), "train_batch_size": 2, "learning_rate": 1e-2}
        settings = flat_config(workplace, video, **(usual | keys))
        pipeline.run(assemble(settings, without=list(without)))
        return output

    return go
