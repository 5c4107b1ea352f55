"""A toy model family: real modules, real files, no Wan.

It proves that features work for every family: token routing, LoRA, chunked feed-forward, offload and
validation run on it without knowing it, and it without knowing them. It is also the shortest family
there is to read before writing one.

Tests put a distribution with the entry point ``toy`` on the path (see ``tuner.testing.plugin_env``);
:func:`build_toy` writes a model folder. ``tuner plugins new NAME --kind family`` copies these files under another name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.model import Batch, EncodeBatch, Encoded, Loss, Model
    from tuner.run import Run
    from tuner.spec import ModelSpec

__all__ = ["ToyConfig", "ToyPlugin", "build_toy"]


class ToyConfig(PluginConfig):
    """The toy family owns no keys."""


class ToyPlugin(Plugin[ToyConfig]):
    """A toy video model, for tests and for authors of families."""

    provides = frozenset({"model-family"})
    Config = ToyConfig

    @hookimpl
    def describe_model(self, run: Run) -> ModelSpec:
        """The dimensions in the model folder's config files."""
        from tuner.testing.toy.describe import describe

        return describe(run.config)

    @hookimpl
    def load_model(self, run: Run) -> Model:
        """The network on the meta device, with a lazy reader of its weights."""
        from tuner.testing.toy.model import load

        return load(run)

    @hookimpl
    def encode_batch(self, run: Run, model: Model, batch: EncodeBatch) -> Encoded:
        """Latents of clips, or states of captions."""
        from tuner.testing.toy.model import encode

        return encode(model, batch)

    @hookimpl
    def compute_loss(self, run: Run, model: Model, batch: Batch) -> Loss:
        """The flow-matching loss of the network's prediction."""
        from tuner import flow

        return flow.loss(run.config, model.predict(batch), batch)


def build_toy(path: str | Path, **settings: Any) -> Path:
    """Write a toy model folder to ``path`` (see :func:`tuner.testing.toy.build.build`); returns ``path``."""
    from tuner.testing.toy.build import build

    return build(Path(path), **settings)
