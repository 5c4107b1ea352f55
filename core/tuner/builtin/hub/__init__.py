"""Uploads to the Hugging Face hub: the result, and every checkpoint, while the run goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from tuner.builtin.hub.uploads import Uploads
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Transform
    from tuner.run import Run

AGAIN = "start the same run again: nothing is trained twice, and what the hub lacks is uploaded"


class HubConfig(PluginConfig):
    """Keys of uploads."""

    push_to_hub: bool = key(
        False, "Upload the result to the Hugging Face hub when training is over, with a model card.", effect="uploads"
    )
    push_checkpoints_to_hub: bool = key(
        False,
        "Upload every checkpoint while training goes on, whole, so that a run can be resumed from the hub.",
        effect="uploads",
    )
    hub_model_id: str | None = key(
        None,
        "Repository to upload to: `name`, or `owner/name`; the name of `output_dir` when absent. It is made where "
        "there is none.",
    )
    hub_private: bool = key(
        True,
        "Whether a repository that is made is private. One that exists stays as public as it is.",
        effect="uploads",
    )


class HubPlugin(Plugin[HubConfig]):
    """Uploads the result and checkpoints to the Hugging Face hub in the background, with a model card."""

    Config = HubConfig

    def __init__(self, name: str, config: HubConfig) -> None:
        super().__init__(name, config)
        self._uploads: Uploads | None = None

    def is_active(self, core: CoreConfig) -> bool:
        """Whether anything is uploaded."""
        return self.config.push_to_hub or self.config.push_checkpoints_to_hub

    def warnings(self, core: CoreConfig) -> Iterator[str]:
        """What will not be uploaded, and why."""
        if not self.is_active(core):
            if self.config.hub_model_id is not None:
                yield "hub_model_id does nothing: neither push_to_hub nor push_checkpoints_to_hub is set"
        elif os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            yield "push_to_hub: HF_HUB_OFFLINE is set, so nothing will be uploaded"
        elif not _logged_in():
            yield (
                "push_to_hub: nobody is logged in to the Hugging Face hub on this machine, so nothing will be "
                "uploaded; `hf auth login`, also while the run goes on"
            )

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse a name that no repository can have. Raises ConfigError."""
        if not self.is_active(run.config):
            return
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self._repository(run))
        except HFValidationError as error:
            absent = self.config.hub_model_id is None
            raise ConfigError(
                f"no repository of the hub can be called {self._repository(run)!r}",
                where="hub_model_id, which is the name of output_dir when absent" if absent else "hub_model_id",
                allowed="name or owner/name, of letters, digits, '-', '_' and '.', 96 at most",
                remedy=str(error).partition("\n")[0],
            ) from None

    @hookimpl
    def fetch_checkpoint(self, run: Run, reference: str) -> bool | None:
        """Of the hub: ``hub:owner/name``, with ``@revision`` and a folder where one is meant."""
        from tuner.builtin.hub.fetch import PREFIX, fetch

        if not reference.startswith(PREFIX):
            return None
        fetch(run, reference)
        return True

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Sequence[Transform]:
        """Nothing to edit. This is where a run begins: it says where its uploads will go."""
        if self.is_active(run.config) and run.is_main:
            both = self.config.push_to_hub and self.config.push_checkpoints_to_hub
            what = "checkpoints and the result" if both else "the result" if self.config.push_to_hub else "checkpoints"
            kind = "private" if self.config.hub_private else "PUBLIC"
            run.log.info("hub: %s will be uploaded to %s (%s where it is new)", what, self._repository(run), kind)
        return []

    @hookimpl
    def on_checkpoint(self, run: Run, checkpoint: Path) -> None:
        """Have it uploaded; the run does not wait."""
        if self.config.push_checkpoints_to_hub:
            from tuner.builtin.hub.jobs import of_checkpoint

            self._opened(run).offer(of_checkpoint(run, checkpoint))

    @hookimpl(trylast=True)
    def on_run_end(self, run: Run, checkpoint: Path | None, error: BaseException | None) -> None:
        """Upload the result of a run that came to its end, and say what was uploaded and what was not."""
        if not run.is_main or not self.is_active(run.config):
            return
        if checkpoint is not None and self.config.push_to_hub:
            from tuner.builtin.hub.jobs import of_result

            self._opened(run).offer(of_result(run, checkpoint))
        uploads, self._uploads = self._uploads, None
        if uploads is None:
            return
        try:
            if checkpoint is None:
                uploads.abandon("the run ended before it was on its way")
            else:
                uploads.finish()
        except KeyboardInterrupt:
            uploads.abandon("interrupted")
        self._tell(run, uploads.report())

    def _opened(self, run: Run) -> Uploads:
        from tuner.builtin.hub.uploads import Uploads

        if self._uploads is None:
            self._uploads = Uploads(run.output_dir, self._repository(run), self.config.hub_private, run.log)
        return self._uploads

    def _tell(self, run: Run, report: Mapping[str, Any]) -> None:
        """The truth about the uploads."""
        if report["uploaded"]:
            run.log.info("hub: %s has %s", report["address"], ", ".join(report["uploaded"]))
        for name, why in report["missing"].items():
            run.log.warning("hub: %s was not uploaded: %s", name, why)
        if report["missing"]:
            run.log.warning("hub: %s", AGAIN)

    def _repository(self, run: Run) -> str:
        return self.config.hub_model_id or run.output_dir.resolve().name


def _logged_in() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
