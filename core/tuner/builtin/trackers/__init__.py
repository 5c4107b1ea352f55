"""Where a run reports to beside its local log: trackers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from tuner.builtin.trackers.reporters import TrackerReporter
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Transform
    from tuner.run import Run
    from tuner.validate.results import Validation

PROJECT = "tuner"


class TrackersConfig(PluginConfig):
    """Keys of trackers."""

    report_to: str = key(
        "none",
        "Trackers that get every line of the local log and the files of validations, several with commas: "
        "`tensorboard`, `wandb`, `trackio`, `mlflow`, `comet`, `swanlab`; `all` is every one that is installed, `none` "
        "is the local log alone.",
        effect="uploads",
    )
    tracker_project_name: str | None = key(None, f"Project in the trackers; `{PROJECT}` when absent.")
    tracker_run_name: str | None = key(None, "Name of the run in the trackers; that of `output_dir` when absent.")


class TrackersPlugin(Plugin[TrackersConfig]):
    """Reports to TensorBoard, Weights & Biases, Trackio, MLflow, Comet and SwanLab, without waiting."""

    Config = TrackersConfig

    def __init__(self, name: str, config: TrackersConfig) -> None:
        super().__init__(name, config)
        self._names: tuple[str, ...] = ()
        self._reporters: list[TrackerReporter] = []
        self._run_ids: dict[str, str] = {}

    def is_active(self, core: CoreConfig) -> bool:
        """Whether anything is reported to anyone."""
        return self.config.report_to.strip().lower() not in ("", "none")

    def warnings(self, core: CoreConfig) -> Iterator[str]:
        """What a run will be refused for on this machine, and who is not logged in."""
        from tuner.builtin.trackers import kinds

        for fault in self._faults():
            yield f"{fault.what}; a run is refused"
        for name in kinds.known(self.config.report_to):
            if kinds.missing(name) is None and not kinds.online(name):
                kind = kinds.KINDS[name]
                yield (
                    f"report_to {name}: nobody is logged in on this machine, so it is kept offline in output_dir; "
                    f"`{kind.login}` before the run, or `{kind.later}` after it"
                )

    @hookimpl(trylast=True)
    def configure(self, run: Run) -> None:
        """Read what is configured, after other plugins could register trackers with Accelerate."""
        from tuner.builtin.trackers import kinds

        kinds.check(self.config.report_to, _registered)
        self._names = kinds.asked_for(self.config.report_to)

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Sequence[Transform]:
        """Nothing to edit. This is where a run begins, and ``tuner check`` has ended: what is not there is refused."""
        for fault in self._faults():
            raise fault
        return []

    @hookimpl
    def on_train_start(self, run: Run, model: Model) -> None:
        """Open the trackers, each in a thread of its own; those of a run that goes on, where they were."""
        if run.is_main:
            self._reporters += [self._tracker(run, name) for name in self._names]

    @hookimpl
    def on_log(self, run: Run, line: Mapping[str, Any]) -> None:
        """Pass a line on."""
        for each in self._reporters:
            each.line(line)

    @hookimpl
    def on_validation(self, run: Run, plugin: str, validation: Validation) -> None:
        """Pass what a validation made on."""
        for each in self._reporters:
            each.validation(run, plugin, validation)

    @hookimpl
    def on_run_end(self, run: Run, checkpoint: Path | None, error: BaseException | None) -> None:
        """Close what is open, and wait a little for what is on its way; not where someone asked twice to stop."""
        if not self._reporters:
            return
        from tuner.builtin.outbox import finish

        finish([each.outbox for each in self._reporters], at_once=isinstance(error, KeyboardInterrupt))
        self._reporters = []

    def state_dict(self) -> dict[str, Any]:
        """Which run of each tracker this one is."""
        return {f"run/{name}": run_id for name, run_id in self._run_ids.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with these."""
        self._run_ids = {name.removeprefix("run/"): run_id for name, run_id in state.items()}

    def _tracker(self, run: Run, name: str) -> TrackerReporter:
        from tuner.builtin.trackers import kinds
        from tuner.builtin.trackers.reporters import TrackerReporter
        from tuner.builtin.trackers.services import SERVICES, Opening, Service

        opening = Opening(
            project=self.config.tracker_project_name or PROJECT,
            run_name=self._run_name(run),
            output_dir=run.output_dir,
            step=run.step,
            run_id=self._run_ids.get(name) or uuid4().hex,
            resumed=name in self._run_ids,
            online=kinds.online(name),
            config=_flat(run),
        )
        service = SERVICES.get(name, Service)(name, opening)
        if not service.gives_id:
            self._run_ids[name] = opening.run_id  # now: the first checkpoint may come before the tracker is open
        return TrackerReporter(run, name, service, lambda run_id: self._run_ids.update({name: run_id}))

    def _run_name(self, run: Run) -> str:
        return self.config.tracker_run_name or run.output_dir.name

    def _faults(self) -> Iterator[ConfigError]:
        """What is configured and not on this machine."""
        from tuner.builtin.trackers import kinds

        for name in kinds.known(self.config.report_to):
            if said := kinds.missing(name):
                yield ConfigError(said, where="report_to", remedy="install it, or leave it out of report_to")


def _registered() -> list[str]:
    """Names of tracker classes that plugins registered with Accelerate."""
    from accelerate import tracking

    found = tracking.LOGGER_TYPE_TO_CLASS.items()
    return [name for name, made in found if made.__module__ != tracking.__name__]


def _flat(run: Run) -> dict[str, Any]:
    """The run's config without secrets, as numbers and texts: not every tracker takes lists, or nothing."""
    import json

    from tuner.train.checkpoint import without_secrets

    values = run.config.model_dump(mode="json")
    for plugin in run.plugins.values():
        values |= plugin.config.model_dump(mode="json")
    plain = without_secrets(json.loads(json.dumps(values, default=str)))
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in plain.items()
    }
