"""Posts what happens in a run to webhooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from tuner.builtin.webhook.reporter import WebhookReporter
    from tuner.builtin.webhook.settings import Settings
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Transform
    from tuner.run import Run
    from tuner.validate.results import Preview, Validation


class WebhookConfig(PluginConfig):
    """The key of webhooks."""

    webhook_config: Path | None = key(
        None,
        "JSON file of a webhook, or of a list of them, to which start, progress, end, errors, checkpoints and files of "
        "validations are posted.",
        effect="uploads",
    )


class WebhookPlugin(Plugin[WebhookConfig]):
    """Posts start, progress, previews, validations, checkpoints, errors and end to Discord or as JSON."""

    Config = WebhookConfig

    def __init__(self, name: str, config: WebhookConfig) -> None:
        super().__init__(name, config)
        self._settings: tuple[Settings, ...] = ()
        self._reporters: list[WebhookReporter] = []

    def is_active(self, core: CoreConfig) -> bool:
        """Whether anything is posted."""
        return self.config.webhook_config is not None

    def warnings(self, core: CoreConfig) -> Iterator[str]:
        """What a run will be refused for."""
        if fault := self._fault():
            yield f"{fault.what}; a run is refused"

    @hookimpl
    def configure(self, run: Run) -> None:
        """Read the file. Raises ConfigError."""
        path = self.config.webhook_config
        if path is not None and path.exists():
            from tuner.builtin.webhook.settings import read

            self._settings = read(path)

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Sequence[Transform]:
        """Nothing to edit. This is where a run begins, and ``tuner check`` has ended: a missing file is refused."""
        if fault := self._fault():
            raise fault
        if run.is_main and self._settings:
            from tuner.builtin.webhook.post import Webhook
            from tuner.builtin.webhook.reporter import WebhookReporter

            self._reporters = [WebhookReporter(run, Webhook(each, run.output_dir.name)) for each in self._settings]
        return []

    @hookimpl
    def on_resume(
        self, run: Run, checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any], passed: Sequence[str]
    ) -> None:
        """Say where the run goes on from."""
        for each in self._reporters:
            each.resumed(run, checkpoint)

    @hookimpl
    def on_log(self, run: Run, line: Mapping[str, Any]) -> None:
        """Pass a line on."""
        for each in self._reporters:
            each.line(run, line)

    @hookimpl
    def on_preview(self, run: Run, preview: Preview) -> None:
        """Pass a preview on."""
        for each in self._reporters:
            each.preview(run, preview)

    @hookimpl
    def on_validation(self, run: Run, plugin: str, validation: Validation) -> None:
        """Pass what a validation made on."""
        for each in self._reporters:
            each.validation(run, plugin, validation)

    @hookimpl
    def on_checkpoint(self, run: Run, checkpoint: Path) -> None:
        """Say that there is a checkpoint."""
        for each in self._reporters:
            each.checkpoint(run, checkpoint)

    @hookimpl
    def on_run_end(self, run: Run, checkpoint: Path | None, error: BaseException | None) -> None:
        """Say how it ended, and wait a little for what is on its way; not where someone asked twice to stop."""
        if not self._reporters:
            return
        from tuner.builtin.outbox import finish

        for each in self._reporters:
            each.end(run, error)
        finish([each.outbox for each in self._reporters], at_once=isinstance(error, KeyboardInterrupt))
        self._reporters = []

    def _fault(self) -> ConfigError | None:
        """A file that is not there."""
        path = self.config.webhook_config
        if path is None or path.exists():
            return None
        return ConfigError(
            f"webhook_config: there is no file {path}",
            where="webhook_config",
            remedy="write it as config/webhook.json.example is written, or leave the key out",
        )
