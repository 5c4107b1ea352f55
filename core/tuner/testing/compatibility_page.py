"""``docs/compatibility.md``, tried out: ``python -m tuner.testing.compatibility_page > docs/compatibility.md``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from string import ascii_lowercase

from tuner.testing.compatibility import (
    FEATURES,
    Bench,
    Feature,
    Verdict,
    alternatives,
    complete_machine,
    trained_together,
)

TRAINED, TRAINED_ON_CUDA, ACCEPTED, ONE_KEY = "●", "○", "✓", "–"
NAMED = ("attention_mechanism", "base_model_precision", "optimizer", "text_encoder_1_precision")
"""Keys whose values stand for one another in what is said of them."""
HEAD = f"""# What goes together

<!-- Made by `python -m tuner.testing.compatibility_page > docs/compatibility.md`; tests compare. -->

Every pair below was put into one config and taken as far as `tuner check` goes: plugins, keys, the model's facts
(Wan 2.1 T2V 1.3B, or the model that a row names), clips, the plan of the run. No weight is read for it. What is
refused is refused there, before a run begins, with the reason that stands below the table.

| in the table | meaning |
|---|---|
| {TRAINED} | a tiny Wan is trained with both, among others, in `tests/matrix/test_matrix.py`, on the CPU |
| {TRAINED_ON_CUDA} | the same, and one of them needs a CUDA device |
| {ACCEPTED} | accepted |
| {ACCEPTED}a | accepted, and the run says the line with that letter: see below the second table |
| a number | refused: see the reason with that number |
| {ONE_KEY} | two values of one key: there is no config with both |

The page does not depend on the machine it was made on: `torch.cuda.is_available` and the lookups of optional packages
(each `find_spec` in the core and in the plugins) were made to say yes, and the host memory was taken to be enough.
What is missing on your machine, `tuner check` says there.
"""


Row = tuple[str, ...]
"""Cells of a table."""


@dataclass
class Remarks:
    """Sentences, each once, under a label of its own."""

    labels: Sequence[str]
    known: dict[Row, str] = field(default_factory=dict)

    def label(self, row: Row) -> str:
        """The label of ``row``."""
        return self.known.setdefault(row, self.labels[min(len(self.known), len(self.labels) - 1)])

    def table(self, *titles: str) -> list[str]:
        """The sentences, below their ``titles``."""
        return _table(("", *titles), [(label, *row) for row, label in self.known.items()])


def reasons(verdict: Verdict, features: Collection[Feature], folder: Path) -> list[Row]:
    """What, where and what to do of each refusal of ``features``, alike for other values of the same key."""
    return [
        tuple(_general(part or "", features, folder) for part in (error.what, error.where, error.remedy))
        for error in verdict.refusals
    ]


def remarks(verdict: Verdict, features: Collection[Feature], folder: Path) -> list[Row]:
    """The lines that are said of ``features``."""
    return [(_general(line, features, folder),) for line in verdict.said]


def _general(text: str, features: Iterable[Feature], folder: Path) -> str:
    for each in features:
        for key in NAMED:
            if key in each.keys:
                text = text.replace(each.keys[key], "…")
    return " ".join(text.replace(f"{folder}/", "").split()).replace("|", "\\|")


def _table(titles: Row, rows: Iterable[Row]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ("---",) * len(titles), *rows)] + [""]


def tried() -> dict[frozenset[str], str]:
    """The mark of each pair that the matrix test trains with."""
    marks: dict[frozenset[str], str] = {}
    for names in trained_together():
        cuda = any(FEATURES[name].cuda for name in names)
        for pair in map(frozenset, combinations(names, 2)):
            if marks.get(pair) != TRAINED:
                marks[pair] = TRAINED_ON_CUDA if cuda else TRAINED
    return marks


def head() -> str:
    """The part of the page for which nothing is tried."""
    rows = [(str(number), each.name, _keys(each)) for number, each in enumerate(FEATURES.values(), 1)]
    return "\n".join([HEAD, "## Features", "", *_table(("", "feature", "keys"), rows)])


def _keys(feature: Feature) -> str:
    """A feature's keys as a config has them."""
    keys = [f"`{key}: {json.dumps(value)}`" for key, value in feature.keys.items()]
    if feature.entry is not None:
        keys.append(f"a dataset with `{json.dumps(feature.entry)}`")
    needs = [f"`{key}: {json.dumps(value)}`" for key, value in feature.beside.items()]
    return ", ".join(keys) + (f"; with {' and '.join(needs)} unless the other one says otherwise" if needs else "")


def page(bench: Bench) -> str:
    """The whole page."""
    alone = {name: bench.judge(each) for name, each in FEATURES.items()}
    usable = [each for name, each in FEATURES.items() if alone[name].usable]
    refused, noted, marks = Remarks(list(map(str, range(1, 100)))), Remarks(ascii_lowercase), tried()
    cells: dict[frozenset[str], str] = {}
    for pair in combinations(usable, 2):
        if alternatives(*pair):
            continue
        verdict, names = bench.judge(*pair), frozenset(each.name for each in pair)
        known = {row for each in pair for row in remarks(alone[each.name], [each], bench.folder)}
        numbers = {refused.label(row) for row in reasons(verdict, pair, bench.folder)}
        letters = {noted.label(row) for row in remarks(verdict, pair, bench.folder) if row not in known}
        accepted = marks.get(names, ACCEPTED) + "".join(sorted(letters))
        cells[names] = " ".join(sorted(numbers, key=int)) or accepted
    parts = [head(), "## Pairs", "", *_pairs(usable, cells)]
    parts += ["## Why not", "", *refused.table("what", "where", "what to do")]
    parts += ["## Accepted, and said", "", *noted.table("line"), *_alone(alone, bench.folder)]
    return "\n".join(parts).rstrip() + "\n"


def _pairs(usable: Sequence[Feature], cells: Mapping[frozenset[str], str]) -> list[str]:
    numbers = {name: str(number) for number, name in enumerate(FEATURES, 1)}
    rows = [
        (f"{numbers[one.name]} {one.name}", *("" if one is other else _cell(one, other, cells) for other in usable))
        for one in usable
    ]
    return _table(("", *(numbers[each.name] for each in usable)), rows)


def _cell(one: Feature, other: Feature, cells: Mapping[frozenset[str], str]) -> str:
    return ONE_KEY if alternatives(one, other) else cells[frozenset({one.name, other.name})]


def _alone(alone: Mapping[str, Verdict], folder: Path) -> list[str]:
    """What is said of a feature by itself: why it cannot be used, or a line that it comes with."""
    useless: list[Row] = []
    said: list[Row] = []
    for name, verdict in alone.items():
        rows = reasons(verdict, [FEATURES[name]], folder) + remarks(verdict, [FEATURES[name]], folder)
        (said if verdict.usable else useless).extend((name, row[0]) for row in rows)
    parts = ["## Cannot be used", "", *_table(("feature", "line"), useless)] if useless else []
    return [*parts, "## Said of a feature by itself", "", *_table(("feature", "line"), said)]


def main() -> None:
    """Print the page."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        bench.render()
        with complete_machine(bench.catalog):
            print(page(bench), end="")


if __name__ == "__main__":
    main()
