"""Building a WanModel: the denoiser without storage and a lazy source of its weights; encoders by phase."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.blocks import install
from tuner.errors import ModelError
from tuner.materialise import materialise
from tuner.model import Component, Network
from tuner.spec import ModelSpec, NetworkSpec
from tuner_wan import sources
from tuner_wan.components import components
from tuner_wan.describe import choose, denoiser_config, describe, locate, sampler_shift
from tuner_wan.fetch import fetch
from tuner_wan.fit import check_weights
from tuner_wan.model import OTHER_EXPERT, WanModel
from tuner_wan.names import diffusers_name, is_original
from tuner_wan.sources import STEMS, Part, broken

if TYPE_CHECKING:
    from tuner.run import Run
    from tuner_wan import WanConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load(run: Run, own: WanConfig | None = None) -> WanModel:
    """The configured model: networks on the meta device, components not loaded.

    Fetches what lies in hub repositories first. Raises ModelError for files that cannot be had, are
    incomplete, or turn out to differ from what ``describe_model`` said without them.
    """
    core = run.config
    flavour = choose(core)
    parts = fetch(locate(core, own, flavour))
    spec = describe(core, own)
    _check_described(run.spec, spec)
    dtype = DTYPES[core.base_model_default_dtype] if core.base_model_default_dtype else run.dtype
    networks = [
        build_network(each, denoiser_config(parts[each.name], flavour), parts[each.name], dtype)
        for each in spec.networks
    ]
    scheduler = sources.read_config(parts["scheduler"]) or {}
    encoders = components(parts, spec, run)
    for name in {"transformer", "transformer_2"}.intersection(parts).difference(each.name for each in spec.networks):
        other = replace(spec.networks[0], name=name)
        encoders[OTHER_EXPERT] = _other_expert(other, denoiser_config(parts[name], flavour), parts[name], dtype)
    shift = sampler_shift(parts, core, flavour)
    global_time = own is not None and own.wan_force_2_1_time_embedding
    return WanModel(spec, networks, encoders, scheduler, shift, global_time=global_time)


def _other_expert(spec: NetworkSpec, config: Mapping[str, Any], part: Part, dtype: torch.dtype) -> Component:
    """The expert that is not trained, as it comes, on the host: for validation only."""

    def load() -> nn.Module:
        network = build_network(spec, config, part, dtype)
        materialise(network, device=torch.device("cpu"))
        return network.module.eval()

    return Component(load, tuple(weight_paths(part)))


def _check_described(before: ModelSpec | None, now: ModelSpec) -> None:
    """Refuse to go on with dimensions that the data was prepared for and the fetched files contradict."""
    if before is not None and (before.networks, before.latents) != (now.networks, now.latents):
        raise ModelError(
            f"the files of {now.base!r} do not have the dimensions of flavour {before.flavour!r}",
            allowed=str(before.networks[0]),
            remedy="start again: the fetched config.json will be read instead of the flavour's table",
        )


def build_network(spec: NetworkSpec, config: Mapping[str, Any], part: Part, dtype: torch.dtype) -> Network:
    """The denoiser of ``config`` on the meta device (rotary tables excepted), driven by the block stack.

    ``dtype`` is that of its matrices; modulation, norms and time embedder stay float32, as diffusers
    keeps them.
    """
    from accelerate import init_empty_weights
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    from tuner_wan.stack import WanStack

    with init_empty_weights(include_buffers=False):
        module: nn.Module = WanTransformer3DModel.from_config(dict(config))
    stack = WanStack(module)
    files, ignored = weight_paths(part), tuple(module._keys_to_ignore_on_load_unexpected or ())  # type: ignore[arg-type]
    check_weights(module, files, ignored=ignored)
    return Network(
        spec=spec,
        module=module,
        stack=stack,
        weights=partial(read_weights, files, ignored),
        dtype_of=partial(parameter_dtype, dtype=dtype, kept=frozenset(module._keep_in_fp32_modules)),  # type: ignore[arg-type]
        trampoline=install(module, stack),
        feed_forwards={f"blocks.{index}.ffn": block.ffn for index, block in enumerate(stack.blocks)},  # type: ignore[misc]
        attention_processors=partial(_processors, module),
    )


def weight_paths(part: Part) -> list[Path]:
    """The safetensors files of a part that lies in a folder or a single file."""
    if part.folder is None:
        return [] if part.file is None else [part.file]
    return sources.weight_files(part.folder, STEMS[part.name])


def read_weights(files: Sequence[Path], ignored: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """(parameter name in diffusers, tensor on the CPU) of every tensor in ``files``, one in memory at a time.

    Names of Wan's own code are translated; names that match a pattern in ``ignored`` are left out.
    Raises ModelError for a file that is no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                names = list(file.keys())
                translate = diffusers_name if any(map(is_original, names)) else str
                for name in names:
                    if not any(re.search(pattern, name) for pattern in ignored):
                        yield translate(name), file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise broken(path.name, error, path) from error


def parameter_dtype(name: str, *, dtype: torch.dtype, kept: frozenset[str]) -> torch.dtype:
    """float32 for parameters of the modules named in ``kept``, else ``dtype``: diffusers' own rule when it loads."""
    return torch.float32 if kept.intersection(name.split(".")) else dtype


def _processors(module: nn.Module) -> list[Any]:
    return list(module.attn_processors.values())  # type: ignore[operator, union-attr]
