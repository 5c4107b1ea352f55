"""Memory beside the training step: while data are encoded, and while clips are rendered and decoded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tuner.builtin.planner.memory import CONTEXT, Memory, around, predict, weights, without_zeros
from tuner.builtin.planner.memory_blocks import FLOAT32, block_bytes, bytes_of, held_by, plain_bytes
from tuner.spec import ModelSpec
from tuner.workload import Workload

if TYPE_CHECKING:
    from tuner.run import Run

RING = 2
"""Blocks of a component on the device at a time, where it streams."""


@dataclass(frozen=True)
class Phase:
    """A part of a run that holds something else than the others."""

    name: str
    """``caching``, ``training`` or ``validation``"""
    what: str
    """what is at work, such as ``text encoder``; empty where that is always the same"""
    memory: Memory
    """at its worst moment"""

    def __str__(self) -> str:
        return f"{self.name} ({self.what})" if self.what else self.name


def phases(
    spec: ModelSpec,
    workload: Workload,
    *,
    precisions: Mapping[str, str] | None = None,
    tiled: bool = False,
) -> Iterator[Phase]:
    """Memory of caching with each encoder, of training, and of validation, where it renders, with each decoder.

    Arguments
        workload: a training step; the clips of it are encoded.
        precisions: component -> what quantises it, such as ``int8-quanto``; its bits are the number in its name.
        tiled: whether the VAE works tile by tile.
    """
    precisions = precisions or {}
    for name in _encoders(spec):
        yield Phase("caching", _words(name), encoding(spec, name, workload, precisions.get(name), tiled=tiled))
    yield Phase("training", "", _beside(spec, workload, predict(workload)))
    if workload.rendered is None:
        return
    alone = replace(workload, shape=workload.rendered, samples=1, dropped=())
    yield Phase("validation", "rendering", _beside(spec, workload, rendering(alone)))
    for name in sorted(filter(lambda each: _decodes(spec, each), spec.components)):
        yield Phase("validation", _words(name), _beside(spec, workload, decoding(spec, name, alone, tiled=tiled)))


def of_run(run: Run, spec: ModelSpec, workloads: Iterable[Workload]) -> list[Phase]:
    """The phases of ``run``, as its keys have them, each with those of ``workloads`` that take most in it.

    ``vae_enable_slicing`` changes nothing: clips are encoded and decoded one at a time in any case.
    """
    config = run.config
    chosen = config.text_encoder_1_precision
    precisions = dict.fromkeys(spec.encoders.get("text", ()), "" if chosen == "no_change" else chosen)
    found: dict[str, Phase] = {}
    for workload in workloads:
        for phase in phases(spec, workload, precisions=precisions, tiled=config.vae_enable_tiling):
            known = found.setdefault(str(phase), phase)
            if phase.memory.on_device > known.memory.on_device:
                found[str(phase)] = phase
    return list(found.values())


def _encoders(spec: ModelSpec) -> list[str]:
    """Components that encode and whose sizes are known."""
    return sorted({name for names in spec.encoders.values() for name in names if name in spec.components})


def _decodes(spec: ModelSpec, name: str) -> bool:
    return "decode_clip" in spec.components[name]


def encoding(
    spec: ModelSpec, name: str, workload: Workload, precision: str | None = None, *, tiled: bool = False
) -> Memory:
    """Encoding with the component ``name``, one item at a time; the networks are not loaded yet."""
    size = spec.components[name]
    total = size["weights"] - size.get("matrices", 0.0) * _saved(precision)
    streamed = name in workload.waiting and size.get("blocks", 0.0) > RING
    on_device = total if not streamed else _quantised(size, precision) * RING / size["blocks"]
    frames, height, width = workload.shape
    working = size.get("working", 0.0) + _pixels(size, height * width, tiled) * _per_pixel(size, "encode", frames)
    clip = frames * height * width * 3 * FLOAT32 if "encode_clip" in size else 0.0
    host = {f"weights of {_words(name)}": total - on_device, "clip": clip}
    device = {f"weights of {_words(name)}": on_device, f"{_words(name)} at work": working, "CUDA context": CONTEXT}
    return Memory(without_zeros(device), without_zeros(host))


def _quantised(size: Mapping[str, float], precision: str | None) -> float:
    """Bytes of the matrices, in two bytes each or in what ``precision`` makes of them."""
    return size.get("matrices", 0.0) * (2.0 - _saved(precision))


def _saved(precision: str | None) -> float:
    """Bytes that quantising saves of the two of a bfloat16 number."""
    bits = re.search(r"\d+", precision or "")
    return 2.0 - int(bits[0]) / 8 if bits else 0.0


def _words(name: str) -> str:
    return name.replace("_", " ")


def _pixels(size: Mapping[str, float], pixels: int, tiled: bool) -> float:
    return min(pixels, size.get("tile", pixels)) if tiled else pixels


def _per_pixel(size: Mapping[str, float], what: str, frames: int) -> float:
    """Bytes held for a pixel of a frame."""
    return size.get(f"{what}_{'clip' if frames > 1 else 'picture'}", 0.0)


def rendering(workload: Workload) -> Memory:
    """One forward of the network on one clip: with guidance, the two run one after the other."""
    network, width = workload.network, workload.activation_bytes
    held = held_by(workload, workload.tokens, checkpointed=False)
    limit = workload.feed_forward_tokens
    share = 1.0 if limit is None else min(1.0, limit / workload.tokens)
    sizes = (replace(each, wide=each.wide * share) for each in held.inference)
    at_work = workload.tokens * max(bytes_of(each, network, width) for each in sizes)
    copies = workload.adapter_parameters * width if width < FLOAT32 else 0.0
    device, host = weights(workload)
    device |= {"block at work": at_work + copies, "around the blocks": around(workload), "CUDA context": CONTEXT}
    return Memory(without_zeros(device), without_zeros(host))


def decoding(spec: ModelSpec, name: str, workload: Workload, *, tiled: bool = False) -> Memory:
    """Decoding one clip beside the network, which may have left for the host."""
    size = spec.components[name]
    frames, height, width = workload.shape
    working = _pixels(size, height * width, tiled) * _per_pixel(size, "decode", frames)
    working += frames * height * width * size.get("frame", 0.0)
    device, host = weights(workload)
    if "network" in workload.waiting:
        host["base weights"] = device.pop("base weights")
    device |= {f"weights of {_words(name)}": size["weights"], f"{_words(name)} at work": working}
    return Memory(without_zeros(device | {"CUDA context": CONTEXT}), without_zeros(host))


def _beside(spec: ModelSpec, workload: Workload, memory: Memory) -> Memory:
    """``memory`` with the networks that wait on the host while this one has its turn."""
    others = [each for each in spec.networks if each.name != workload.network.name]
    if not others:
        return memory
    sizes = (replace(workload, network=each) for each in others)
    waiting = sum(each.network.blocks * block_bytes(each) + each.network.other * plain_bytes(each) for each in sizes)
    return Memory(memory.device, memory.host | {"networks that wait": waiting})
