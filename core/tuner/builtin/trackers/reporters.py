"""Telling a tracker what happens in a run, behind an outbox of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tuner.builtin.file_kinds import is_shown
from tuner.builtin.outbox import Outbox

if TYPE_CHECKING:
    from tuner.builtin.trackers.services import Service
    from tuner.run import Run
    from tuner.validate.results import Validation


class TrackerReporter:
    """Tells a tracker."""

    def __init__(self, run: Run, name: str, service: Service, opened: Callable[[str], None]) -> None:
        """Open the tracker; ``opened`` is called with the id of its run."""
        self._service = service
        self.outbox = Outbox(f"report_to {name}", run.log, lambda: opened(service.open()), service.close)

    def line(self, line: Mapping[str, Any]) -> None:
        """Its numbers."""
        numbers = {name: float(value) for name, value in line.items() if isinstance(value, int | float)}
        step = int(numbers.pop("step"))
        self.outbox.put(lambda: self._service.log(numbers, step))

    def validation(self, run: Run, plugin: str, validation: Validation) -> None:
        """Its pictures and videos; the numbers come with the step's line."""
        mark = f"@{run.variant}" if run.variant else ""
        for path in filter(is_shown, validation.media):
            name, step = f"{plugin}/{path.name}{mark}", run.step
            self.outbox.put(lambda name=name, path=path, step=step: self._service.show(name, path, step))  # type: ignore[misc]
