"""What a plugin is: a class with hooks, and a frozen model of the flat config keys it owns.

The module behind an entry point imports this one and nothing heavy: no torch, no diffusers. Heavy
imports belong in hook bodies or in sibling modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tuner.config.coerce import coerce_fields

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig

API_VERSION = 1
"""Version of the hook contract. A plugin written for another version is refused by name."""

Effect = Literal["memory", "files", "uploads"]


class PluginConfig(BaseModel):
    """The flat config keys one plugin owns: strict, frozen, every field made with :func:`key`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, values: Any) -> Any:
        """Accept values as people write them: ``"true"``, ``"1e-4"``, ``1e6`` for a count, ``9`` for a list."""
        return coerce_fields(cls, values) if isinstance(values, Mapping) else values


def key(
    default: Any,
    description: str,
    *,
    effect: Effect | None = None,
    aliases: tuple[str, ...] = (),
    environment: str | None = None,
    pending: str | None = None,
    needs: Mapping[str, tuple[Any, ...]] | None = None,
    **constraints: Any,
) -> Any:
    """Declare one config key. Used for core keys and plugin keys alike; ``docs/config.md`` is made from it.

    Arguments
        default: the value when the key is absent; mutable defaults are copied per model.
        description: what the key does, one or two sentences, with units.
        effect: set when leaving the owning plugin out would change memory, saved files or uploads
            behind the user's back; such a key, away from its default, then needs ``--without``.
        aliases: other names that users' files have for it.
        environment: an environment variable that becomes this key when the file does not set it.
        pending: set while the key is owned but has no effect yet: the warning's text.
        needs: core keys and, for each, the values that this key is read beside; with another one it does nothing, and
            a line says so.
        constraints: passed to ``pydantic.Field`` (``ge``, ``le``, ``min_length`` …).
    """
    extra: dict[str, Any] = {"effect": effect, "aliases": list(aliases), "environment": environment, "pending": pending}
    extra["needs"] = needs or {}
    return Field(default, description=description, json_schema_extra={"tuner": extra}, **constraints)


C = TypeVar("C", bound=PluginConfig)


class Plugin(Generic[C]):
    """One feature. Subclass it and name the subclass in the ``tuner.plugins`` entry-point group.

    The first line of the subclass's docstring is its summary in ``tuner plugins``.
    """

    api: ClassVar[int] = API_VERSION
    requires: ClassVar[frozenset[str]] = frozenset()
    """Plugin names or capabilities that the selection must contain."""
    conflicts: ClassVar[frozenset[str]] = frozenset()
    """Plugin names or capabilities that no other active plugin may have."""
    provides: ClassVar[frozenset[str]] = frozenset()
    """Capabilities, such as ``model-family`` or ``token-router``."""
    values: ClassVar[Mapping[str, frozenset[str]]] = {}
    """Values of core keys that this plugin serves, such as ``{"attention_mechanism": {"flex"}}``."""
    levers: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    """Settings of keys that save memory, the cheapest first: ``tuner plan --fit`` tries them in a config, whether this
    plugin is loaded yet or not."""
    Config: ClassVar[type[PluginConfig]] = PluginConfig

    def __init__(self, name: str, config: C) -> None:
        self.name = name
        self.config = config

    def is_active(self, core: CoreConfig) -> bool:
        """Whether this plugin will do something in a run with these core keys; only active plugins can conflict."""
        return True

    def warnings(self, core: CoreConfig) -> Iterable[str]:
        """What will not happen although the config says so, a line each: printed before anything is done."""
        return ()

    def validates_at(self, step: int, epoch: int) -> bool:
        """Whether to be asked ``validate`` after this optimizer step, beside the run's own validations.

        Arguments
            step: optimizer steps done.
            epoch: epochs done, where this step ended one; else 0.
        """
        return False

    def validates_base(self) -> bool:
        """Whether to be asked ``validate`` before the first step, with the base in the place of the trained weights."""
        return False

    def saves_at(self, step: int, epoch: int) -> bool:
        """Whether a checkpoint is wanted after this optimizer step, beside the run's own; arguments as above.

        Asked once a step on every process; one that says yes is enough.
        """
        return False

    def stops_at(self, step: int, epoch: int) -> bool:
        """Whether the run is to end after this optimizer step, with everything saved; arguments as above."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint: a flat dict of tensors and JSON values. Empty for most plugins."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""


AnyPlugin = Plugin[Any]
