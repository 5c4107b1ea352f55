"""``make gpu``, as far as a CPU can tell: every part's own code at tiny sizes, its files, what cuts it short."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tuner.assembly import assemble
from tuner.builtin.planner.memory import predict

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIB = 2**30
FLOOR_13B = {("full", 18_900): 0.801, ("full", 32_760): 2.075, ("selective", 32_760): 1.704, ("none", 18_900): 0.609}
FLOOR_14B = {("full", 18_900): 4.417, ("selective", 18_900): 3.777, ("full", 32_760): 10.704}
"""Seconds on an H100, worked out by hand from dimensions and published rates."""


@pytest.fixture(scope="module")
def part() -> Iterator[ModuleType]:
    """``benchmarks/gpu_part.py``, which is in no package."""
    log = logging.getLogger("tuner")
    level = log.level
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu_part

        yield gpu_part
    log.setLevel(level)


def smoke(part: ModuleType, name: str, folder: Path, only: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Rows of part ``name`` by name, as its JSON lines have them."""
    arguments = [name, "--smoke", "--pages", str(folder), "--only", only]
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu_part.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        part.main()
    assert not ended.value.code
    head, *lines = (folder / f"gpu-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(head)["part"] == name
    assert {"python", "torch"} <= json.loads(head)["versions"].keys()
    page = (folder / f"gpu-{name}.md").read_text(encoding="utf-8")
    found = {record["row"]: record for record in map(json.loads, lines)}
    assert all(f"| {row} |" in page for row in found)
    assert "gpu_part.py" in page
    return found


def test_ceilings_are_in_the_form_that_the_planner_reads(
    part: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = smoke(part, "ceilings", tmp_path, "", monkeypatch)
    written = json.loads((tmp_path / "gpu-ceilings.json").read_text(encoding="utf-8"))
    assert isinstance(written.pop("device"), str)
    assert written.keys() == {
        *("matmul_tflops", "attention_forward_tflops", "attention_backward_tflops"),
        *("copy_tb_per_s", "host_to_device_gb_per_s", "device_to_host_gb_per_s"),
    }
    assert all(value > 0 for value in written.values())
    square = found["product, bf16, square"]
    assert square["tflops"] == pytest.approx(2 * 64**3 / square["seconds"] / 1e12)
    assert found["product, fp8, square"]["note"].startswith("skipped")


def test_a_training_row_stands_beside_the_plain_loop_and_the_model(
    part: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = smoke(part, "1.3b", tmp_path, "32 760", monkeypatch)
    plain, ours, routed = found.values()
    assert plain["row"].startswith("diffusers")
    assert ours["times_plain"] == pytest.approx(plain["seconds"] / ours["seconds"])
    assert routed["times_unrouted"] == pytest.approx(ours["seconds"] / routed["seconds"])
    assert routed["tflop"] < ours["tflop"] == plain["tflop"]
    assert routed["times_by_model"] > 1
    assert ours["goal_seconds"] == 1.95


def test_streamed_blocks_train_in_the_part_of_the_large_network(
    part: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = smoke(part, "14b", tmp_path, "streamed", monkeypatch).values()
    assert row["seconds"] > 0
    assert row["goal_peak_gib"] == 12


def test_memory_and_encoding_run(part: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = smoke(part, "memory", tmp_path, "3 GiB", monkeypatch).values()
    assert row["seconds"] > 0
    assert row["goal_total_gib"] == 3
    for row in smoke(part, "encode", tmp_path, "bfloat16|2 at once", monkeypatch).values():
        assert row["seconds"] > 0
        if "UMT5" in row["row"]:
            assert row["captions_per_second"] == pytest.approx(2 / row["seconds"])


def test_gradients_of_one_base_agree_and_of_another_precision_nearly(part: ModuleType) -> None:
    from gpu.training import FULL, PICTURE, Part, cosine, gradients

    case = Part("t2v-480p-1.3b-2.1", smoke=True).case("", PICTURE, FULL)
    one = gradients(case)
    assert one.norm() > 0
    assert (one == gradients(case)).all()
    assert 0.98 < cosine(case, "fp8-scaled")["cosine"] < 1 - 1e-9


def test_real_rows_have_real_shapes_and_configs_that_are_accepted(part: ModuleType, tmp_path: Path) -> None:
    import gpu_run
    from gpu import floor, large, small
    from gpu.training import PRODUCTS

    card = floor.named("H100")
    for module, expected in ((small, FLOOR_13B), (large, FLOOR_14B)):
        for row in module.rows(smoke=False):
            case = row.arguments[0]
            tokens = re.search(r"S = (\d+) (\d+)", row.name)
            if case.keys.get("base_model_precision") in PRODUCTS or tokens is None:
                continue
            _, _, work = gpu_run.described(case, assemble(gpu_run.settings(case, tmp_path)))
            assert work.tokens == int("".join(tokens.groups())), row.name
            known = expected.get((work.checkpointing, work.tokens))
            if known is not None and not work.dropped:
                assert floor.seconds(work, card) == pytest.approx(known, rel=0.05), row.name
            if "peak_gib" in row.goal:
                assert predict(work).on_device < row.goal["peak_gib"] * GIB * 1.1, row.name


def test_the_plain_loop_trains_as_many_parameters(part: ModuleType, tmp_path: Path) -> None:
    import gpu_run
    from gpu import plain
    from gpu.training import CLIP, FULL, Part

    case = Part("t2v-480p-1.3b-2.1", smoke=True).case("", CLIP, FULL)
    _, spec, work = gpu_run.described(case, assemble(gpu_run.settings(case, tmp_path)))
    model = plain.network(spec)
    trained = [each for each in model.parameters() if each.requires_grad]
    assert sum(each.numel() for each in trained) == work.adapter_parameters
    assert {each.dtype for each in trained} == {torch.float32}
    assert model.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert model.is_gradient_checkpointing


def test_a_row_that_fails_is_reported_and_the_rest_goes_on(part: ModuleType, tmp_path: Path) -> None:
    from gpu.running import Row, results

    rows = [Row("bad", int, ("x",)), Row("good", dict, ({"seconds": 2.0},)), Row("other", dict, ({"seconds": 1.0},),
            against={"times": "good", "nothing": "bad"})]  # fmt: skip
    bad, good, other = results(rows, time.time() + 100, isolated=False)
    assert bad.failed
    assert "ValueError" in bad.note
    assert good.figures == {"seconds": 2.0}
    assert other.figures == {"seconds": 1.0, "times": 2.0}
    from gpu import small

    assert "ValueError" in part.page(small, [bad, good])


def test_rows_for_which_no_time_is_left_say_so(part: ModuleType) -> None:
    from gpu.running import Row, results

    first, second = results([Row("long", int, needs=50), Row("short", dict, needs=1)], time.time() + 10, isolated=False)
    assert first.note.startswith("not run: no time")
    assert not second.note


@pytest.mark.parametrize(
    ("function", "argument", "note"),
    [(os._exit, 7, "exit code 7"), (time.sleep, 60, "stopped: no time"), (int, "x", "failed: ValueError")],
)
def test_a_process_that_dies_or_hangs_takes_nothing_with_it(
    part: ModuleType, monkeypatch: pytest.MonkeyPatch, function: Any, argument: Any, note: str
) -> None:
    from gpu import running

    monkeypatch.setattr(running, "GRACE", 0.0)
    until = time.time() + (0.5 if function is time.sleep else 60)
    assert note in running.alone(running.Row("bad", function, (argument,)), until).note


@pytest.mark.gpu
def test_kernels_and_copies_are_measured_on_a_gpu(part: ModuleType) -> None:
    from gpu.ceilings import attention, copied, product

    for kind in ("bf16", "int8", "fp8"):
        assert product(kind, 2048, 1536, 1536, 0.01)["tflops"] > 1
    for backend in ("cudnn", "flash", "efficient", "default"):
        assert attention(backend, 4608, 12, 128, 0.01)["backward_tflops"] > 1
    assert copied("host to device", 2**26, 0.01)["gb_per_s"] > 1
