"""The GPU benchmark of memory, as far as a CPU can tell: its tiny case, its real cases on paper, its verdicts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tuner.assembly import assemble
from tuner.builtin.planner.memory import CONTEXT, predict
from tuner.builtin.planner.memory_blocks import block_parameters

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIB = 2**30


@pytest.fixture(scope="module")
def memory() -> Iterator[ModuleType]:
    """``benchmarks/gpu_memory.py``, which is in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu_memory

        yield gpu_memory


@pytest.fixture(scope="module")
def page(memory: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What ``--smoke`` writes."""
    folder, log = tmp_path_factory.mktemp("pages"), logging.getLogger("tuner")
    level = log.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmarks/gpu_memory.py", "--smoke", "--pages", str(folder)])
        with pytest.raises(SystemExit) as ended:
            memory.main()
    log.setLevel(level)
    assert not ended.value.code
    return (folder / "gpu-memory-smoke.md").read_text(encoding="utf-8")


def test_the_tiny_case_trains_with_every_lever(page: str, memory: ModuleType) -> None:
    rows = {cells[1].strip(): cells for line in page.splitlines() if (cells := line.split("|"))[0] == "" and cells[1:]}
    for case in memory.PARTS["smoke"].cases():
        assert float(rows[case.name][2]) > 0
        assert int(rows[case.name][4]) == memory.FEWEST


def test_the_page_says_by_what_it_was_made(page: str) -> None:
    assert "gpu_memory.py --smoke" in page
    assert f"torch {torch.__version__}" in page
    assert ("No GPU: memory was neither limited nor counted" in page) is not torch.cuda.is_available()


def test_real_cases_have_real_dimensions(memory: ModuleType, tmp_path: Path) -> None:
    """Every case's config is accepted; networks have as many parameters as the planner counts."""
    import gpu_run

    counted: dict[int, int] = {}
    for case in [case for part in memory.PARTS.values() for case in part.cases()]:
        run, spec, work = gpu_run.described(case, assemble(gpu_run.settings(case, tmp_path)))
        run.place(torch.device("cpu"), torch.bfloat16)
        assert predict(work).on_device > CONTEXT
        if work.network.dim not in counted:
            module = gpu_run.random_model(spec, run).network.module
            counted[work.network.dim] = sum(each.numel() for each in module.parameters())
            expected = work.network.blocks * block_parameters(work.network) + work.network.other
            assert counted[work.network.dim] == expected
    assert {width: round(number / 1e9, 2) for width, number in counted.items()} == {1536: 1.42, 5120: 14.29, 24: 0.0}


def test_targets_are_held_against_the_plain_case(memory: ModuleType) -> None:
    def result(name: str, seconds: float, gib: float, limit: float | None = None) -> object:
        case = memory.Case(name, "", (1, 1, 1), limit=limit)
        held = {"allocated": int(gib * GIB), "reserved": int(gib * GIB), "context": GIB // 2}
        return memory.Result(case, 14_040, 2.0 * GIB, None, seconds=(seconds, 9.0, 0.0), **held)

    done = [
        result("full", 1.0, 2.0),
        result("streaming", 1.04, 2.3),
        result("small", 1.2, 3.4, limit=4),
        memory.Result(memory.Case("none", "", (1, 1, 1)), 14_040, 9e9, None, note="out of memory"),
    ]
    verdicts = {what: (round(value, 2), value <= most) for what, value, most in memory.targets(done)}
    assert verdicts["streaming: time, of full"] == (1.04, False)
    assert verdicts["streaming: peak, off the predicted one"] == (0.13, False)
    assert verdicts["full: peak, off the predicted one"] == (0.0, True)
    assert verdicts["small: GiB in all"] == (3.9, True)
    assert verdicts["small: time, of full without limits"] == (1.2, False)
    text = memory.figures(done)
    assert "| missed |" in text
    assert "out of memory" in text


def test_a_case_that_fails_leaves_the_others_their_turn(memory: ModuleType) -> None:
    found = memory.alone(memory.Case("bad", "nonsense", (5, 64, 64)), 1, 0.0)
    assert found.note.startswith("failed: ConfigError")
    assert not found.seconds


def test_a_page_keeps_what_a_command_printed_and_how_it_ended(memory: ModuleType, tmp_path: Path) -> None:
    import gpu_page

    page = tmp_path / "new" / "page.md"
    status = gpu_page.record(page, "Title", [sys.executable, "-c", "print('4.2 s'); raise SystemExit(3)"])
    text = page.read_text(encoding="utf-8")
    assert status == 3
    assert text.startswith("# Title\n")
    assert "Exit status 3." in text
    assert "4.2 s" in text


@pytest.mark.gpu
def test_memory_is_counted_and_limited_on_a_gpu(memory: ModuleType) -> None:
    case = memory.PARTS["smoke"].cases()[-2]
    found = memory.alone(case, memory.FEWEST, 0.0)
    assert case.limit
    assert len(found.seconds) == memory.FEWEST
    assert 0 < found.allocated <= found.reserved < case.limit * GIB
    starved = memory.alone(memory.replace(case, limit=CONTEXT / GIB + 1e-3), 1, 0.0)
    assert "out of memory" in starved.note
