"""Choosing the attention kernel of a network: on its processors, never for the whole process.

diffusers' own ``set_attention_backend`` also sets a process-wide default, which would reach the text
encoder's and VAE's pipelines and which its reset does not undo. Here each processor of the denoiser is
set by itself, and a kernel without a backward is put in for validation only and taken out afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tuner.errors import ConfigError, nearest

if TYPE_CHECKING:
    from diffusers.models.attention_dispatch import AttentionBackendName

    from tuner.attention import AttentionBackend
    from tuner.model import Network


def set_backend(network: Network, dispatcher: str | None) -> None:
    """Make every attention of ``network`` use the kernel that diffusers' dispatcher calls ``dispatcher``.

    None goes back to the dispatcher's default. Raises ConfigError when the dispatcher does not know the
    kernel, when this machine lacks what it needs, or when the network's attention cannot be switched.
    """
    kernel = None if dispatcher is None else _usable_kernel(dispatcher)
    processors = list(network.attention_processors())
    if kernel is not None and not processors:
        raise ConfigError(
            f"attention kernel {dispatcher!r} cannot be used: network {network.name!r} has no switchable attention",
            where="attention_mechanism",
            remedy="use `attention_mechanism: diffusers`",
        )
    for processor in processors:
        processor._attention_backend = kernel


@contextmanager
def validation_backend(network: Network, backend: AttentionBackend | None) -> Iterator[None]:
    """Use ``backend`` on ``network`` inside the block, and afterwards whatever each processor used before.

    None changes nothing. Raises ConfigError as :func:`set_backend` does, with nothing changed.
    """
    before = [(processor, processor._attention_backend) for processor in network.attention_processors()]
    try:
        if backend is not None:
            set_backend(network, backend.dispatcher)
        yield
    finally:
        for processor, kernel in before:
            processor._attention_backend = kernel


def _usable_kernel(dispatcher: str) -> AttentionBackendName:
    """The dispatcher's name for the kernel, once it has checked that this machine can run it."""
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
