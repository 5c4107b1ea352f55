"""Which features go together: each pair really assembled and held against a model and its data, no weight read.

The features are small sets of keys. What refuses a pair is the plugins themselves, with their own words.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

from tuner import pipeline
from tuner.assembly import assemble
from tuner.errors import ConfigErrors, TunerError
from tuner.selection import DISTRIBUTION, Catalog, Found, discover
from tuner.testing.clips import render_clip

FRAMES = 5
NO_EFFECT = "has no effect yet"
"""What is said of keys whose feature is not built."""
FOLDERS = ("clips", "held")
"""Of the clips that are trained on, and of those of a feature's own datasets."""
HOST_MEMORY = "tuner_offload.room"
"""Module whose ``available`` measures this machine's memory."""


@dataclass(frozen=True)
class Feature:
    """Some keys that switch one thing on."""

    name: str
    keys: Mapping[str, Any]
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Keys without which it is refused by itself: set where the other feature says nothing of them."""
    entry: Mapping[str, Any] | None = None
    """A dataset of its own."""
    cuda: bool = False
    """Whether it can be tried on a CUDA device only."""


def _one(key: str, *values: str, cuda: Sequence[str] = ()) -> tuple[Feature, ...]:
    """A feature for each value of ``key``, named by the value."""
    return tuple(Feature(value, {key: value}, cuda=value in cuda) for value in values)


ROUTE = {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}
STREAMED = {"enable_group_offload": True}
TRAINED = (
    Feature("LoRA", {"model_type": "lora", "lora_type": "standard"}),
    Feature("LyCORIS", {"model_type": "lora", "lora_type": "lycoris"}, beside={"lycoris_config": {"algo": "lokr"}}),
    Feature("full", {"model_type": "full"}),
    Feature("EMA", {"use_ema": True}),
)
MODELS = (
    Feature("image to video", {"model_flavour": "i2v-14b-2.1"}),
    Feature("two experts", {"model_flavour": "t2v-14b-2.2-both"}),
    Feature("TI2V", {"model_flavour": "ti2v-5b-2.2"}),
)
LOSSES = (
    Feature("TREAD", {"tread_config": {"routes": [ROUTE]}}),
    Feature("scheduled sampling", {"scheduled_sampling_max_step_offset": 2}),
    Feature("prior preservation", {}, entry={"dataset_type": "video", "is_regularisation_data": True}),
    Feature("held-out loss", {"eval_steps_interval": 1}, entry={"dataset_type": "eval"}),
)
MEMORY = (
    Feature("no checkpointing", {"gradient_checkpointing": False}),
    Feature("selective checkpointing", {"gradient_checkpointing": "selective"}),
    Feature("checkpoints on the host", {"gradient_checkpointing": "offload"}),
    Feature("checkpointing interval", {"gradient_checkpointing_interval": 2}),
    Feature("group offload", STREAMED | {"group_offload_type": "block_level"}),
    Feature("group offload by layer", STREAMED | {"group_offload_type": "leaf_level"}),
    Feature("group offload to disk", STREAMED | {"group_offload_to_disk_path": "offloaded"}),
    Feature("model offload", {"enable_model_cpu_offload": True}),
    Feature("text encoder offload", {"text_encoder_offload": True}),
    Feature("chunked feed-forward", {"enable_chunked_feed_forward": True, "feed_forward_chunk_size": 1}),
    Feature("fused blocks", {"fused_blocks": True}),
    Feature("gradient release", {"gradient_release": True}, beside={"model_type": "full", "max_grad_norm": 0}),
)
PRECISIONS = _one(
    "base_model_precision",
    "fp8-scaled",
    "int8-quanto",
    "int4-quanto",
    "fp8-quanto",
    "int8-torchao",
    "fp8-torchao",
    "int4-torchao",
    "int8-bnb",
    "nf4-bnb",
    "int8-products",
    "fp8-products",
    cuda=["int4-torchao"],
)
ENCODERS = (Feature("quantised text encoder", {"text_encoder_1_precision": "int8-quanto"}),)
KERNELS = (
    *_one("attention_mechanism", "_native_cudnn", "flash", "xformers", cuda=["_native_cudnn", "flash", "xformers"]),
    Feature("sageattention", {"attention_mechanism": "sageattention", "attention_usage": "inference"}, cuda=True),
    Feature(
        "sageattention in training", {"attention_mechanism": "sageattention", "attention_usage": "both"}, cuda=True
    ),
    Feature("flex", {"attention_mechanism": "flex"}),
)
OPTIMIZERS = _one("optimizer", "optimi-lion", "bnb-adamw8bit", "ao-adamw8bit", "adamw_schedulefree", "prodigy", "muon")
MORE_OPTIMIZERS = _one("optimizer", "adamw", "adamw_bf16", "bnb-lion8bit-paged", "ao-adamwfp8", "adafactor", "sgd")
"""Tried like the others; beside other features they are what those are."""
FEATURES = {
    each.name: each
    for each in (
        *(*TRAINED, *MODELS, *LOSSES, *MEMORY),
        *(*PRECISIONS, *ENCODERS, *KERNELS, *OPTIMIZERS),
    )
}

TOGETHER = ("TREAD", "group offload", "chunked feed-forward", "selective checkpointing")
BY_LAYER = ("TREAD", "group offload by layer", "chunked feed-forward", "checkpoints on the host")
BESIDE_A_PRECISION = ((), ("TREAD",), TOGETHER, BY_LAYER)
ONE_BY_ONE = (
    ("selective checkpointing",),
    ("checkpoints on the host",),
    ("group offload",),
    ("group offload by layer",),
    ("chunked feed-forward",),
)
WAYS_TO_STORE = ("fp8-scaled", "int8-quanto", "int8-torchao")
"""Of each way that quantised weights are stored one precision: own buffers, and two libraries' tensor classes."""
BESIDE_FULL = (
    (),
    ("selective checkpointing",),
    ("checkpoints on the host",),
    ("group offload",),
    ("gradient release",),
    TOGETHER,
)
EVERYTHING = ("LoRA", "int8-quanto", *TOGETHER, "scheduled sampling", "prior preservation", "optimi-lion")


def trained_together() -> list[tuple[str, ...]]:
    """The sets of features that the matrix test trains a tiny model with."""
    return [
        *(("LoRA", each.name, *others) for each in PRECISIONS for others in BESIDE_A_PRECISION),
        *(("LoRA", name, *others) for name in WAYS_TO_STORE for others in ONE_BY_ONE),
        *(("full", *others) for others in BESIDE_FULL),
        *(("LoRA", each.name) for each in OPTIMIZERS),
        *(("full", name) for name in ("bnb-adamw8bit", "ao-adamw8bit")),
        ("LoRA", "scheduled sampling"),
        ("LoRA", "prior preservation"),
        *(("LoRA", "fused blocks", *others) for others in (*BESIDE_A_PRECISION, *ONE_BY_ONE)),
        *(("LoRA", "fused blocks", name) for name in WAYS_TO_STORE),
        EVERYTHING,
    ]


@dataclass(frozen=True)
class Verdict:
    """What was said of some features together."""

    refusals: tuple[TunerError, ...] = ()
    said: tuple[str, ...] = ()
    """What the run says will not happen, or is to be known."""

    @property
    def usable(self) -> bool:
        """Whether there is anything to be had of it: it is neither refused nor without effect."""
        return not self.refusals and not any(NO_EFFECT in line for line in self.said)


def ours() -> dict[str, Found]:
    """The plugins that come with this package: what else is installed does not count."""
    return {name: found for name, found in discover().items() if found.package == DISTRIBUTION}


@dataclass(frozen=True)
class Bench:
    """A folder with clips, and the plugins that configs are put together from."""

    folder: Path
    catalog: Catalog = field(default_factory=lambda: Catalog(ours()))
    base: Mapping[str, Any] = field(default_factory=lambda: {"model_family": "wan"})
    """Keys that every set of features is added to."""

    def render(self) -> None:
        """Write the clips."""
        for seed, name in enumerate(FOLDERS):
            (self.folder / name).mkdir(parents=True)
            path = self.folder / name / f"{name}.mp4"
            render_clip(path, width=48, height=32, frames=FRAMES, fps=16, seed=seed)

    def settings(self, features: Sequence[Feature]) -> dict[str, Any]:
        """A flat config with all of ``features``."""
        entries = [self._entry("clips", {"dataset_type": "video"})]
        entries += [self._entry("held", each.entry) for each in features if each.entry is not None]
        for number, entry in enumerate(entries):
            entry["id"] = f"{entry['id']}-{number}"
        settings: dict[str, Any] = {
            "output_dir": str(self.folder / "output"),
            "cache_dir": str(self.folder / "cache"),
            "max_train_steps": 2,
            "validation_prompt": "coloured shapes that move slowly over a plain background",
            **self.base,
            "data_backend_config": [*entries, {"id": "text", "dataset_type": "text_embeds", "default": True}],
        }
        for each in features:
            settings |= each.beside
        for each in features:
            settings |= each.keys
        if disk := settings.get("group_offload_to_disk_path"):
            settings["group_offload_to_disk_path"] = str(self.folder / disk)
        return settings

    def _entry(self, folder: str, keys: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": folder,
            "instance_data_dir": str(self.folder / folder),
            "caption_strategy": "filename",
            "resolution": 32,
            "video": {"num_frames": FRAMES},
            **keys,
        }

    def judge(self, *features: Feature) -> Verdict:
        """Do what ``tuner check`` does with ``features``: everything before weights are read."""
        with _heard() as lines:
            try:
                assembly = assemble(self.settings(features), catalog=self.catalog)
                lines += assembly.warnings
                pipeline.survey(assembly)
            except ConfigErrors as error:
                return Verdict(refusals=tuple(error.errors))
            except TunerError as error:
                return Verdict(refusals=(error,))
        return Verdict(said=tuple(dict.fromkeys(lines)))


def alternatives(one: Feature, other: Feature) -> bool:
    """Whether two features are two values of one key, so that there is no config with both."""
    return any(one.keys[key] != other.keys[key] for key in one.keys.keys() & other.keys.keys())


@contextmanager
def _heard() -> Iterator[list[str]]:
    """The warnings of what happens inside; nothing is printed."""
    lines: list[str] = []

    class Hearing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, hearing = logging.getLogger("tuner"), Hearing(logging.WARNING)
    propagate = log.propagate
    log.addHandler(hearing)
    log.propagate = False
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield lines
    finally:
        log.propagate = propagate
        log.removeHandler(hearing)


@contextmanager
def complete_machine(catalog: Catalog) -> Iterator[None]:
    """As on a machine with a CUDA device, memory enough and every package.

    The device is a Hopper. ``torch.cuda.is_available`` and each ``find_spec`` that a module of the core or of a plugin
    in ``catalog`` holds answer yes meanwhile, and the host memory is unknown.
    """
    import torch

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=True))
        patches.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)))
        patches.enter_context(mock.patch(f"{HOST_MEMORY}.available", return_value=None))
        for module in _modules(catalog):
            if hasattr(module, "find_spec"):
                patches.enter_context(mock.patch.object(module, "find_spec", lambda name: ModuleSpec(name, None)))
        yield


def _modules(catalog: Catalog) -> Iterable[Any]:
    """The loaded modules of the core and of the plugins."""
    packages = {catalog.load(name).__module__.partition(".")[0] for name in catalog.installed}
    return [module for name, module in sorted(sys.modules.items()) if name.partition(".")[0] in packages | {"tuner"}]
