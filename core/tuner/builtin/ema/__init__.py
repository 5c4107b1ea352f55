"""The average of the trained weights over the steps, rendered and saved beside them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from pathlib import Path

    from tuner.builtin.ema.averages import Averages
    from tuner.config.keys import CoreConfig
    from tuner.model import Model
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload

    Variants = Mapping[str, Callable[[], AbstractContextManager[None]]]

NAME = "ema"
"""Of these weights, in file names and metrics."""
FLOAT32 = 4.0


class EmaConfig(PluginConfig):
    """Keys of the average."""

    use_ema: bool = key(
        False,
        "Keep an exponential moving average of the trained weights in float32, saved in `checkpoint-N/ema/`.",
        effect="files",
    )
    ema_decay: float = key(
        0.995, "Share of the average that stays at each step; less in its first steps: (1+s)/(10+s).", ge=0, le=1
    )
    ema_update_interval: int = key(
        1, "Steps of a network between updates of its average; each then stands for that many steps.", ge=1
    )
    ema_start_step: int = key(0, "Steps of a network before its average begins, with the weights it then has.", ge=0)
    ema_device: Literal["cpu", "accelerator"] = key(
        "cpu", "Where the averages are: in host memory, updated in the background, or beside the weights."
    )
    ema_validation: Literal["none", "ema_only", "comparison"] = key(
        "comparison", "What validation looks at: the trained weights, their average, or both."
    )


class EmaPlugin(Plugin[EmaConfig]):
    """Exponential moving average of the trained weights (EMA): rendered, saved, exact in resume."""

    Config = EmaConfig

    def __init__(self, name: str, config: EmaConfig) -> None:
        super().__init__(name, config)
        self._averages: Averages | None = None
        self._loaded: dict[str, Any] = {}
        self._said_none = False

    def is_active(self, core: CoreConfig) -> bool:
        """Whether an average is kept."""
        return self.config.use_ema

    def warnings(self, core: CoreConfig) -> Iterator[str]:
        """Settings of an average that is not kept."""
        idle = sorted(self.config.model_fields_set - {"use_ema"})
        if idle and not self.config.use_ema:
            yield f"{', '.join(idle)} {'does' if len(idle) == 1 else 'do'} nothing: use_ema is false"

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """Memory of the averages; on the host also that of the values on their way."""
        if not self.config.use_ema:
            return {}
        if self.config.ema_device == "accelerator":
            return {"average_bytes": FLOAT32}
        return {"average_bytes_on_host": 2 * FLOAT32}

    @hookimpl
    def on_train_start(self, run: Run, model: Model) -> None:
        """Take the averages back, where the run goes on. Raises CheckpointError where they are of other tensors."""
        if not self.config.use_ema:
            if self._loaded:
                run.log.warning("the checkpoint has averages, and use_ema is false: they are not kept any further")
            return
        from tuner.builtin.ema.averages import Averages

        self._averages = Averages(run, model, self.config)
        self._averages.load(self._loaded)
        self._loaded = {}
        if run.is_main:
            for note in self._averages.notes(run.step, run.total_steps):
                run.log.warning("%s", note)

    @hookimpl
    def on_step_end(self, run: Run, model: Model, metrics: Mapping[str, Any]) -> None:
        """Update the average; what is on a device is not waited for."""
        if self._averages is not None:
            self._averages.follow(run.step)

    @hookimpl
    def log_metrics(self, run: Run, line: Mapping[str, Any]) -> Mapping[str, float]:
        """The decay of the step."""
        decay = None if self._averages is None else self._averages.decay(run.step)
        return {} if decay is None else {"ema/decay": decay}

    # A wrapper, so that another plugin may offer weights beside these.
    @hookimpl(wrapper=True)
    def weight_variants(
        self, run: Run, model: Model, purpose: str
    ) -> Generator[None, Variants | None, Variants | None]:
        """The average beside what else there is, or in place of the trained weights; nothing until it has begun."""
        others = yield
        wanted = self.config.ema_validation if purpose == "validate" else "comparison"
        if self._averages is None or wanted == "none":
            return others
        if not self._averages.began:
            self._say_none(run, wanted)
            return others
        offered = {"": nullcontext} if others is None else dict(others)
        if wanted == "ema_only":
            offered.pop("", None)
        return {**offered, NAME: self._averages.exchanged}

    def _say_none(self, run: Run, wanted: str) -> None:
        if wanted == "ema_only" and run.is_main and not self._said_none:
            self._said_none = True
            run.log.warning("ema_validation ema_only: there is no average yet, the trained weights are looked at")

    @hookimpl
    def on_run_end(self, run: Run, checkpoint: Path | None, error: BaseException | None) -> None:
        """End what works in the background."""
        if self._averages is not None:
            self._averages.close()

    def state_dict(self) -> dict[str, Any]:
        """The averages, and where they stand."""
        return {} if self._averages is None else self._averages.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what a checkpoint has until training begins."""
        self._loaded = state
