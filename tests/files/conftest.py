"""Tiny bases on disk, and adapter files for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tuner.builtin.adapter_file import AdapterFile, Update, low_rank, save
from tuner.builtin.adapter_formats import models
from tuner.builtin.adapter_names import FORMATS
from tuner.cli import app
from tuner_wan.tiny import build_tiny, build_tiny_t2v

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-video model."""
    return build_tiny_t2v(tmp_path_factory.mktemp("t2v") / "tiny")


@pytest.fixture(scope="session")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that reads an embedded frame."""
    return build_tiny(tmp_path_factory.mktemp("i2v") / "tiny", "i2v-14b-2.1")


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with two experts."""
    return build_tiny(tmp_path_factory.mktemp("experts") / "tiny", "t2v-14b-2.2-both")


@pytest.fixture
def target() -> Callable[[Path], models.Target]:
    """Makes the target of a base with one denoiser."""
    return lambda base: models.targets(base)[0]


def _lora(
    shapes: dict[str, tuple[int, ...]],
    rank: int = 4,
    alpha: float = 6.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AdapterFile:
    """A LoRA of these matrices with random factors."""
    draw = torch.Generator().manual_seed(seed)
    return AdapterFile(
        {
            module: low_rank(
                (torch.randn(rank, *shape[1:], generator=draw) * 0.3).to(dtype),
                (torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=draw) * 0.3).to(dtype),
                alpha,
            )
            for module, shape in shapes.items()
        }
    )


def _lokr(shapes: dict[str, tuple[int, ...]], *, whole: bool, alpha: float) -> AdapterFile:
    """A LoKr: kron of a small matrix and a large one, the large one whole or of rank 2."""
    draw = torch.Generator().manual_seed(0)
    updates = {}
    for module, (rows, columns) in shapes.items():
        small, large = torch.randn(4, 4, generator=draw), (rows // 4, columns // 4)
        if whole:
            factors = {"lokr_w1": small, "lokr_w2": torch.randn(large, generator=draw)}
        else:
            left, right = torch.randn(large[0], 2, generator=draw), torch.randn(2, large[1], generator=draw)
            factors = {"lokr_w1": small, "lokr_w2_a": left, "lokr_w2_b": right}
        updates[module] = Update({name: tensor * 0.2 for name, tensor in factors.items()}, alpha)
    return AdapterFile(updates)


@pytest.fixture
def matrices(target: Callable[[Path], models.Target]) -> Callable[..., dict[str, tuple[int, ...]]]:
    """Shapes of the matrices in a base's blocks, of which the name ends as one of ``ends``."""

    def of(base: Path, ends: Iterable[str] = ("",)) -> dict[str, tuple[int, ...]]:
        shapes = target(base).shapes
        return {
            module: shape
            for module, shape in shapes.items()
            if module.startswith("blocks.") and len(shape) == 2 and module.endswith(tuple(ends))
        }

    return of


@pytest.fixture
def written(target: Callable[[Path], models.Target], tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter for a base in a format."""

    def write(file: AdapterFile, base: Path, form: str = "comfyui", name: str = "lora", **metadata: str) -> Path:
        tensors, said = FORMATS[form].write(file, target(base).spec)
        path = tmp_path / f"{name}.safetensors"
        save(tensors, said | metadata, path)
        return path

    return write


def _deltas(path: Path, base: Path, network: int = 0) -> dict[str, torch.Tensor]:
    """What a file adds to each weight of a base, float64."""
    from tuner.builtin.adapter_file import read

    aim = models.targets(base)[network]
    file = read(path, aim.spec, aim.shapes, models.formats())
    return {module: update.delta(aim.shapes[module], dtype=torch.float64) for module, update in file.updates.items()}


def _run(*arguments: object) -> str:
    """The output of a command that succeeds; what it raises otherwise."""
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    if done.exception is not None:
        raise done.exception
    return done.output


@pytest.fixture
def run() -> Callable[..., str]:
    """Runs ``tuner``."""
    return _run


@pytest.fixture
def lora() -> Callable[..., AdapterFile]:
    """Makes a LoRA of matrices."""
    return _lora


@pytest.fixture
def lokr() -> Callable[..., AdapterFile]:
    """Makes a LoKr of matrices."""
    return _lokr


@pytest.fixture
def deltas() -> Callable[..., dict[str, torch.Tensor]]:
    """Reads what a file adds."""
    return _deltas
