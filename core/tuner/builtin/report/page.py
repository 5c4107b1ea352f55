"""``report/index.html``: one file with its style, its script and its data, that asks nobody for anything."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from tuner.builtin.report.diary import FOLDER
from tuner.builtin.report.story import Story
from tuner.files import atomic_write_text

NAME = "index.html"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' file: data:; media-src 'self' file:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
"""The browser itself refuses every request to another machine."""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<header><h1>{title}</h1><p id="state"></p></header>
<section id="numbers" class="numbers" aria-label="Where the run stands"></section>
<noscript><p>The charts are drawn by a script in this page; the numbers stand in train.jsonl.</p></noscript>
<section id="training"><h2>Training</h2>
<label class="bar">smoothing <input id="smoothing" type="range" min="0" max="0.99" step="0.01" value="0.9">
<output id="smoothed"></output></label>
<div id="charts" class="charts"></div></section>
<section id="validation" hidden><h2>Validation</h2>
<label class="bar">step <input id="step" type="range" min="0" value="0" step="1"><output id="shown"></output></label>
<div id="clips" class="clips"></div>
<details><summary>All steps</summary><div class="wide"><table id="grid"></table></div></details>
<p id="sheets" class="small"></p></section>
<details id="others" hidden><summary>More numbers</summary><div id="more" class="charts"></div></details>
<section id="memory" hidden><h2>Device memory</h2><div id="parts"></div><p id="parts-named" class="small"></p></section>
<section><h2>Events</h2><ol id="events"></ol></section>
<section><h2>Data and settings</h2><p id="data-report"></p>
<details><summary>Settings</summary><div class="wide"><table id="settings"></table></div></details></section>
<script type="application/json" id="data">{data}</script>
<script>
{script}
</script>
</body>
</html>
"""


def page(data: dict[str, Any]) -> str:
    """The whole page that shows ``data``, the JSON of a story."""
    source = files(__package__)
    return PAGE.format(
        policy=escape(POLICY),
        title=escape(str(data["name"])),
        style=source.joinpath("page.css").read_text(encoding="utf-8"),
        script=source.joinpath("page.js").read_text(encoding="utf-8"),
        data=embedded(data),
    )


def embedded(data: dict[str, Any]) -> str:
    """``data`` as JSON that nothing in it can end the script element of."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def write(story: Story) -> Path:
    """Write the page at once or not at all; returns its path."""
    path = story.output_dir / FOLDER / NAME
    atomic_write_text(path, page(story.as_json()))
    return path
