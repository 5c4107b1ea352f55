"""Which matrices a LoRA adapts, with which rank and alpha: names only, no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from tuner.errors import ConfigError, nearest
from tuner.spec import NetworkSpec

T = TypeVar("T")
REGEX = "re:"
ALL_LINEAR = "all-linear"
SHOWN = 12
"""How many ends of module names an error lists."""


@dataclass(frozen=True)
class Targets:
    """What the keys say of the matrices to adapt."""

    names: tuple[str, ...]
    """Ends of module names, patterns, or ``all-linear``."""
    rank: int
    alpha: float | None = None
    """None is each matrix's rank."""
    exclude: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    """By end of a module name, or pattern; the last that matches holds."""
    alphas: Mapping[str, float] = field(default_factory=dict)

    def among(self, names: Collection[str], linears: Collection[str]) -> dict[str, tuple[int, float]]:
        """(rank, alpha) of each adapted matrix by module name, in the order of ``names``.

        Arguments
            names: the modules that could be adapted.
            linears: those that ``all-linear`` means.
        """
        return {name: self._of(name) for name in names if self._wants(name, linears)}

    def _wants(self, name: str, linears: Collection[str]) -> bool:
        if any(matches(each, name) for each in self.exclude):
            return False
        return any((name in linears) if each == ALL_LINEAR else matches(each, name) for each in self.names)

    def _of(self, name: str) -> tuple[int, float]:
        rank = _last(self.ranks, name, self.rank)
        usual = float(rank) if self.alpha is None else self.alpha
        return rank, float(_last(self.alphas, name, usual))


def _last(patterns: Mapping[str, T], name: str, otherwise: T) -> T:
    found = [value for pattern, value in patterns.items() if matches(pattern, name)]
    return found[-1] if found else otherwise


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` means the module ``name``: its name or the end of it, or ``re:`` and the whole name."""
    if pattern.startswith(REGEX):
        return re.fullmatch(pattern.removeprefix(REGEX), name) is not None
    return name == pattern or name.endswith("." + pattern)


def check_patterns(where: str, patterns: Iterable[str]) -> None:
    """Raise ConfigError for what is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix(REGEX) if pattern.startswith(REGEX) else "")
        except re.error as error:
            raise ConfigError(
                f"{where} holds {pattern!r}, which is no regular expression: {error}",
                where=where,
                remedy="what comes after `re:` must match whole module names, such as re:blocks\\.(0|1)\\..*to_q",
            ) from None


def check_used(where: str, patterns: Iterable[str], names: Collection[str], network: str, of: str) -> None:
    """Raise ConfigError for a pattern that means none of ``names``, which are ``of`` (such as ``adapted module``)."""
    suffixes = sorted({suffix for name in names for suffix in _ends(name)})
    for pattern in patterns:
        if pattern == ALL_LINEAR or any(matches(pattern, name) for name in names):
            continue
        raise ConfigError(
            f"{pattern!r} matches no {of} of network {network!r}",
            where=where,
            allowed=", ".join(suffixes[:SHOWN]) + (f" … ({len(suffixes)} in all)" if len(suffixes) > SHOWN else ""),
            nearest=nearest(pattern, suffixes),
            remedy="name the ends of module names, or `re:` and a pattern for whole ones; or leave it out",
        )


def _ends(name: str) -> Iterator[str]:
    """The shortest end of a module name that does not begin with a number: ``to_q``, ``to_out.0``, ``net.0.proj``."""
    parts = name.split(".")
    for start in range(len(parts) - 1, -1, -1):
        if not parts[start].isdigit():
            yield ".".join(parts[start:])
            return


def in_blocks(network: NetworkSpec) -> list[list[str]]:
    """For each of ``network.matrices`` its module names, one for each block, without the network itself."""
    by_end: dict[str, list[str]] = {}
    for name in network.weights:
        if found := re.fullmatch(r"(?:.*?\.)?\d+\.(.+)", name):
            by_end.setdefault(found[1], []).append(name)
    guessed = [f"blocks.{index}." for index in range(network.blocks)]
    return [
        by_end.get(each.name, [])[: network.blocks] or [prefix + each.name for prefix in guessed]
        for each in network.matrices
    ]
