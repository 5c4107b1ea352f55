"""Training, validation, saving."""

# Specifications have docstrings and no bodies.
# mypy: disable-error-code="empty-body"
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.hookspecs.markers import hookspec

if TYPE_CHECKING:
    import torch

    from tuner.blocks import RouteRequest, TokenRoute
    from tuner.model import Batch, Loss, Model, Network
    from tuner.run import Run
    from tuner.train.optimizers import GradientRelease
    from tuner.validate.results import Preview, SamplingStep, Validation


class TrainingHooks:
    """Training, validation, saving."""

    @hookspec(firstresult=True)
    def gradient_release(self, run: Run, network: Network, optimizer: torch.optim.Optimizer) -> GradientRelease | None:
        """Step each parameter as soon as its gradient is there, and free the gradient.

        Called: at most one answers, once for each trained network, when its optimizer was made. It may give
        parameters groups of their own in ``optimizer.param_groups``, in the same order.
        Arguments: ``run``; ``network``; ``optimizer``.
        Returns: a GradientRelease (``tuner.train.optimizers``), and the core then neither clips nor steps; or None.

        Example::

            @hookimpl
            def gradient_release(self, run, network, optimizer):
                return Release(optimizer) if self.config.gradient_release else None
        """

    @hookspec(firstresult=True)
    def fetch_checkpoint(self, run: Run, reference: str) -> bool | None:
        """Bring a checkpoint that is elsewhere into the output folder.

        Called: at most one answers, on the main process, before any weight is read, where ``resume_from_checkpoint`` is
        neither ``latest`` nor a folder.
        Arguments: ``run``, without a device; ``reference``, the key's value.
        Returns: True once ``run.output_dir`` holds it as ``checkpoint-<step>``, whole, or has gone further; None for a
        reference of another kind. Raises CheckpointError or ConfigError where it cannot be had.

        Example::

            @hookimpl
            def fetch_checkpoint(self, run, reference):
                if not reference.startswith("rsync:"):
                    return None
                copy(reference, run.output_dir)
                return True
        """

    @hookspec
    def on_resume(
        self, run: Run, checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any], passed: Sequence[str]
    ) -> None:
        """A checkpoint was taken back.

        Called: all, once, before ``on_train_start``, in a run that goes on from a checkpoint.
        Arguments: ``run``, at the checkpoint's step; ``checkpoint``, its folder; ``saved``, its manifest; ``now``, the
        manifest of this run (versions, plugins, config without secrets); ``passed``: a line for each newer checkpoint
        that was damaged.
        Returns: nothing.

        Example::

            @hookimpl
            def on_resume(self, run, checkpoint, saved, now, passed):
                if saved["samples"] != now["samples"]:
                    run.log.warning("the data are not those of %s", checkpoint)
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

        Called: all, after each optimizer step and before its validation; must not synchronise with the device unless
        it has to.
        Arguments: ``run`` (its ``step`` counts this step); ``model``; ``metrics``: local numbers:
        ``loss``, ``grad_norm``, ``learning_rate``, ``samples``, ``seconds`` of the step alone, and what
        ``compute_loss`` measured.
        Returns: nothing; an exception is logged with the plugin's name and does not end the run.

        Example::

            @hookimpl
            def on_step_end(self, run, model, metrics):
                self.average.update(model.network.adapter)
        """

    @hookspec
    def log_metrics(self, run: Run, line: Mapping[str, Any]) -> Mapping[str, float]:
        """Add numbers to a line of the local log.

        Called: all, on the main process, before a line is written, after ``on_step_end`` of its step.
        Arguments: ``run``; ``line``, as it is so far (see ``on_log``).
        Returns: name -> number, named ``plugin/key``; empty for none.

        Example::

            @hookimpl
            def log_metrics(self, run, line):
                return {"speed/samples_per_second": line["samples"] / line["seconds"]}
        """

    @hookspec
    def on_log(self, run: Run, line: Mapping[str, Any]) -> None:
        """A line was written to the local log.

        Called: all, on the main process, for every line of ``train.jsonl``, after ``on_step_end`` of its step.
        Arguments: ``run``; ``line``, its numbers and words: ``step``, ``epoch``, ``loss``, ``grad_norm``,
        ``learning_rate``, ``samples``, ``seconds``, ``peak_memory_bytes`` where the device counts it, what
        ``compute_loss`` measured, and ``plugin/key`` of a validation.
        Returns: nothing; an exception is logged with the plugin's name and does not end the run.

        Example::

            @hookimpl
            def on_log(self, run, line):
                self.tracker.log(line)
        """

    @hookspec(firstresult=True)
    def weight_variants(
        self, run: Run, model: Model, purpose: str
    ) -> Mapping[str, Callable[[], AbstractContextManager[None]]] | None:
        """Offer other weights beside the trained ones, such as their average.

        Called: at most one answers, before every validation (``purpose`` is ``validate``) and every checkpoint
        (``save``), on every process. The variants are put in place in turn: ``run.variant`` is then the name, metrics
        of ``validate`` are reported as ``plugin/key@name``, and ``save`` writes into a folder of that name.
        Arguments: ``run``; ``model``; ``purpose``.
        Returns: name -> what puts these weights in place while it is entered, and the trained ones back bit for bit.
        The name ``""`` is the trained weights themselves; without it they are left out. None is the trained ones alone.

        Example::

            @hookimpl
            def weight_variants(self, run, model, purpose):
                return {"": nullcontext, "ema": lambda: swapped(model, self.averages)}
        """

    @hookspec
    def memory_advice(self, run: Run, model: Model) -> Iterable[str]:
        """Say what would make this run need less memory.

        Called: all, once, when a step ran out of memory, with the step's tensors freed.
        Arguments: ``run``; ``model``.
        Returns: lines such as ``enable_group_offload: true (saves 1.9 GiB, costs 3 % of a step)``, the cheapest first;
        the error shows the first three.

        Example::

            @hookimpl
            def memory_advice(self, run, model):
                return ["train_batch_size: 1"] if run.config.train_batch_size > 1 else []
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
    def on_validation(self, run: Run, plugin: str, validation: Validation) -> None:
        """A plugin answered ``validate``.

        Called: all, on the main process, for each answer; ``run.variant`` names the weights it is about.
        Arguments: ``run``; ``plugin``, the name of the one that answered; ``validation``, its metrics and media.
        Returns: nothing; an exception is logged with the plugin's name and does not end the run.

        Example::

            @hookimpl
            def on_validation(self, run, plugin, validation):
                self.tracker.log_media(validation.media, step=run.step)
        """

    @hookspec
    def on_sampling_step(self, run: Run, model: Model, sampling: SamplingStep) -> None:
        """A step of rendering a validation clip is done.

        Called: all, on the main process, in the middle of ``validate``, for each step of each clip whose family tells
        its prediction.
        Arguments: ``run``; ``model``; ``sampling``, a SamplingStep (``tuner.validate.results``): which clip, how far it
        is, and its predicted clean latents, which must not be changed.
        Returns: nothing; an exception is logged with the plugin's name and does not end the run.

        Example::

            @hookimpl
            def on_sampling_step(self, run, model, sampling):
                self.spread.append(float(sampling.latents.std()))
        """

    @hookspec
    def on_preview(self, run: Run, preview: Preview) -> None:
        """A preview of a clip that is being rendered was written.

        Called: all, on the main process, in the middle of ``validate``, by the plugin that made it
        (``run.announcer("on_preview")``); it may be called often, and what is slow belongs into the background.
        Arguments: ``run``; ``preview``, a Preview (``tuner.validate.results``): the file, which clip, how far it is.
        Returns: nothing; an exception is logged with the plugin's name and does not end the run.

        Example::

            @hookimpl
            def on_preview(self, run, preview):
                self.outbox.put(preview.path)
        """

    @hookspec
    def save(self, run: Run, model: Model, directory: Path) -> Iterable[Path | Callable[[], object]]:
        """Write what people use elsewhere: LoRA files, exported weights.

        Called: all, at every checkpoint and at the end, on every process (gathers are collective); the main one writes.
        Arguments: ``run``; ``model``; ``directory``, made for this save: write nowhere else.
        Returns: the files written, or functions that write them: a thread calls these while training goes on, so they
        hold copies of what training changes. The core hashes all that is in the folder into the checkpoint's manifest.

        Example::

            @hookimpl
            def save(self, run, model, directory):
                taken = {name: tensor.to("cpu", copy=True) for name, tensor in self.state().items()}
                return [partial(save_file, taken, directory / "mine.safetensors")] if run.is_main else []
        """

    @hookspec
    def on_checkpoint(self, run: Run, checkpoint: Path) -> None:
        """A checkpoint is whole and on the disk.

        Called: all, on the main process, after each checkpoint; it may be pruned later.
        Arguments: ``run``; ``checkpoint``, its folder.
        Returns: nothing; an exception is logged with the plugin's name and does not end the run.

        Example::

            @hookimpl
            def on_checkpoint(self, run, checkpoint):
                self.uploads.put(checkpoint)
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

    @hookspec
    def on_run_end(self, run: Run, checkpoint: Path | None, error: BaseException | None) -> None:
        """The run is over, however it ended: put away what was opened.

        Called: all, once, after ``on_train_end`` or instead of it, also when nothing was left to train.
        Arguments: ``run``; ``checkpoint``: the folder of the last checkpoint, where training came to its end;
        ``error``: what ended the run before that, or None.
        Returns: nothing; an exception is logged with the plugin's name.

        Example::

            @hookimpl
            def on_run_end(self, run, checkpoint, error):
                self.tracker.close()
        """
