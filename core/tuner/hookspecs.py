"""THE contract: every hook a plugin may implement.

``run`` goes to every hook (:class:`tuner.run.Run`). *One* means exactly one loaded plugin answers,
*at most one* that none need, *all* that every answer counts and the core merges them. Implement a hook
as a method of your :class:`tuner.Plugin` subclass, marked with ``@tuner.hookimpl``, with these very
argument names (a hook may leave out arguments it does not need).
"""

# Specifications have docstrings and no bodies.
# mypy: disable-error-code="empty-body"
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from tuner.blocks import RouteRequest, TokenRoute, TokenSelector
    from tuner.data.order import Order
    from tuner.data.samples import Prepared, Sample
    from tuner.data.source import Source
    from tuner.model import Batch, EncodeBatch, Encoded, Loss, Model, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.validate.results import Validation

PROJECT = "tuner"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

REQUIRED = frozenset({"describe_model", "prepare_data", "plan_epochs", "load_model", "encode_batch", "compute_loss"})
"""Hooks with exactly one answer: a model family's, and those of the built-in ``datasets`` and ``epochs``."""
SINGLE = REQUIRED | {"route_tokens"}
"""Hooks with at most one answer."""


class HookSpecs:
    """The hooks, in the order a run calls them."""

    @hookspec
    def configure(self, run: Run) -> None:
        """Check what only the whole selection can tell.

        Called: all, after every config is valid and before any weight is read; also by ``tuner check``.
        Arguments: ``run``, without device and model spec.
        Returns: nothing; raises ConfigError to refuse.

        Example::

            @hookimpl
            def configure(self, run):
                if self.config.enable_model_cpu_offload and self.config.enable_group_offload:
                    raise ConfigError("enable_model_cpu_offload and enable_group_offload exclude each other")
        """

    @hookspec(firstresult=True)
    def describe_model(self, run: Run) -> ModelSpec:
        """Say what the model is, without weights and without torch.

        Called: one, before everything that needs dimensions: ``check``, buckets, data report, routes.
        Arguments: ``run``, without device and model spec.
        Returns: a ModelSpec, from the model's config.json or a table of flavours.

        Example::

            @hookimpl
            def describe_model(self, run):
                from my_family.describe import read_spec
                return read_spec(run.config.pretrained_model_name_or_path)
        """

    @hookspec
    def token_selectors(self, run: Run) -> Mapping[str, TokenSelector]:
        """Offer ways to choose which tokens a route keeps.

        Called: all, once, after ``describe_model``; also by ``tuner check``, so import torch in the selector's body.
        Arguments: ``run``.
        Returns: name -> a function ``(run, request, purpose) -> scores (B, S)``: a route keeps the tokens of the
        lowest scores. What is random in it comes from ``run.rng(purpose, position)``. A name offered twice is an
        error. The merged mapping is ``run.token_selectors``.

        Example::

            @hookimpl
            def token_selectors(self, run):
                return {"loudest": lambda run, request, purpose: -request.tokens.float().norm(dim=-1)}
        """

    @hookspec
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Check this plugin's keys against the model's dimensions.

        Called: all, right after ``describe_model``; also by ``tuner check``.
        Arguments: ``run``; ``spec``, what ``describe_model`` answered.
        Returns: nothing; raises ConfigError to refuse.

        Example::

            @hookimpl
            def check_model(self, run, spec):
                check_routes(self.config.tread_config.routes, spec.networks[0].blocks)
        """

    @hookspec
    def data_sources(self, run: Run) -> Mapping[str, Source]:
        """Offer places that the files of a dataset may come from.

        Called: all, once, after ``describe_model``; also by ``tuner check``.
        Arguments: ``run``.
        Returns: value of an entry's ``type`` -> a Source (``tuner.data.source``): the keys that its entries have,
        and a function that lists their files, fetched where they are elsewhere. A name offered twice is an error.
        The merged mapping is ``run.data_sources``.

        Example::

            @hookimpl
            def data_sources(self, run):
                return {"archive": ArchiveSource()}
        """

    @hookspec(firstresult=True)
    def prepare_data(self, run: Run, spec: ModelSpec) -> Prepared:
        """Say what is trained on: samples with their files, captions, buckets and views.

        Called: one (the built-in ``datasets``), after the model is described and before any weight is read; also by
        ``tuner check``.
        Arguments: ``run``; ``spec``, what ``describe_model`` answered.
        Returns: a Prepared (``tuner.data.samples``). The same files and keys must give the same answer in every
        process and in every run.

        Example::

            @hookimpl
            def prepare_data(self, run, spec):
                from my_archive.prepare import prepare
                return prepare(self.config.archive, spec)
        """

    @hookspec(firstresult=True)
    def plan_epochs(self, run: Run, spec: ModelSpec, data: Prepared, processes: int) -> Order:
        """Say which samples each optimizer step trains on.

        Called: one (the built-in ``epochs``), after the data are prepared, also by ``tuner check``; and again after the
        cache is built, when files had to be left out because they could not be encoded.
        Arguments: ``run``; ``spec``; ``data``, what ``prepare_data`` answered; ``processes``, how many train.
        Returns: an Order (``tuner.data.order``): a pure function of seed and step.

        Example::

            @hookimpl
            def plan_epochs(self, run, spec, data, processes):
                from my_curriculum.order import EasyFirst
                return EasyFirst(data, run.config, processes)
        """

    @hookspec
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared, plan: Order) -> None:
        """Look at the data before any weight is read: warn, refuse, or write a report of it.

        Called: all, right after ``plan_epochs``, also by ``tuner check``; and again after the cache is built, when
        files had to be left out because they could not be encoded. Files are written by the main process only.
        Arguments: ``run``; ``spec``; ``data``, what ``prepare_data`` answered; ``plan``, what ``plan_epochs`` did.
        Returns: nothing; raises ConfigError or DataError to refuse.

        Example::

            @hookimpl
            def data_ready(self, run, spec, data, plan):
                if any(sample.companion("mask") for sample in data.samples):
                    run.log.warning("masks were found to do harm with this model")
        """

    @hookspec
    def extra_samples(self, run: Run, spec: ModelSpec, data: Prepared) -> Iterable[Sample]:
        """Name clips and pictures to encode beside the datasets' own, such as the first frames of validation clips.

        Called: all, after ``prepare_data`` and before ``data_ready``, also by ``tuner check``.
        Arguments: ``run``; ``spec``; ``data``, what ``prepare_data`` answered.
        Returns: Samples (``tuner.data.samples``) with ids of their own. They are never trained on; their encodings are
        at ``run.cached.video(sample)`` once the cache is built, and those that could not be encoded are missing from
        ``run.cached.prepared.extra``.

        Example::

            @hookimpl
            def extra_samples(self, run, spec, data):
                return [replace(data.samples[0], sample_id="my_plugin/first")]
        """

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

        Called: all, once, before anything is encoded, when ``base_model_precision`` names a backend.
        Arguments: ``run``.
        Returns: value of ``base_model_precision`` -> a function ``(network) -> Sink`` that prepares the
        network's modules and takes each tensor as it is read. A value offered twice is an error.

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

    @hookspec
    def on_train_start(self, run: Run, model: Model) -> None:
        """Training is about to begin (or to go on after a resume).

        Called: all, once, with everything placed and restored.
        Arguments: ``run``; ``model``.
        Returns: nothing.

        Example::

            @hookimpl
            def on_train_start(self, run, model):
                run.log.info("training %s", model.spec.flavour)
        """

    @hookspec(firstresult=True)
    def compute_loss(self, run: Run, model: Model, batch: Batch) -> Loss:
        """Predict and compare: the loss of one micro-batch.

        Called: one, for each micro-batch, with gradients and autocast on. Plugins that change how a loss
        is made wrap it with ``@hookimpl(wrapper=True)`` and may replace the batch's noise fields.
        Arguments: ``run``; ``model``; ``batch``, with noise, sigmas and target drawn by the core.
        Returns: a Loss per sample (``tuner.flow.loss`` makes it from a prediction).

        Example::

            @hookimpl
            def compute_loss(self, run, model, batch):
                prediction = model.network.module(batch.noisy, batch.sigmas * 1000, batch.text["states"])
                return flow.loss(run.config, prediction, batch)
        """

    @hookspec(firstresult=True)
    def route_tokens(self, run: Run, request: RouteRequest) -> Sequence[TokenRoute]:
        """Say which tokens which blocks skip in this forward.

        Called: at most one, by the block driver, once per training forward; never in validation or recomputation.
        Arguments: ``run``; ``request``: block count, detached tokens, grid, forced tokens, positions.
        Returns: disjoint TokenRoutes.

        Example::

            @hookimpl
            def route_tokens(self, run, request):
                return [TokenRoute(2, 28, keep)]
        """

    @hookspec
    def on_step_end(self, run: Run, model: Model, metrics: Mapping[str, Any]) -> None:
        """An optimizer step is done.

        Called: all, after each optimizer step; must not synchronise with the device unless it has to.
        Arguments: ``run`` (its ``step`` counts this step); ``model``; ``metrics``: local detached tensors and numbers.
        Returns: nothing; an exception is logged with the plugin's name and does not end the run.

        Example::

            @hookimpl
            def on_step_end(self, run, model, metrics):
                self.average.update(model.network.adapter)
        """

    @hookspec
    def validate(self, run: Run, model: Model) -> Validation | None:
        """Look at what the model has learnt.

        Called: all, every ``validation_step_interval`` steps and at the end, in evaluation mode, without gradients,
        on every process; and one plugin alone where its ``validates_at`` says so.
        Arguments: ``run``; ``model``.
        Returns: a Validation (``tuner.validate.results``) of metrics, reported as ``plugin/key``, and media; or None.

        Example::

            @hookimpl
            def validate(self, run, model):
                return Validation(metrics={"weight_norm": norm(model.network.adapter)})
        """

    @hookspec
    def save(self, run: Run, model: Model, directory: Path) -> Iterable[Path]:
        """Write what people use elsewhere: LoRA files, exported weights.

        Called: all, at every checkpoint and at the end, on every process (gathers are collective); the main one writes.
        Arguments: ``run``; ``model``; ``directory``, made for this save: write nowhere else.
        Returns: the files written; the core hashes them into the checkpoint's manifest.

        Example::

            @hookimpl
            def save(self, run, model, directory):
                path = directory / "notes.txt"
                path.write_text(f"step {run.step}")
                return [path]
        """

    @hookspec
    def on_train_end(self, run: Run, model: Model) -> None:
        """Training is over and the result is saved.

        Called: all, once.
        Arguments: ``run``; ``model``.
        Returns: nothing.

        Example::

            @hookimpl
            def on_train_end(self, run, model):
                run.log.info("done after %d steps", run.step)
        """
