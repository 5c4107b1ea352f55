"""`make bench` in its smallest form: every group gives its rows, and the page has them. No figure is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = {
    "blocks": ("elementwise units", "peak live units", "operations"),
    "streaming": ("bytes host to device", "bytes of frozen weights device to host"),
    "planning": ("`tuner plan` / counted peak", "`tuner plan` / importing", "`tuner plan` imports torch"),
    "reading": ("100 files, first scan", "100 files, rescan", "cache reads / raw reads"),
    "starting": ("`tuner --help`", "checkpoint: the loop waits"),
    "steps": ("our loop", "loss of ours", "step of ours / diffusers", "TREAD, measured", "TREAD's router"),
}


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """``benchmarks/bench.py``, which is in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import bench

        yield bench


@pytest.mark.parametrize("group", ROWS)
def test_the_smallest_form_of_a_group_gives_its_rows(group: str, bench: ModuleType, tmp_path: Path) -> None:
    bench.main(["--tiny", "--groups", group, "--pages", str(tmp_path)])
    found = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))
    rows = found["groups"][group]
    page = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    for beginning in ROWS[group]:
        assert any(row["what"].startswith(beginning) for row in rows)
    for row in rows:
        assert row["measured"] == row["measured"]  # a number, not NaN
        assert f"| {row['what']} |" in page
        assert row["met"] is (None if row["goal"] is None else bench.row_of(row).met)
    assert "torch" in found["machine"]["versions"]


def test_every_group_is_tested(bench: ModuleType) -> None:
    assert bench.GROUPS.keys() == ROWS.keys()


def test_the_count_of_the_path_with_kernels_is_that_of_its_operations(bench: ModuleType) -> None:
    """Less than half of diffusers' traffic; each kernel is one operation, and no other does its work."""
    from rows import blocks

    theirs, kernels = (blocks.traffic(blocks.TINY, way) for way in (blocks.DIFFUSERS, blocks.KERNELS))
    assert kernels.bytes < theirs.bytes / 2
    assert set(blocks.OPAQUE) <= set(kernels.operations)
    assert "native_layer_norm" not in kernels.operations


def test_an_unknown_group_is_named(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--groups", "stepps"])
    assert "stepps" in capsys.readouterr().err
