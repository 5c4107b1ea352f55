"""Run: what every hook may rely on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner import rng

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tuner.blocks import TokenSelector
    from tuner.config.keys import CoreConfig
    from tuner.data.cached import CachedData
    from tuner.data.samples import Bucket
    from tuner.data.source import Source
    from tuner.model import Batch, Loss, Model, Network, Sink
    from tuner.plugin import AnyPlugin
    from tuner.spec import ModelSpec, NetworkSpec
    from tuner.train.optimizers import OptimizerChoice
    from tuner.workload import Workload

log = logging.getLogger("tuner")


@dataclass
class Run:
    """One run, from the moment its config is valid. Plugins read it; only the core writes to it.

    ``device`` and ``dtype`` are set once the engine is up: hooks that come before (``configure``,
    ``describe_model``) must not read them.
    """

    config: CoreConfig
    plugins: Mapping[str, AnyPlugin]
    """Every loaded plugin by name, built-ins included."""
    explicit: frozenset[str] = frozenset()
    """Keys that the user set, as opposed to defaults."""
    spec: ModelSpec | None = None
    trained_shape: tuple[int, int, int] | None = None
    """(frames, height, width) in pixels of the shape most clips are trained at; set once the data is known."""
    token_selectors: Mapping[str, TokenSelector] = field(default_factory=dict)
    """Ways to choose the tokens that a route keeps, by name; set once the model is described."""
    quantizer: Callable[[str], Callable[[Network], Sink]] | None = None
    """The quantisation backend of a precision (see the hook ``quantizers``); set once the model is described."""
    step: int = 0
    """Optimizer steps done."""
    total_steps: int = 0
    """Optimizer steps of the whole run; set once the epochs are planned."""
    variant: str = ""
    """Which weights are in place while a run is validated or saved (see the hook ``weight_variants``)."""
    estimate: Callable[[NetworkSpec, Bucket, int], Workload] | None = None
    """What a step costs: the workload of a network on so many clips of a bucket at once; set once the model is
    described."""
    process_index: int = 0
    process_count: int = 1
    optimizers: Mapping[str, OptimizerChoice] = field(default_factory=dict)
    """Optimizers by name; set before the data are looked at."""
    lr_curves: Mapping[str, Callable[[float], float]] = field(default_factory=dict)
    """Learning-rate curves by name; set together with them."""
    data_sources: Mapping[str, Source] = field(default_factory=dict)
    """Where files may come from beside a local folder, by ``type``; set once the model is described."""
    text_cache: Callable[[str], dict[str, Tensor]] | None = None
    """The cached encoding of a caption named in ``extra_captions``; set once the cache is built."""
    plain_loss: Callable[[Model, Batch], Loss] | None = None
    """The loss of a batch as the family makes it, without the plugins that wrap ``compute_loss``; set once the model
    is described."""
    cached: CachedData | None = None
    """All encodings, those of held-out samples too; set once the cache is built."""
    announcer: Callable[[str], Callable[..., None] | None] = lambda hook: None
    """What tells all plugins that implement a hook such as ``on_preview``, whatever one of them raises; None where none
    does. Set once the model is described."""
    log: logging.Logger = log
    _device: Any = field(default=None, repr=False)
    _dtype: Any = field(default=None, repr=False)

    @property
    def output_dir(self) -> Path:
        """Where everything this run makes is written."""
        return self.config.output_dir

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.process_index == 0

    @property
    def sharing(self) -> int:
        """Processes that share each sample (``context_parallel_size``)."""
        return 1 if self.process_count == 1 else self.config.context_parallel_size

    @property
    def replica_index(self) -> int:
        """Which share of the micro-batches this process does, of ``replica_count``."""
        return self.process_index // self.sharing

    @property
    def replica_count(self) -> int:
        """How many ways the micro-batches are divided: the processes, or the groups of them that share samples."""
        return self.process_count // self.sharing

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        if self._device is None:
            raise RuntimeError(
                "run.device is not known before the engine is up; hooks before load_model must not need it"
            )
        return self._device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen base and of autocast (``mixed_precision``)."""
        if self._dtype is None:
            raise RuntimeError(
                "run.dtype is not known before the engine is up; hooks before load_model must not need it"
            )
        return self._dtype  # type: ignore[no-any-return]

    def place(self, device: torch.device, dtype: torch.dtype, process_index: int = 0, process_count: int = 1) -> None:
        """Called once by the engine."""
        self._device, self._dtype = device, dtype
        self.process_index, self.process_count = process_index, process_count

    def rng(self, purpose: str, position: int = 0) -> torch.Generator:
        """A CPU generator for ``purpose`` (use your plugin's name) at this step and position in the global batch."""
        return rng.generator(self.config.seed, purpose, self.step, position)
