"""``docs/compatibility.md`` says what the plugins say: refused pairs are tried again, and a sample of the others."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from tuner.testing import compatibility_page as page
from tuner.testing.compatibility import FEATURES, PRECISIONS, Bench, Feature, complete_machine

TEXT = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
SAMPLE = 100
REMAKE = "run: python -m tuner.testing.compatibility_page > docs/compatibility.md"


def table(title: str) -> dict[str, tuple[str, ...]]:
    """The rows of a chapter's table by their first cell; none where there is no such chapter."""
    chapter = TEXT.partition(f"## {title}\n")[2].split("\n## ")[0]
    rows = [tuple(re.split(r" ?\| ?", line)[1:-1]) for line in chapter.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in map(list, rows[2:])}


def shown() -> dict[frozenset[str], str]:
    """What the page has for each pair, in both of its cells alike."""
    rows = {label.partition(" ")[2]: row for label, row in table("Pairs").items()}
    cells = {(one, other): cell for one, row in rows.items() for other, cell in zip(rows, row, strict=True)}
    assert all(cells[other, one] == cell for (one, other), cell in cells.items())
    return {frozenset(pair): cell for pair, cell in cells.items() if pair[0] != pair[1]}


SHOWN = shown()
WHY, SAID = table("Why not"), table("Accepted, and said")
REFUSED = [pair for pair, cell in SHOWN.items() if cell[:1].isdigit()]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("compatibility"))
    bench.render()
    with complete_machine(bench.catalog):
        yield bench


def features(names: frozenset[str]) -> list[Feature]:
    return [each for name, each in FEATURES.items() if name in names]


def rows_of(cell: str) -> list[tuple[str, ...]]:
    """The reasons that a cell refers to."""
    return sorted(tuple(WHY[number]) for number in cell.split())


def test_the_page_names_the_features_as_they_are() -> None:
    assert TEXT.startswith(page.head()), REMAKE


def test_every_pair_is_there_and_those_that_are_trained_together_are_marked() -> None:
    usable = {name for name in FEATURES if name not in table("Cannot be used")}
    assert set(SHOWN) == set(map(frozenset, combinations(usable, 2))), REMAKE
    marked = {pair: cell for pair, cell in SHOWN.items() if cell[:1] in {page.TRAINED, page.TRAINED_ON_CUDA}}
    assert {pair: cell[0] for pair, cell in marked.items()} == page.tried(), REMAKE


def test_every_precision_is_tried(bench: Bench) -> None:
    classes = (bench.catalog.load(name) for name in bench.catalog.installed)
    served = {value for cls in classes for value in cls.values.get("base_model_precision", ())}
    assert served == {each.name for each in PRECISIONS}


@pytest.mark.parametrize("pair", [pytest.param(pair, id=" + ".join(sorted(pair))) for pair in REFUSED])
def test_a_refused_pair_is_refused_with_its_reason_before_any_weight_is_read(bench: Bench, pair) -> None:
    found = features(pair)
    assert sorted(page.reasons(bench.judge(*found), found, bench.folder)) == rows_of(SHOWN[pair]), REMAKE


def test_the_other_pairs_are_accepted_with_what_is_said_of_them(bench: Bench) -> None:
    accepted = [pair for pair, cell in SHOWN.items() if cell[0] in (page.ACCEPTED, page.TRAINED)]
    said = [pair for pair in accepted if len(SHOWN[pair]) > 1]
    plain = sorted((pair for pair in accepted if len(SHOWN[pair]) == 1), key=sorted)
    alone = {name: set(page.remarks(bench.judge(each), [each], bench.folder)) for name, each in FEATURES.items()}
    for pair in [*said, *random.Random(0).sample(plain, SAMPLE)]:
        found = features(pair)
        verdict = bench.judge(*found)
        assert not verdict.refusals, (sorted(pair), REMAKE)
        known = {row for name in pair for row in alone[name]}
        lines = {row for row in page.remarks(verdict, found, bench.folder) if row not in known}
        assert lines == {tuple(SAID[letter]) for letter in SHOWN[pair][1:]}, (sorted(pair), REMAKE)


def test_what_a_feature_comes_with_is_said_by_itself(bench: Bench) -> None:
    useless = {}
    for name, each in FEATURES.items():
        verdict = bench.judge(each)
        if not verdict.usable:
            [row] = page.reasons(verdict, [each], bench.folder) + page.remarks(verdict, [each], bench.folder)
            useless[name] = [row[0]]
    assert useless == table("Cannot be used"), REMAKE


def test_a_machine_without_anything_makes_the_same_page(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """... while outside the stand-in for a complete machine the plugins see what is there."""
    import tuner_offload.room
    import tuner_quantization

    monkeypatch.setattr(tuner_quantization, "find_spec", lambda name: None)
    monkeypatch.setattr(tuner_offload.room, "available", lambda: 0)
    lacking = [FEATURES["int8-quanto"], FEATURES["group offload"]]
    assert all(bench.judge(each).refusals for each in lacking)
    with complete_machine(bench.catalog):
        assert not bench.judge(*lacking).refusals
