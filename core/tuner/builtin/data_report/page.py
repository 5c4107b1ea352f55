"""``data_report.html``: one self-contained page that shows the data as the model will see them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.builtin.data_report.table import used
from tuner.builtin.data_report.thumbnails import thumbnails
from tuner.data.report import DatasetReport, Dropped, summary
from tuner.errors import TunerError
from tuner.files import atomic_write_text

if TYPE_CHECKING:
    from tuner.data.order import Order
    from tuner.data.samples import Bucket, Prepared, Sample
    from tuner.run import Run

NAME = "data_report.html"
VERSION = 1
"""Bumped when the page looks different: it is then written anew."""
NAMED = 2000
"""Left-out files that the page names; more are counted."""
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .6rem; text-align: left; vertical-align: top; }
.wide { overflow-x: auto; }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.numbers div { background: var(--soft); border-radius: .5rem; padding: .6rem 1rem; }
.numbers b { display: block; font-size: 1.5rem; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }
.card { border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
.card img { background: var(--soft); display: block; height: 12rem; object-fit: contain; width: 100%; }
.card p { margin: .5rem .8rem; overflow-wrap: anywhere; }
.small { font-size: .85rem; opacity: .8; }
li, td { overflow-wrap: anywhere; }
"""


def write_page(run: Run, data: Prepared, plan: Order) -> Path:
    """Write the page into the output folder, unless it stands there for the same data already."""
    path = run.output_dir / NAME
    numbers = [*_numbers(data), *_length(run, plan)]
    facts = [*numbers, *(str(each) for each in _identity(data))]
    mark = f"<!-- data: {hashlib.sha256(repr([VERSION, facts]).encode()).hexdigest()} -->"
    if path.is_file() and mark in path.read_text(encoding="utf-8", errors="replace"):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, _page(run.output_dir.name, numbers, data, mark))
    return path


def _identity(data: Prepared) -> list[object]:
    """All that the page shows of the data, in a form that two starts agree on."""
    samples = [*data.samples, *data.held_out]
    shown = [(each.sample_id, each.content_hash, each.bucket, each.views[0], each.captions[0]) for each in samples]
    return [data.report, *shown]


def _page(name: str, numbers: Sequence[tuple[str, str]], data: Prepared, mark: str) -> str:
    boxes = "".join(f"<div><b>{escape(value)}</b>{escape(what)}</div>" for what, value in numbers)
    title = f"Data of {escape(name)}"
    return "\n".join(
        [
            "<!doctype html>",
            mark,
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            f'<div class="numbers">{boxes}</div>',
            "<h2>Datasets</h2>",
            f'<div class="wide">{_datasets(data.report.datasets)}</div>',
            _notes(data),
            "<h2>Buckets</h2>",
            '<p class="small">One sample of each, its middle frame, cut as the model sees it.</p>',
            f'<div class="cards">{_cards(data)}</div>',
            "<h2>Left out</h2>",
            _left_out([each for dataset in data.report.datasets for each in dataset.dropped]),
            "</body></html>",
            "",
        ]
    )


def _numbers(data: Prepared) -> list[tuple[str, str]]:
    """What stands on top: samples and buckets."""
    buckets = {sample.bucket for sample in data.samples}
    numbers = [("samples", str(len(data.samples))), ("buckets", str(len(buckets)))]
    if data.held_out:
        numbers.append(("held out", str(len(data.held_out))))
    return numbers


def _length(run: Run, plan: Order) -> list[tuple[str, str]]:
    """Steps and epochs; nothing where the length is refused, which the run then says itself."""
    from tuner.train.schedules import total_steps

    try:
        total = total_steps(run.config, plan)
    except TunerError:
        return []
    return [
        ("steps per epoch", str(plan.steps_per_epoch)),
        ("steps", str(total)),
        ("epochs", f"{plan.epochs_in(total):.1f}"),
    ]


def _datasets(datasets: Sequence[DatasetReport]) -> str:
    rows = "".join(
        f"<tr><td>{escape(each.dataset_id)}</td><td>{escape(used(each))}</td><td>{escape(summary(each.reasons))}</td>"
        f"<td>{'<br>'.join(f'{escape(str(bucket))} ({count})' for bucket, count in each.buckets)}</td></tr>"
        for each in datasets
    )
    heads = "".join(f"<th>{head}</th>" for head in ("dataset", "used", "left out", "buckets (samples)"))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _notes(data: Prepared) -> str:
    notes = [
        *data.report.notes,
        *(f"{each.dataset_id}: {note}" for each in data.report.datasets for note in each.notes),
    ]
    return f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""


def _cards(data: Prepared) -> str:
    members: dict[Bucket, list[Sample]] = defaultdict(list)
    for sample in (*data.samples, *data.held_out):
        members[sample.bucket].append(sample)
    buckets = sorted(members.items(), key=lambda each: (-len(each[1]), each[0]))
    pictures = thumbnails(data.decode, buckets)
    return "".join(_card(bucket, samples, pictures.get(bucket)) for bucket, samples in buckets)


def _card(bucket: Bucket, samples: Sequence[Sample], picture: str | None) -> str:
    first = samples[0]
    shown = f'<p class="small">no picture: {escape(picture)}</p>' if picture else ""
    if picture and picture.startswith("data:"):
        shown = f'<img src="{picture}" alt="{escape(first.path.name)}">'
    count = f"{len(samples)} sample{'s' * (len(samples) > 1)}"
    return (
        f'<div class="card">{shown}<p><b>{escape(str(bucket))}</b><br>{count}</p>'
        f'<p class="small">{escape(first.path.name)}: {escape(first.captions[0])}</p></div>'
    )


def _left_out(dropped: Sequence[Dropped]) -> str:
    if not dropped:
        return "<p>Nothing.</p>"
    reasons: dict[str, list[Dropped]] = defaultdict(list)
    for each in dropped[:NAMED]:
        reasons[each.reason].append(each)
    parts = [
        f"<details><summary>{escape(reason)}: {len(files)}</summary><ul>"
        + "".join(
            f"<li>{escape(str(each.path))} <span class='small'>{escape(each.detail)}</span></li>" for each in files
        )
        + "</ul></details>"
        for reason, files in reasons.items()
    ]
    more = f"<p>And {len(dropped) - NAMED} more.</p>" if len(dropped) > NAMED else ""
    return "".join(parts) + more
