"""The model is loaded, edited, and everything is encoded."""

# Specifications have docstrings and no bodies.
# mypy: disable-error-code="empty-body"
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tuner.hookspecs.markers import hookspec

if TYPE_CHECKING:
    from tuner.data.cached import CachedData
    from tuner.data.samples import Prepared
    from tuner.model import EncodeBatch, Encoded, Model, Transform
    from tuner.run import Run


class ModelHooks:
    """The model is loaded, edited, and everything is encoded."""

    @hookspec(firstresult=True)
    def load_model(self, run: Run) -> Model:
        """Build the model without its weights' storage.

        Called: one, once, after the model is described and the device is known.
        Arguments: ``run``.
        Returns: a Model whose networks are on the meta device and come with a lazy source of weights;
        the core materialises them after the cache is built, tensor by tensor.

        Example::

            @hookimpl
            def load_model(self, run):
                from tuner_wan.loading import load
                return load(run, self.config)
        """

    @hookspec
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """Declare edits of the model: adapters, rewrites, placement.

        Called: all, after ``load_model`` and before anything is encoded; the core sorts them by stage, refuses two
        claims on one thing, and applies them when the weights are read.
        Arguments: ``run``; ``model``, not yet materialised.
        Returns: Transforms.

        Example::

            @hookimpl
            def model_transforms(self, run, model):
                from tuner_chunked_ff.chunk import transform
                return [transform(self.config)]
        """

    @hookspec
    def quantizers(self, run: Run) -> Mapping[str, Any]:
        """Offer quantisation backends.

        Called: all, when ``base_model_precision`` or ``text_encoder_1_precision`` names a backend, before the weights
        it is for are read.
        Arguments: ``run``.
        Returns: precision -> a function ``(network) -> Sink`` that prepares the modules of the network's blocks and
        takes each tensor as it is read. The network may be a text encoder: no block driver runs its ``stack``. A value
        offered twice is an error.

        Example::

            @hookimpl
            def quantizers(self, run):
                from tuner_quantization.quanto import Int8Sink
                return {"int8-quanto": Int8Sink}
        """

    @hookspec
    def extra_captions(self, run: Run) -> Iterable[str]:
        """Name captions to encode beside the datasets' own, such as validation prompts.

        Called: all, once, before the text cache is built.
        Arguments: ``run``.
        Returns: captions; their encodings are then at ``run.text_cache``.

        Example::

            @hookimpl
            def extra_captions(self, run):
                return [run.config.validation_prompt]
        """

    @hookspec(firstresult=True)
    def fill_cache(
        self, run: Run, model: Model, data: Prepared, captions: Sequence[str], hooks: Any, verify: bool
    ) -> CachedData:
        """Encode what the cache lacks, and say where everything is.

        Called: one, before training, and by ``tuner cache``, on every process.
        Arguments: ``run``; ``model``; ``data``, as ``prepare_data`` answered; ``captions``, to encode beside the data's
        own; ``hooks``, which has ``encode_batch``; ``verify``: read every entry again.
        Returns: a CachedData (``tuner.data.cached``), whose samples are those that could be encoded.

        Example::

            @hookimpl
            def fill_cache(self, run, model, data, captions, hooks, verify):
                from my_cache.fill import fill
                return fill(run, model, data, captions, hooks)
        """

    @hookspec(firstresult=True)
    def encode_batch(self, run: Run, model: Model, batch: EncodeBatch) -> Encoded:
        """Encode clips or captions for the cache.

        Called: one, while the cache is built, without gradients; the core holds the needed components loaded.
        Arguments: ``run``; ``model``; ``batch``, whose ``kind`` is ``video``, ``text`` or ``conditioning``.
        Returns: one dict of tensors per item (see ``tuner.model.Encoded``). A failure is raised, never stored.

        Example::

            @hookimpl
            def encode_batch(self, run, model, batch):
                with model.use("vae") as (vae,):
                    return [{"latents": latents} for latents in encode(vae, batch.pixels)]
        """

    @hookspec
    def attention_backends(self, run: Run) -> Mapping[str, Any]:
        """Offer attention kernels.

        Called: all, once, before training, when ``attention_mechanism`` names a backend.
        Arguments: ``run``.
        Returns: value of ``attention_mechanism`` -> an AttentionBackend (see ``tuner.attention``): the
        name the diffusers dispatcher knows it by, and whether it has a backward. A value offered twice is an error.

        Example::

            @hookimpl
            def attention_backends(self, run):
                from tuner.attention import AttentionBackend
                return {"flex": AttentionBackend(dispatcher="flex", trains=False)}
        """
