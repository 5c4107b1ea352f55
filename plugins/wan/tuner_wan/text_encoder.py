"""UMT5, read tensor by tensor as a denoiser is: it may be quantised on the way, or stay on the host to be streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tuner.blocks import BlockStack, Stream, Trampoline
from tuner.errors import ModelError, PluginError
from tuner.materialise import materialise
from tuner.model import Network, Sink
from tuner.spec import NetworkSpec
from tuner_wan import encode, sources
from tuner_wan.flavours import TEXT_TOKENS
from tuner_wan.names import text_encoder_name
from tuner_wan.sources import STEMS, Part, broken

if TYPE_CHECKING:
    from tuner.run import Run

EMBEDDING, TWIN = "shared.weight", "encoder.embed_tokens.weight"
"""One tensor under two names; files hold it under one of them or under both."""
OTHERS = ("decoder.", "lm_head.")
"""What a file of a whole UMT5 has besides."""
PROBES = 8
"""Random inputs that a quantised layer's error is measured with."""
Quantiser = Callable[[Network], Sink]


@dataclass(frozen=True)
class Reading:
    """How the text encoder of a run is read."""

    part: Part
    tokenizer: Path
    run: Run
    dtype: torch.dtype
    quantiser: Quantiser | None = None

    def on_device(self) -> encode.TextEncoder:
        """UMT5 and its tokenizer, in evaluation mode on the run's device."""
        return self._read(self.run.device)[0]

    def on_host(self) -> tuple[encode.TextEncoder, Network]:
        """The same on the CPU, and UMT5 as a network."""
        return self._read(torch.device("cpu"))

    def _read(self, device: torch.device) -> tuple[encode.TextEncoder, Network]:
        """Raises ModelError for files that cannot be read, lack tensors or hold others."""
        from transformers import AutoTokenizer

        try:
            words = AutoTokenizer.from_pretrained(self.tokenizer, local_files_only=True)
        except Exception as error:
            raise broken("tokenizer", error, self.tokenizer) from error
        network = build(self.part, self.dtype)
        quantised = None if self.quantiser is None else Quantised(self.quantiser(network), device)
        try:
            materialise(network, device=device, sinks=[] if quantised is None else [quantised])
        except ModelError as error:
            file, where = str(weight_files(self.part)[0]), error.where or ""
            if where.startswith(file):
                raise
            where = f"{file}: {where}" if where else file
            raise ModelError(error.what, where=where, allowed=error.allowed, remedy=error.remedy) from error
        if quantised is not None:
            self.run.log.info(
                "text encoder in %s: what its %d quantised layers compute is off by %.2g %% (root mean square)",
                self.run.config.text_encoder_1_precision,
                quantised.layers,
                100 * quantised.error,
            )
        model: Any = network.module.requires_grad_(False).eval()
        return encode.TextEncoder(words, model, TEXT_TOKENS), network


def reading(part: Part, tokenizer: Path, run: Run) -> Reading:
    """How ``run`` reads UMT5: in the precision that ``text_encoder_1_precision`` names."""
    precision = run.config.text_encoder_1_precision
    if precision == "no_change":
        return Reading(part, tokenizer, run, text_encoder_dtype(run.device, run.dtype))
    assert run.quantizer is not None, "the model is not described yet"
    # A quantiser's layers compute in the run's dtype, so what lies between them does too.
    return Reading(part, tokenizer, run, run.dtype, run.quantizer(precision))


def text_encoder_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """bfloat16, UMT5's own, on an accelerator in mixed precision (float16 overflows in it); else float32."""
    return torch.float32 if device.type == "cpu" or dtype == torch.float32 else torch.bfloat16


class Umt5Stack(BlockStack):
    """UMT5's blocks, for whoever quantises or streams them. UMT5's own forward runs them, never the block driver."""

    def embed(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises PluginError."""
        raise PluginError("the text encoder runs its blocks itself")

    def block(self, block: nn.Module, stream: Stream) -> NoReturn:
        """Raises PluginError."""
        raise PluginError("the text encoder runs its blocks itself")

    def unembed(self, stream: Stream) -> NoReturn:
        """Raises PluginError."""
        raise PluginError("the text encoder runs its blocks itself")


def build(part: Part, dtype: torch.dtype) -> Network:
    """UMT5 on the meta device with a lazy source of its weights, all of them in ``dtype``."""
    from accelerate import init_empty_weights
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config.from_dict(sources.read_config(part) or {})
    with init_empty_weights(include_buffers=False):
        model = UMT5EncoderModel(config)
    # Some releases of transformers 5 leave the encoder's own embedding untied, that is, random.
    model.set_input_embeddings(model.get_input_embeddings())
    stack = Umt5Stack(model, model.encoder.block)
    spec = NetworkSpec(
        part.name,
        blocks=config.num_layers,
        dim=config.d_model,
        heads=config.num_heads,
        ffn_dim=config.d_ff,
        text_dim=config.d_model,
        text_tokens=TEXT_TOKENS,
        in_channels=0,
    )
    return Network(
        spec, model, stack, partial(read_weights, weight_files(part)), lambda _: dtype, trampoline=Trampoline(stack)
    )


def weight_files(part: Part) -> list[Path]:
    """The safetensors files of UMT5."""
    return [part.file] if part.file is not None else sources.weight_files(sources.folder_of(part), STEMS[part.name])


def read_weights(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """(parameter name in transformers, tensor on the CPU) of each of UMT5's tensors, one in memory at a time.

    Raises ModelError for a file that is no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    embedded = False
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118
                    ours = text_encoder_name(name)
                    if ours in (EMBEDDING, TWIN):
                        ours, known, embedded = EMBEDDING, embedded, True
                        if known:
                            continue
                    if not ours.startswith(OTHERS):
                        yield ours, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise broken("text encoder", error, path) from error


@dataclass
class Quantised:
    """Passes tensors to a quantiser, brings what it makes of them to ``device``, and measures its error."""

    sink: Sink
    device: torch.device
    layers: int = 0
    _off: list[Tensor] = field(default_factory=list)
    _whole: list[Tensor] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Relative error (root mean square) of what the quantised layers give for normally distributed inputs."""
        if not self.layers:
            return 0.0
        return float((torch.stack(self._off).sum() / torch.stack(self._whole).sum()).sqrt())

    def take(self, module: nn.Module, name: str, tensor: Tensor) -> bool:
        """See :class:`tuner.model.Sink`."""
        if not self.sink.take(module, name, tensor):
            return False
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf == "weight":
            self._measure(owner, tensor)
        for key, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta and parameter.device != self.device:
                moved = parameter.to(self.device)
                kept = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
                owner._parameters[key] = kept
        for key, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[key] = buffer.to(self.device)
        return True

    @torch.no_grad()
    def _measure(self, owner: nn.Module, weight: Tensor) -> None:
        """Compare ``owner`` with the plain layer of ``weight`` (out, in)."""
        held = next(each for each in owner.parameters() if not each.is_meta)
        draw = torch.Generator().manual_seed(self.layers)
        inputs = torch.randn(PROBES, weight.shape[1], generator=draw).to(held.device, weight.dtype)
        expected = linear(inputs, weight.to(held.device)).float()
        self._off.append((owner(inputs).float() - expected).square().sum().cpu())
        self._whole.append(expected.square().sum().cpu())
        self.layers += 1
