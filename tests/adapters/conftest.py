"""A tiny Wan on disk, and networks made from it as a family hands them over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tuner.blocks import install
from tuner.config.keys import CoreConfig
from tuner.model import Batch, Model, Network, SampleRequest
from tuner.run import Run
from tuner.spec import LatentGeometry, ModelSpec, NetworkSpec
from tuner_wan.names import RENAME
from tuner_wan.stack import WanStack
from tuner_wan.tiny import build_tiny_t2v

torch.set_num_threads(1)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER = NetworkSpec("transformer", 2, 24, 2, 32, 16, 512, 16)


class NetworkOnly(Model):
    """A model of which a test needs the networks alone."""

    def predict(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def sample(self, request: SampleRequest) -> Tensor:
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Wan 2.1 T2V in the diffusers layout."""
    return build_tiny_t2v(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def spec() -> ModelSpec:
    """What the Wan family says of it."""
    return ModelSpec(
        family="wan",
        flavour="t2v-480p-1.3b-2.1",
        base="/home/someone/models/tiny",
        networks=(TRANSFORMER,),
        latents=LatentGeometry(16, 4, 8),
        size_multiple=16,
        fps=16,
        adapter_targets=TARGETS,
        rename=RENAME,
    )


@pytest.fixture
def make_network(tiny_wan: Path) -> Callable[..., Network]:
    """Makes the tiny Wan's denoiser as a network, in a dtype."""
    from diffusers import WanTransformer3DModel

    def make(dtype: torch.dtype = torch.float32) -> Network:
        module = WanTransformer3DModel.from_pretrained(tiny_wan / "transformer", torch_dtype=dtype)
        return as_network(module.requires_grad_(False).eval())

    return make


def as_network(module: nn.Module) -> Network:
    """A Wan transformer as a network."""
    stack = WanStack(module)
    return Network(
        spec=TRANSFORMER,
        module=module,
        stack=stack,
        weights=lambda: iter(()),
        dtype_of=lambda name: torch.float32,
        trampoline=install(module, stack),
    )


@pytest.fixture
def make_run(tmp_path: Path, spec: ModelSpec) -> Callable[..., Run]:
    """Makes a run on the CPU with some core keys set."""

    def make(**keys: object) -> Run:
        run = Run(CoreConfig(output_dir=tmp_path / "out", **keys), plugins={}, explicit=frozenset(keys), spec=spec)
        run.place(torch.device("cpu"), torch.float32)
        return run

    return make


@pytest.fixture
def wan_inputs() -> dict[str, Tensor]:
    """Arguments of the denoiser's forward: latents (2, 16, 3, 4, 4), times (2,), text (2, 512, 16)."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 16, 3, 4, 4, generator=generator),
        "timestep": torch.tensor([900.0, 250.0]),
        "encoder_hidden_states": torch.randn(2, 512, 16, generator=generator),
    }


@pytest.fixture
def randomise() -> Callable[[Mapping[str, Tensor]], None]:
    """Gives trained tensors values as after training: nothing is zero."""

    def fill(state: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        for tensor in state.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)

    return fill


@pytest.fixture
def make_model(spec: ModelSpec) -> Callable[[Network], Model]:
    """Makes a model of one network."""
    return lambda network: NetworkOnly(spec, [network], {})
