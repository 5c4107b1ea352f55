"""Compiled blocks train what eager ones train, from one code for all blocks, and leave no trace in names and files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from tuner.errors import ConfigError, TunerError
from tuner.testing.compatibility import FEATURES, Bench
from tuner.testing.opened import opened
from tuner.train.step import train_step
from tuner_wan.tiny import build_tiny

LAYERS, STEPS = 4, 2


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compiled")
    build_tiny(folder / "model", layers=LAYERS)
    base = {
        "model_family": "wan",
        "pretrained_model_name_or_path": str(folder / "model"),
        "mixed_precision": "no",
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "seed": 3,
    }
    made = Bench(folder, base=base)
    made.render()
    return made


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(bench: Bench, output: Path, *features: str, **keys: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of two steps, and the tensors of the LoRA file."""
    settings = bench.settings([FEATURES[name] for name in ("LoRA", *features)]) | keys
    with opened(settings) as session:
        losses = []
        for step in range(STEPS):
            session.run.step = step
            losses.append(train_step(session).loss)
        output.mkdir()
        for write in session.export_into(output):
            write()
    [file] = output.glob("*.safetensors")
    return losses, load_file(file)


@pytest.mark.parametrize("features", [(), ("group offload", "chunked feed-forward")], ids=["alone", "together"])
def test_it_trains_what_eager_blocks_train(bench: Bench, tmp_path: Path, features: tuple[str, ...]) -> None:
    plain, file = train(bench, tmp_path / "plain", *features)
    compiled, other = train(bench, tmp_path / "compiled", *features, dynamo_backend="aot_eager")
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert file.keys() == other.keys()
    for name, tensor in file.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-6)
    # All blocks share their code.
    assert 0 < counters["stats"]["unique_graphs"] < LAYERS


@pytest.mark.gpu
def test_inductor_makes_the_same(bench: Bench, tmp_path: Path) -> None:
    plain, _ = train(bench, tmp_path / "plain")
    compiled, _ = train(bench, tmp_path / "compiled", dynamo_backend="inductor")
    assert compiled == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dynamo_backend": "inductr"}, "did you mean 'inductor'"),
        ({"dynamo_backend": "cudagraphs"}, "keeps results in place"),
        ({"dynamo_backend": "inductor", "fused_blocks": True}, "two ways"),
        ({"dynamo_backend": "inductor", "wan_lean_blocks": True}, "two ways"),
        ({"dynamo_backend": "eager", "dynamo_mode": "max-autotune-no-cudagraphs"}, "is for dynamo_backend inductor"),
        ({"dynamo_backend": "inductor", "dynamo_mode": "reduce-overhead"}, "max-autotune-no-cudagraphs"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(bench: Bench, keys: dict[str, Any], words: str) -> None:
    from tuner import pipeline
    from tuner.assembly import assemble

    with pytest.raises(TunerError, match=words):
        pipeline.survey(assemble(bench.settings([]) | keys))


def test_missing_compilers_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner_compile import blocks

    monkeypatch.setattr(blocks, "has_triton", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    for device in ("cuda", "cpu"):
        with pytest.raises(ConfigError, match="dynamo_backend inductor"):
            blocks.check_compiler("inductor", torch.device(device))
    blocks.check_compiler("eager", torch.device("cpu"))


def test_keys_without_effect_are_said(bench: Bench) -> None:
    from tuner.assembly import assemble

    assembly = assemble(bench.settings([]) | {"dynamo_dynamic": True})
    assert "dynamo_dynamic does nothing: dynamo_backend is no" in assembly.warnings
