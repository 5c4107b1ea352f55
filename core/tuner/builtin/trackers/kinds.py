"""The trackers that are known: what has to be installed, and who is logged in. Nothing of them is imported here."""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tuner.errors import ConfigError, nearest


def _never() -> bool:
    return True


@dataclass(frozen=True)
class Kind:
    """One tracker."""

    module: str
    """that has to be importable"""
    package: str
    """that has it"""
    ready: Callable[[], bool] = _never
    """Whether somebody is logged in, or the environment says that nobody has to be."""
    login: str = ""
    """command that logs in"""
    later: str = ""
    """command that sends what was kept offline"""

    @property
    def installed(self) -> bool:
        """Whether it is."""
        return find_spec(self.module) is not None


def _wandb() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return bool(os.environ.get("WANDB_MODE")) or _in_netrc("wandb", Path.home() / ".netrc", Path.home() / "_netrc")


def _comet() -> bool:
    if os.environ.get("COMET_API_KEY") or os.environ.get("COMET_START_ONLINE"):
        return True
    named = os.environ.get("COMET_CONFIG")
    for path in (Path(named) if named else Path.home() / ".comet.config", Path(".comet.config")):
        found = configparser.ConfigParser(interpolation=None)
        with suppress(OSError, configparser.Error):
            found.read(path, encoding="utf-8")
            if found.get("comet", "api_key", fallback=""):
                return True
    return False


def _swanlab() -> bool:
    if os.environ.get("SWANLAB_API_KEY") or os.environ.get("SWANLAB_MODE"):
        return True
    folder = Path(os.environ.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab")
    return _in_netrc("", folder / ".netrc")


def _in_netrc(host: str, *paths: Path) -> bool:
    named = os.environ.get("NETRC")
    for path in (Path(named), *paths) if named else paths:
        with suppress(OSError, netrc.NetrcParseError):
            if any(host in each for each in netrc.netrc(str(path)).hosts):
                return True
    return False


KINDS = {
    "tensorboard": Kind("tensorboard", "tensorboard"),
    "wandb": Kind("wandb", "wandb", _wandb, "wandb login", "wandb sync"),
    "trackio": Kind("trackio", "trackio"),
    "mlflow": Kind("mlflow", "mlflow"),
    "comet": Kind("comet_ml", "comet_ml", _comet, "comet login", "comet upload"),
    "swanlab": Kind("swanlab", "swanlab", _swanlab, "swanlab login", "swanlab sync"),
}
"""By the name that ``report_to`` takes."""
ALIASES = {"comet_ml": "comet"}


def asked_for(report_to: str) -> tuple[str, ...]:
    """The names in ``report_to``, each once, with ``all`` as what is installed and without ``none``."""
    words = [part.strip().lower() for part in report_to.split(",") if part.strip()]
    names = dict.fromkeys(ALIASES.get(word, word) for word in words)
    if "all" in names:
        names |= dict.fromkeys(name for name, kind in KINDS.items() if kind.installed)
    return tuple(name for name in names if name not in ("all", "none"))


def known(report_to: str) -> tuple[str, ...]:
    """Those of them that are trackers of this module."""
    return tuple(name for name in asked_for(report_to) if name in KINDS)


def check(report_to: str, registered: Callable[[], Sequence[str]]) -> None:
    """Raise ConfigError for a name that is no tracker's, and for ``none`` beside others.

    Arguments
        registered: gives the names of trackers that plugins registered; asked only for a name that is not known.
    """
    names = asked_for(report_to)
    if names and "none" in report_to.lower().replace(" ", "").split(","):
        raise ConfigError("report_to names trackers, and `none`", where="report_to", remedy="leave one of them out")
    for name in names:
        if name not in KINDS and name not in registered():
            allowed = [*KINDS, *registered(), "all", "none"]
            raise ConfigError(
                f"report_to: there is no tracker {name!r}",
                where="report_to",
                allowed=allowed,
                nearest=nearest(name, allowed),
            )


def missing(name: str) -> str | None:
    """What to say of a tracker that is not installed; None where it is."""
    kind = KINDS.get(name)
    if kind is None or kind.installed:
        return None
    return f"report_to {name}: the package is not installed; `pip install {kind.package}`"


def online(name: str) -> bool:
    """Whether what is reported can leave this machine."""
    return name not in KINDS or KINDS[name].ready()
