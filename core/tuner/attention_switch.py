"""Choosing the attention kernel of a network: on its processors, never for the whole process.

diffusers' own ``set_attention_backend`` also sets a process-wide default, which would reach the text
encoder's and VAE's pipelines and which its reset does not undo. Here each processor of the denoiser is
set by itself, and a kernel for validation is put in for validation only and taken out afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError, nearest

if TYPE_CHECKING:
    from diffusers.models.attention_dispatch import AttentionBackendName

    from tuner.attention import AttentionBackend, Kernel
    from tuner.model import Network


def set_backend(network: Network, backend: AttentionBackend | None) -> None:
    """Make every attention of ``network`` use ``backend``; None goes back to the dispatcher's default.

    Raises ConfigError when the dispatcher does not know the kernel, when this machine lacks what it needs, or
    when the network's attention cannot be switched.
    """
    kernel = None if backend is None else _dispatched(backend)
    processors = list(network.attention_processors())
    if network.sequence is not None:
        kernel = network.sequence.kernel(kernel)
    if kernel is not None and not processors:
        raise ConfigError(
            f"attention kernel {kernel.value!r} cannot be used: network {network.name!r} has no switchable attention",
            where="attention_mechanism",
            remedy="use `attention_mechanism: diffusers`",
        )
    for processor in processors:
        processor._attention_backend = kernel


@contextmanager
def validation_backend(network: Network, backend: AttentionBackend | None) -> Iterator[None]:
    """Use ``backend`` on ``network`` inside the block, and afterwards whatever each processor used before.

    None is the dispatcher's default. Raises ConfigError as :func:`set_backend` does, with nothing changed.
    """
    before = [(processor, processor._attention_backend) for processor in network.attention_processors()]
    try:
        set_backend(network, backend)
        yield
    finally:
        for processor, kernel in before:
            processor._attention_backend = kernel


def _dispatched(backend: AttentionBackend) -> AttentionBackendName:
    """The name under which the dispatcher runs ``backend``."""
    return _usable(backend.dispatcher or "native") if backend.kernel is None else _registered(backend.kernel)


@cache
def _registered(kernel: Kernel) -> AttentionBackendName:
    """A name in the dispatcher's table for ``kernel``."""
    from torch.nn.functional import scaled_dot_product_attention

    def run(query: Any, key: Any, value: Any, attn_mask: Any = None, is_causal: bool = False, scale: Any = None) -> Any:
        if attn_mask is None and not is_causal and scale is None:
            return kernel(query, key, value)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        exact = scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale)
        return exact.transpose(1, 2)

    return register(f"{kernel.__module__}.{kernel.__qualname__}", run, ["attn_mask", "is_causal", "scale"])


def register(name: str, run: Callable[..., Any], arguments: Iterable[str]) -> AttentionBackendName:
    """A name of its own in the dispatcher's table for ``run``: nothing that uses another name notices.

    The dispatcher takes members of its enumeration only; this is one that the enumeration itself does not list.
    ``run`` gets query, key and value, and of the dispatcher's other ``arguments`` those that are named.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    name = f"tuner:{name}"
    member = str.__new__(AttentionBackendName, name)
    member._name_ = member._value_ = name
    registry: Any = _AttentionBackendRegistry
    registry._backends[member], registry._constraints[member] = run, []
    registry._supported_arg_names[member] = {"query", "key", "value", *arguments}
    return member


def _usable(dispatcher: str) -> AttentionBackendName:
    """The dispatcher's name for its own kernel, once it has checked that this machine can run it."""
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _check_attention_backend_requirements,
        _maybe_download_kernel_for_backend,
    )

    known = sorted(kernel.value for kernel in AttentionBackendName)
    if dispatcher not in known:
        raise ConfigError(
            f"diffusers knows no attention kernel {dispatcher!r}",
            where="attention_mechanism",
            allowed=known,
            nearest=nearest(dispatcher, known),
        )
    kernel = AttentionBackendName(dispatcher)
    try:
        _check_attention_backend_requirements(kernel)
        _maybe_download_kernel_for_backend(kernel)
    except (RuntimeError, ImportError, ValueError, OSError) as error:
        raise ConfigError(
            f"attention kernel {dispatcher!r} cannot be used on this machine: {error}",
            where="attention_mechanism",
            remedy="install what it needs, or use `attention_mechanism: diffusers`",
        ) from error
    return kernel
