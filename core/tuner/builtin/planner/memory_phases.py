"""Memory beside the training step: while data are encoded, and while clips are rendered and decoded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from tuner.builtin.planner.memory import CONTEXT, Memory, around, predict, weights, without_zeros
from tuner.builtin.planner.memory_blocks import FLOAT32, activations_of, block_bytes, bytes_of, plain_bytes
from tuner.spec import ModelSpec
from tuner.workload import Workload

RING = 2
"""Blocks of a component on the device at a time, where it streams."""


def phases(
    spec: ModelSpec,
    workload: Workload,
    *,
    rendered: tuple[int, int, int] | None = None,
    precisions: Mapping[str, str] | None = None,
    tiled: bool = False,
) -> dict[str, Memory]:
    """Memory of ``caching``, ``training`` and ``validation``, each at its worst moment.

    Arguments
        workload: a training step on the largest clips.
        rendered: (frames, height, width) of what validation renders; None is no rendering.
        precisions: component -> what quantises it, such as ``int8-quanto``; its bits are the number in its name.
        tiled: whether the VAE works tile by tile.
    """
    precisions = precisions or {}
    found = {
        "caching": _worst(
            [encoding(spec, name, workload, precisions.get(name), tiled=tiled) for name in _encoders(spec)]
        ),
        "training": _beside(spec, workload, predict(workload)),
    }
    if rendered is not None:
        alone = replace(workload, shape=rendered, samples=1, dropped=())
        last = [decoding(spec, name, alone, tiled=tiled) for name in spec.components if _decodes(spec, name)]
        found["validation"] = _beside(spec, workload, _worst([rendering(alone), *last]))
    return found


def _worst(several: list[Memory]) -> Memory:
    return max(several, key=lambda each: each.on_device, default=Memory())


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
    held = activations_of(workload)
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
