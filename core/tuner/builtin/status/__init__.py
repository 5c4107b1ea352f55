"""What a run says of itself while it goes: what it is, how far it is, and where its results are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.builtin.status.progress import TrainProgress
    from tuner.data.order import Order
    from tuner.data.samples import Prepared
    from tuner.model import Model
    from tuner.run import Run
    from tuner.spec import ModelSpec

WEIGHTS: tuple[str, ...] = ("*lora*.safetensors", "*/diffusion_pytorch_model*.safetensors")
WEIGHTS += tuple(f"*/{pattern}" for pattern in WEIGHTS)
"""Files of a checkpoint that other programs load; those of other weights, such as averages, lie in a folder."""


class StatusPlugin(Plugin[PluginConfig]):
    """Model and length of the run, a progress bar with the time left, and where to find the results."""

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self._progress: TrainProgress | None = None

    @hookimpl
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared, plan: Order) -> None:
        """The model, and the length of the run."""
        if run.is_main:
            print("\n".join(_summary(run, spec, plan)))

    @hookimpl
    def on_resume(
        self, run: Run, checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any], passed: Sequence[str]
    ) -> None:
        """Where the run goes on from, and what is not as it was."""
        for line in passed:
            run.log.warning("%s", line)
        if run.is_main:
            print(f"going on from {checkpoint}, step {run.step}")
        if saved.get("threads") != now["threads"]:
            run.log.warning(
                "the checkpoint was made with %s threads and this run has %s: results may differ in the last bits",
                saved.get("threads"),
                now["threads"],
            )
        for line in _other_data(saved, now):
            run.log.warning("%s", line)
        before, after = dict(saved.get("config") or {}), now["config"]
        names = {*before, *after} - {"resume_from_checkpoint"}
        changed = sorted(name for name in names if before.get(name) != after.get(name))
        if changed:
            run.log.warning("changed since that checkpoint: %s", ", ".join(changed))

    @hookimpl
    def on_train_start(self, run: Run, model: Model) -> None:
        """Show the bar."""
        from tuner.builtin.status.progress import TrainProgress

        if run.is_main:
            self._progress = TrainProgress(run.step, run.total_steps)

    @hookimpl
    def on_step_end(self, run: Run, model: Model, metrics: Mapping[str, Any]) -> None:
        """Move it on."""
        if self._progress is not None:
            self._progress.update(run.step, metrics["loss"], metrics["learning_rate"])

    @hookimpl
    def on_run_end(self, run: Run, checkpoint: Path | None, error: BaseException | None) -> None:
        """Take the bar away; after a run that came to its end, say where its results are."""
        if self._progress is not None:
            self._progress.close()
        if run.is_main and error is None and checkpoint is not None:
            print("\n".join(f"{label + ':':<12}{path}" for label, path in _results(run.output_dir, checkpoint)))


def _other_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What is not as it was of the order of training, which is a function of seed, data and samples of a step."""
    if saved.get("samples") not in (None, now["samples"]):
        yield (
            f"the checkpoint's run trained on {saved['samples']} samples and this one has {now['samples']}: "
            "from here on the epochs are planned anew"
        )
    if saved.get("samples_per_step") not in (None, now["samples_per_step"]):
        yield (
            f"a step had {saved['samples_per_step']} samples and has {now['samples_per_step']} now: from here on the "
            "epochs are planned anew, and the learning rate is not adapted"
        )


def _summary(run: Run, spec: ModelSpec, plan: Order) -> Iterator[str]:
    from tuner.train import schedules

    config, total = run.config, run.total_steps
    per_step = " to ".join(map(str, sorted({*plan.samples_per_step})))
    yield f"model: {spec.family} {spec.flavour} from {spec.base}"
    yield (
        f"run: {total} steps of {per_step} samples, {plan.steps_per_epoch} steps per epoch, "
        f"{plan.epochs_in(total):.1f} epochs"
    )
    yield from plan.notes
    yield from plan.never_shown(total)
    if config.lr_warmup_steps and not schedules.warmup_steps(config, total):
        yield (
            f"lr_warmup_steps is {config.lr_warmup_steps} and the run has {total} steps: there is no warm-up, "
            f"the whole run follows lr_scheduler {config.lr_scheduler}"
        )


def _results(output_dir: Path, checkpoint: Path) -> Iterator[tuple[str, Path]]:
    from tuner.train.log import NAME

    yield "checkpoint", checkpoint
    yield from (("weights", path) for pattern in WEIGHTS for path in sorted(checkpoint.glob(pattern)))
    videos = output_dir / "validation"
    if videos.is_dir():
        yield "videos", videos
    yield "log", output_dir / NAME
