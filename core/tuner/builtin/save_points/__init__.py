"""When to save beside the run's own interval: by epochs, by the clock, or because someone asks."""

from __future__ import annotations

import time
from pathlib import Path

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key
from tuner.run import Run

SAVE, SAVE_AND_QUIT = "save", "save_quit"
"""Files that ask for it by being there; they are taken away when it is done."""


class SavePointsConfig(PluginConfig):
    """Keys of further checkpoints."""

    checkpoint_epoch_interval: int = key(0, "Epochs between checkpoints, beside those by steps; 0 is none.", ge=0)
    checkpoint_minutes_interval: float = key(
        0.0, "Minutes between checkpoints, beside those by steps; 0 is none.", ge=0
    )


class SavePointsPlugin(Plugin[SavePointsConfig]):
    """Checkpoints by epochs, by minutes, and when a file `save` or `save_quit` is put into the output folder."""

    Config = SavePointsConfig

    def __init__(self, name: str, config: SavePointsConfig) -> None:
        super().__init__(name, config)
        self._folder: Path | None = None
        self._since = time.monotonic()

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """From now on minutes count, and files are looked for, on the main process."""
        self._folder = run.output_dir if run.is_main else None
        self._since = time.monotonic()

    def saves_at(self, step: int, epoch: int) -> bool:
        """At the end of every so many epochs, when the minutes are over, and when the file is there."""
        every, minutes = self.config.checkpoint_epoch_interval, self.config.checkpoint_minutes_interval
        due = bool(every and epoch and epoch % every == 0) or self._asked(SAVE)
        if minutes and time.monotonic() - self._since >= 60 * minutes:
            due = True
        if due:
            self._since = time.monotonic()
        return due

    def stops_at(self, step: int, epoch: int) -> bool:
        """When the file is there."""
        return self._asked(SAVE_AND_QUIT)

    def _asked(self, name: str) -> bool:
        if self._folder is None or not (self._folder / name).is_file():
            return False
        try:
            (self._folder / name).unlink()
        except OSError:
            return False  # it would ask again after every step
        return True
