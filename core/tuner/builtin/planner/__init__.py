"""What a run will cost, before it starts; and what its first steps took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    import torch

    from tuner.builtin.planner.account import Account
    from tuner.builtin.planner.beside import Beside
    from tuner.builtin.planner.cards import Card
    from tuner.builtin.planner.costs import Shape
    from tuner.builtin.planner.measure import Window
    from tuner.data.order import MicroBatch, Order
    from tuner.data.samples import Prepared
    from tuner.model import Model
    from tuner.run import Run
    from tuner.spec import ModelSpec, NetworkSpec
    from tuner.workload import Workload

DROPPED = "tread/dropped"
"""Where a step's numbers say which share of the tokens' passes through blocks it left out."""


MEMORY = "memory.json"
"""In the output folder: device memory of the first step by component, predicted, and its peak measured."""


NONE = "none"
"""The ``memory_preset`` that chooses nothing."""


class PlannerConfig(PluginConfig):
    """Keys of the planner."""

    plan_card: str | None = key(
        None,
        "Card that expected times are for, such as `H100` or `RTX 4090`. When absent, the one that a run trains on; "
        "without times where its rates are not known.",
    )
    plan_ceilings: Path | None = key(
        None,
        "File with rates measured on this card, as `make gpu PART=ceilings` writes it: expected times and MFU are by "
        "these instead of the known ones.",
    )
    memory_preset: str = key(
        NONE,
        "Choose settings that save memory by themselves, as `tuner plan --fit` ranks them: `auto` for the memory that "
        "is free on the CUDA device, or for a size such as `12G`. Keys that are set are left as they are.",
        effect="memory",
    )


class PlannerPlugin(Plugin[PlannerConfig]):
    """Expected work and time of a step, and what the first steps took."""

    Config = PlannerConfig

    def __init__(self, name: str, config: PlannerConfig) -> None:
        super().__init__(name, config)
        self._plan: Order | None = None
        self._window: Window | None = None
        self._account: Account | None = None
        self._network: NetworkSpec | None = None
        self._beside: Beside | None = None
        self.shapes: Sequence[Shape] | None = None
        """What to choose settings for, where it is not the data."""

    @property
    def presets(self) -> bool:
        """Whether settings are chosen."""
        return self.config.memory_preset != NONE

    def card(self) -> Card | None:
        """The card that the config names, or measured rates. Raises ConfigError for one that is not known."""
        from tuner.builtin.planner.cards import measured, named

        if self.config.plan_ceilings is not None:
            return measured(self.config.plan_ceilings, "plan_ceilings")
        return None if self.config.plan_card is None else named(self.config.plan_card)

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse a card of which nothing is known, and a preset that is none."""
        self.card()
        if self.presets:
            from tuner.builtin.planner import preset

            preset.check(self.config.memory_preset)

    @hookimpl
    def propose_settings(self, run: Run) -> Mapping[str, Any]:
        """What ``memory_preset`` chooses: for this device, or what it chose when the run that goes on began."""
        if not self.presets:
            return {}
        from tuner.builtin.planner import preset

        word = self.config.memory_preset
        if earlier := preset.kept(run):
            folder, settings = earlier
            run.log.info("memory_preset: as in %s: %s", folder, preset.written(settings))
            return settings
        size = preset.limit(word)
        shapes, run.trained_shape = preset.shapes_of(run, self.shapes)
        candidates, found = preset.choose(run, shapes, self.card() or _card_of(preset.device()), size)
        preset.show(candidates, found.choices[0], size)
        return found.choices[0].changes

    @hookimpl
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared, plan: Order) -> None:
        """Remember what each step trains on."""
        self._plan = plan

    @hookimpl
    def on_train_start(self, run: Run, model: Model) -> None:
        """Say what a step computes, and how long it should take."""
        if self._plan is None:
            return
        self._beside = self._predicted(run, self._plan, model.network.spec)
        if not run.is_main:
            return
        from tuner.builtin.planner.account import Account
        from tuner.builtin.planner.costs import cost_of, shapes_of
        from tuner.builtin.planner.measure import Window
        from tuner.builtin.planner.memory import CONTEXT
        from tuner.builtin.planner.page import summary

        assert run.estimate is not None  # the model is described
        card = self.card() or _card_of(run.device)
        costs = [
            cost_of(run.estimate, model.network.spec, shape, card) for shape in shapes_of(self._plan, run.total_steps)
        ]
        run.log.info("%s", summary(costs, card))
        self._window = Window(card)
        # Of a card that is only named in the config nothing can be said of steps on another device.
        on_it = card if run.device.type == "cuda" else None
        self._account = Account(on_it, run.process_count, self._beside.predicted.on_device - CONTEXT)

    @hookimpl
    def memory_advice(self, run: Run, model: Model) -> Iterable[str]:
        """What saves memory, the cheapest first, for the shapes of this run."""
        if self._plan is None:
            return []
        from tuner.builtin.planner.costs import shapes_of
        from tuner.builtin.planner.fit import advice

        return advice(run, shapes_of(self._plan, run.total_steps), self.card() or _card_of(run.device))

    @hookimpl
    def on_step_end(self, run: Run, model: Model, metrics: Mapping[str, Any]) -> None:
        """Once, when enough steps are done, say what they took."""
        self._network = model.network.spec
        if self._beside is not None:
            if run.is_main:
                self._tell(run, self._beside)
            self._beside = None
        if self._window is None:
            return
        dropped = metrics.get(DROPPED)
        network, share = model.network.spec, None if dropped is None else float(dropped)
        self._window.add(metrics["seconds"], lambda: self._workloads(run, network, share))
        if self._window.full:
            for line in self._window.report():
                run.log.info("%s", line)
            self._window = None

    @hookimpl
    def log_metrics(self, run: Run, line: Mapping[str, Any]) -> Mapping[str, float]:
        """What the line's step had to do in all processes and, on a known card, how near it came to its floor."""
        if self._account is None or self._network is None or self._plan is None:
            return {}
        network, dropped, batches = self._network, line.get(DROPPED), self._plan.micro_batches(run.step - 1)
        what = (network.name, dropped, *((batch.bucket, len(batch.samples)) for batch in batches))
        return self._account.numbers(line, what, lambda: self._estimated(run, network, batches, dropped), dropped)

    @hookimpl
    def on_train_end(self, run: Run, model: Model) -> None:
        """Say in a line what the steps came to."""
        if self._account is not None and (told := self._account.told()):
            run.log.info("%s", told)

    def _tell(self, run: Run, beside: Beside) -> None:
        """Both peaks, in the run's log and, for whoever draws them, in a file."""
        import json

        from tuner.files import atomic_write_text

        measured = beside.measured()
        for line in beside.lines(measured):
            run.log.info("%s", line)
        atomic_write_text(run.output_dir / MEMORY, json.dumps(beside.record(measured), indent=2) + "\n")

    def _predicted(self, run: Run, plan: Order, network: NetworkSpec) -> Beside:
        """The memory of the step to come, of this process."""
        from tuner.builtin.planner.beside import Beside

        assert run.estimate is not None
        batches = plan.micro_batches(run.step)[run.replica_index :: run.replica_count]
        workloads = [run.estimate(network, batch.bucket, len(batch.samples)) for batch in batches]
        return Beside(run.device, workloads, first=run.step == 0)

    def _workloads(self, run: Run, network: NetworkSpec, dropped: float | None) -> Sequence[Workload]:
        """Of the micro-batches that this process did in the last step."""
        assert self._plan is not None
        batches = self._plan.micro_batches(run.step - 1)[run.replica_index :: run.replica_count]
        return self._estimated(run, network, batches, dropped)

    def _estimated(
        self, run: Run, network: NetworkSpec, batches: Sequence[MicroBatch], dropped: float | None
    ) -> Sequence[Workload]:
        from dataclasses import replace

        from tuner.builtin.planner.measure import as_routed

        assert run.estimate is not None
        estimated = [run.estimate(network, batch.bucket, len(batch.samples)) for batch in batches]
        return [as_routed(replace(each, micro_batches=1), dropped) for each in estimated]


def _card_of(device: torch.device) -> Card | None:
    """The card that is trained on, where its rates are known."""
    import torch

    from tuner.builtin.planner.cards import of_device

    if device.type != "cuda":
        return None
    facts = torch.cuda.get_device_properties(device)
    return of_device(facts.name, facts.total_memory / 2**30)
