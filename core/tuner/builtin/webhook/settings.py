"""The file that ``webhook_config`` names: one webhook, or a list of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from tuner.config.faults import build
from tuner.config.load import plain_data
from tuner.errors import ConfigError

Level = Literal["debug", "info", "warning", "error", "critical"]
LEVELS: tuple[Level, ...] = get_args(Level)


class Settings(BaseModel):
    """One webhook."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    webhook_type: Literal["discord", "raw"] = "raw"
    """``discord``: messages with files; ``raw``: JSON."""
    webhook_url: str | None = None
    callback_url: str | None = None
    """Another name of the address."""
    message_prefix: str | None = None
    """Before every message; the run's name when absent."""
    log_level: Level = "info"
    """What is posted: ``debug`` also every line of the log, ``info`` start, validations, checkpoints and end,
    ``warning`` and above errors alone."""

    @property
    def address(self) -> str:
        """Where to post: an environment variable's value where it is given as ``$NAME``."""
        written = self.webhook_url or self.callback_url or ""
        return os.environ.get(written[1:].strip("{}"), "") if written.startswith("$") else written

    def takes(self, level: Level) -> bool:
        """Whether messages of that level are posted."""
        return LEVELS.index(level) >= LEVELS.index(self.log_level)


def read(path: Path) -> tuple[Settings, ...]:
    """The webhooks of a JSON, TOML or YAML file. Raises ConfigError for what is wrong with it, without its values."""
    found = plain_data(path)
    entries = found if isinstance(found, list) else [found]
    return tuple(_settings(entry, path) for entry in entries)


def _settings(entry: Any, path: Path) -> Settings:
    if not isinstance(entry, dict):
        raise ConfigError("a webhook must be an object of keys and values", where=path)
    for name in ("webhook_url", "callback_url"):
        if not isinstance(entry.get(name), str | None):
            raise ConfigError(f"{name} is no text", where=path)  # without the value: it may hold the address
    for name in ("webhook_type", "log_level"):
        if "/" in str(entry.get(name)):
            raise ConfigError(f"{name} holds an address", where=path, remedy="write the address as webhook_url")
    settings = build(Settings, entry, where=path)
    if not settings.address.startswith(("http://", "https://")):
        raise ConfigError(
            "a webhook has no address that begins with http:// or https://",
            where=path,
            allowed="webhook_url or callback_url: the address, or $NAME of an environment variable that holds it",
        )
    return settings
