"""The report of a run: a page that shows what the model learns, while it learns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.builtin.report.reporter import Reporter
    from tuner.model import Model
    from tuner.run import Run
    from tuner.validate.results import Preview, Validation


class Warnings(logging.Handler):
    """Hands on every warning of the run."""

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on the text of a record; a full disk must not end a run that only wanted to warn."""
        try:
            self._take(self.format(record))
        except OSError:
            self.handleError(record)


class ReportPlugin(Plugin[PluginConfig]):
    """Keeps `report/index.html`: curves, clips by prompt and step, events and settings, while the run goes."""

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self._reporter: Reporter | None = None
        self._handler: Warnings | None = None
        self._resumed: Path | None = None

    @hookimpl
    def on_resume(
        self, run: Run, checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any], passed: Sequence[str]
    ) -> None:
        """Remember where the run goes on from."""
        self._resumed = checkpoint

    @hookimpl
    def on_train_start(self, run: Run, model: Model) -> None:
        """Take what an earlier start has left, and write the first page."""
        if not run.is_main:
            return
        from tuner.builtin.report.reporter import Reporter

        try:
            reporter = Reporter(run, self._resumed)
        except OSError as error:
            run.log.warning("no report is kept of this run: %s", error)
            return
        run.log.info("report: %s", reporter.path)
        self._reporter = reporter
        self._handler = Warnings(reporter.warning)
        run.log.addHandler(self._handler)

    @hookimpl
    def on_log(self, run: Run, line: Mapping[str, Any]) -> None:
        """Take a line of the log; the page follows every few seconds."""
        if self._reporter is not None:
            self._reporter.line(line)

    @hookimpl
    def on_validation(self, run: Run, plugin: str, validation: Validation) -> None:
        """Take the clips."""
        if self._reporter is not None and validation.media:
            self._reporter.validation(run, plugin, validation.media)

    @hookimpl
    def on_preview(self, run: Run, preview: Preview) -> None:
        """Take the sheet of a clip's previews."""
        if self._reporter is not None and preview.sheet is not None:
            self._reporter.sheet(run.step, preview.sheet)

    @hookimpl
    def on_checkpoint(self, run: Run, checkpoint: Path) -> None:
        """Note a checkpoint."""
        if self._reporter is not None:
            self._reporter.event("checkpoint", checkpoint.name)

    @hookimpl
    def on_run_end(self, run: Run, checkpoint: Path | None, error: BaseException | None) -> None:
        """Note how it ended, and write the last page."""
        if self._handler is not None:
            run.log.removeHandler(self._handler)
        reporter, self._reporter, self._handler = self._reporter, None, None
        if reporter is not None:
            reporter.end(run, error)
