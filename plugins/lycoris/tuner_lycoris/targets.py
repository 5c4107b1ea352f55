"""Which modules of a network the settings adapt, and with which options: the library's own rules, on names alone.

The library walks a live network and keeps what it was told in attributes of a class, where the next network finds
it. Here nothing is kept, and the same rules serve a network that is only described.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

from tuner import ConfigError
from tuner.errors import nearest
from tuner_lycoris.settings import EVERYTHING, LycorisSettings, Override, Targets

Kind = Literal["linear", "kernel"]
"""``linear``: a matrix, or a convolution whose kernel is of size 1 along its first axis; ``kernel``: another one."""
SHOWN = 12
"""How many classes an error lists."""


@dataclass(frozen=True)
class Tree:
    """A network by names: what can be adapted in it, and where that lies."""

    classes: Mapping[str, str]
    """Full name -> class of every module, each after those that it lies in."""
    kinds: Mapping[str, Kind]
    """Full name -> what it is, of the modules that can be adapted."""

    def within(self, root: str) -> Iterator[str]:
        """``root`` and the names below it."""
        return (name for name in self.classes if not root or name == root or name.startswith(root + "."))


@dataclass(frozen=True)
class Chosen:
    """How one module is adapted."""

    algo: str
    dim: int
    alpha: float
    factor: int = -1
    full_matrix: bool = False
    decompose_both: bool = False
    unbalanced_factorization: bool = False
    use_tucker: bool = False
    use_scalar: bool = False
    rs_lora: bool = False


def choose(tree: Tree, settings: LycorisSettings, network: str) -> dict[str, Chosen]:
    """Full name -> options of every module that is adapted.

    ``network`` is its name, for errors. Raises ConfigError where a class or pattern of the settings matches nothing,
    and where nothing at all is adapted.
    """
    targets, _ = resolved(tree, settings.targets, network)
    selection = _Selection(tree, targets)
    _refuse_idle(selection, targets, network)
    chosen = selection.options(settings)
    if not chosen:
        raise ConfigError(f"the LyCORIS settings adapt nothing of network {network!r}", where="lycoris_config")
    return chosen


def choose_known(tree: Tree, settings: LycorisSettings) -> dict[str, Chosen]:
    """As :func:`choose` for a part of a network: what the settings name elsewhere in it is passed over."""
    targets, present = settings.targets, set(tree.classes.values())
    known = {each for each in (*targets.target_module, *targets.module_algo_map) if _alike(each, present)}
    if targets.target_module and not (known or targets.target_name or targets.name_algo_map):
        return {}  # without a target it would be everything
    some = targets.model_copy(
        update={
            # What a map names is a target, too.
            "target_module": tuple(each for each in known if targets.target_module),
            "module_algo_map": {each: value for each, value in targets.module_algo_map.items() if each in known},
        }
    )
    return _Selection(tree, resolved(tree, some, "")[0]).options(settings)


def resolved(tree: Tree, targets: Targets, network: str) -> tuple[Targets, dict[str, str]]:
    """``targets`` with classes that ``tree`` has, and what was taken for what.

    A class that the network does not have stands for the only one whose name ends with it: settings written for all
    models say ``Attention``, which a network may call ``WanAttention``. Raises ConfigError for other strangers.
    """
    present = set(tree.classes.values())
    taken: dict[str, str] = {}
    for name in (*targets.target_module, *targets.module_algo_map):
        if name in present:
            continue
        alike = _alike(name, present)
        if len(alike) != 1:
            raise _no_class(name, alike, tree, network)
        taken[name] = alike[0]
    modules = tuple(taken.get(name, name) for name in targets.target_module)
    if not _is_limited(targets):
        modules = EVERYTHING
    algorithms = {taken.get(name, name): each for name, each in targets.module_algo_map.items()}
    return targets.model_copy(update={"target_module": modules, "module_algo_map": algorithms}), taken


def _alike(name: str, present: Collection[str]) -> list[str]:
    return [name] if name in present else sorted(each for each in present if each.endswith(name))


def _is_limited(targets: Targets) -> bool:
    """Whether it is said what is adapted. The library takes ``target_name`` alone for everything and those; here it
    is those. The maps only say how."""
    return bool(targets.target_module or targets.target_name)


def _no_class(name: str, alike: Sequence[str], tree: Tree, network: str) -> ConfigError:
    holding = {tree.classes[root] for root in tree.classes if any(each in tree.kinds for each in tree.within(root))}
    shown = sorted(holding)[:SHOWN]
    problem = f"could be {' or '.join(alike)}" if alike else "is the class of no module"
    return ConfigError(
        f"LyCORIS target {name!r} {problem} of network {network!r}",
        where="lycoris_config: apply_preset",
        allowed=shown,
        nearest=None if alike else nearest(name, holding),
        remedy="name the classes of modules in this network",
    )


class _Selection:
    """The walk through a network. What is found first stays, as in the library."""

    def __init__(self, tree: Tree, targets: Targets) -> None:
        self.tree, self.targets = tree, targets
        self.overrides: dict[str, Override] = {}
        self.matched: set[str] = set()
        """patterns that matched something that can be adapted"""
        self._classes = {*targets.target_module, *targets.module_algo_map}
        self._names = (*targets.target_name, *targets.name_algo_map)
        self._walk()

    def options(self, settings: LycorisSettings) -> dict[str, Chosen]:
        """The options of every module that is adapted."""
        kinds = self.tree.kinds
        found = {name: _options(settings, self.targets, kinds[name], each) for name, each in self.overrides.items()}
        return {name: each for name, each in found.items() if each is not None}

    def _walk(self) -> None:
        maps = self.targets.module_algo_map
        for name, kind in self.tree.classes.items():
            if self._is_excluded(name):
                continue
            hits = [pattern for pattern in self._names if self._matches(pattern, name)]
            if hits:
                self._note(hits, name)
                self._take(name, self._by_name(name) or maps.get(kind) or Override())
            elif kind in self._classes:
                self._within(name, maps.get(kind) or Override())

    def _within(self, root: str, override: Override) -> None:
        for name in self.tree.within(root):
            inner = self.targets.module_algo_map.get(self.tree.classes[name])
            if self._is_excluded(name):
                continue
            if inner is not None and name != root:
                # An entry without an algorithm keeps that of the module around it.
                self._within(name, inner if inner.algo else inner.model_copy(update={"algo": override.algo}))
            else:
                self._take(name, override)

    def _take(self, name: str, override: Override) -> None:
        if name in self.tree.kinds:
            self.overrides.setdefault(name, override)

    def _by_name(self, name: str) -> Override | None:
        maps = self.targets.name_algo_map
        return maps.get(name) or next((each for key, each in maps.items() if self._matches(key, name)), None)

    def _is_excluded(self, name: str) -> bool:
        hits = [each for each in self.targets.exclude_name if name and self._matches(each, name)]
        self._note(hits, name)
        return bool(hits)

    def _note(self, patterns: Sequence[str], name: str) -> None:
        if name in self.tree.kinds:
            self.matched.update(patterns)

    def _matches(self, pattern: str, name: str) -> bool:
        if pattern == name:
            return True
        return fnmatch(name, pattern) if self.targets.use_fnmatch else re.match(pattern, name) is not None


def _refuse_idle(selection: _Selection, targets: Targets, network: str) -> None:
    patterns = (*targets.target_name, *targets.name_algo_map, *targets.exclude_name)
    idle = [each for each in patterns if each not in selection.matched]
    if idle:
        kind = "shell pattern" if targets.use_fnmatch else "regular expression"
        raise ConfigError(
            f"the {kind} {idle[0]!r} matches no matrix of network {network!r}",
            where="lycoris_config: apply_preset",
            nearest=nearest(idle[0], selection.tree.kinds),
            remedy="write it for full names of matrices, such as blocks.0.attn1.to_q",
        )


def _options(settings: LycorisSettings, targets: Targets, kind: Kind, override: Override) -> Chosen | None:
    """The module's own options over those of the whole file; None for a kernel that is left alone."""
    dim, alpha = settings.linear_dim, settings.linear_alpha
    if kind == "kernel":
        dim = (settings.linear_dim if settings.conv_dim is None else settings.conv_dim) if targets.enable_conv else 0
        alpha = settings.conv_alpha or settings.linear_alpha
    dim = override.dim or dim
    if not dim:
        return None
    alpha = override.alpha or alpha or dim
    given = settings.model_dump(exclude_none=True) | override.model_dump(exclude_none=True)
    names = set(Chosen.__dataclass_fields__) - {"algo", "dim", "alpha"}
    return Chosen(given.get("algo", "lora"), dim, float(alpha), **{name: given[name] for name in names & given.keys()})
