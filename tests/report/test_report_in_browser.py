"""The page in a real browser: drawn, playing, quiet, asking nobody, on a desk and on a phone, in light and dark."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuner.builtin.report.page import write
from tuner.builtin.report.serve import Server
from tuner.builtin.report.story import Story

Browser = Any
LUMINANCE = """(() => { const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number);
return (r + g + b) / 3; })()"""


@pytest.fixture(scope="module")
def written(output: Path) -> str:
    return write(Story.read(output)).as_uri()


def test_charts_are_drawn_from_the_disk_without_a_request_elsewhere_or_a_word_in_the_console(
    browser: Browser, written: str
) -> None:
    browser.open(written)
    charts = browser.do("[...document.querySelectorAll('#charts figure')].map((each) => each.dataset.chart)")
    assert charts[:4] == ["loss", "evaluation/loss", "noise_levels/loss/…", "evaluation/loss/…"]
    assert {"learning_rate", "peak_memory_bytes", "metrics/samples_per_second"} <= set(charts)
    lines = "document.querySelectorAll('[data-chart=\"{}\"] path.smooth').length"
    assert browser.do(lines.format("noise_levels/loss/…")) == 10
    assert browser.do(lines.format("evaluation/loss")) == 2
    extents = browser.do(
        "[...document.querySelectorAll('#charts svg')].map((each) => {"
        "const line = each.querySelector('path.smooth').getBBox(), box = each.getBoundingClientRect();"
        "return [line.width, line.x, line.x + line.width, box.width, line.y, line.y + line.height, box.height]; })"
    )
    for width, left, right, room, top, bottom, height in extents:
        assert width > room / 2
        assert 0 <= left < right <= room
        assert 0 <= top <= bottom <= height
    assert all(address.startswith("file://") for address in browser.requests())
    assert not browser.complaints()


def test_memory_is_drawn_part_by_part_with_the_measured_peak(browser: Browser, written: str) -> None:
    browser.open(written)
    widths = "[...document.querySelectorAll('#parts span')].map((each) => each.getBoundingClientRect().width)"
    first, second = browser.do(widths)
    assert first == pytest.approx(3 * second, rel=0.02)
    box = "document.getElementById('parts').getBoundingClientRect()"
    mark = "document.querySelector('#parts i').getBoundingClientRect()"
    share = browser.do(f"({mark}.left - {box}.left) / {box}.width")
    assert share == pytest.approx(0.5, abs=0.02)
    told = browser.do("document.getElementById('parts-named').textContent")
    assert "8.00 GiB predicted; measured 4.00 GiB" in told
    assert "block at work 6.00 GiB" in told
    assert not browser.complaints()


def test_clips_follow_the_slider_and_play(browser: Browser, written: str) -> None:
    browser.open(written)
    names = browser.do("[...document.querySelectorAll('#clips figcaption')].map((each) => each.textContent)")
    assert names == ["cat", "cat@base", "cat@ema", "dog #2"]
    assert browser.do("document.querySelector('#clips p').textContent") == "a </script><script>alert(1)</script> cat"
    sources = "[...document.querySelectorAll('#clips video')].map((each) => each.getAttribute('src'))"
    assert browser.do(sources)[1] == "../validation/step-0/cat%40base.mp4"  # beside every later step
    assert browser.do(sources)[3] == "../validation/step-3000/dog%20%232.mp4"
    links = "[...document.querySelectorAll('#clips a')].map((each) => each.getAttribute('href'))"
    assert browser.do(links) == ["../validation/step-3000/previews/cat/sheet.png"]
    browser.do(
        "(() => { const it = document.getElementById('step'); it.value = 1; it.dispatchEvent(new Event('input')); })()"
    )
    assert browser.do(sources)[0] == "../validation/step-1000/cat.mp4"
    browser.do("Promise.all([...document.querySelectorAll('#clips video')].map((each) => each.play()))")
    browser.until("[...document.querySelectorAll('#clips video')].every((each) => each.currentTime > 0 && !each.error)")
    browser.do("document.getElementById('grid').closest('details').open = true")
    browser.until("document.querySelectorAll('#grid img').length === 10")
    assert not browser.complaints()


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_in_light_and_dark(browser: Browser, written: str, dark: bool) -> None:
    browser.open(written, width=360, dark=dark)
    browser.do("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    browser.until("document.querySelectorAll('#more svg').length > 0")
    assert browser.do("document.documentElement.scrollWidth") <= 360
    assert browser.do("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
    background = browser.do(LUMINANCE)
    assert background < 80 if dark else background > 200
    assert not browser.complaints()


@pytest.fixture
def served(output: Path) -> Iterator[Server]:
    with Server(output, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_served_page_takes_new_lines_by_itself(browser: Browser, served: Server, output: Path) -> None:
    browser.open(served.address)
    log = output / "train.jsonl"
    before = log.read_text(encoding="utf-8")
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": 3001, "epoch": 30, "loss": 0.1, "seconds": 1.0}) + "\n")
        browser.do("follow()")
        browser.until("document.getElementById('numbers').textContent.includes('3001')")
    finally:
        log.write_text(before, encoding="utf-8")
    browser.do("document.querySelector('#clips video').play()")
    browser.until("document.querySelector('#clips video').currentTime > 0")
    assert all(address.startswith(served.address.rpartition("/report")[0]) for address in browser.requests())
    assert not browser.complaints()
