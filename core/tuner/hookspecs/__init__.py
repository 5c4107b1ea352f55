"""THE contract: every hook a plugin may implement.

``run`` goes to every hook (:class:`tuner.run.Run`). *One* means exactly one loaded plugin answers,
*at most one* that none need, *all* that every answer counts and the core merges them. Implement a hook
as a method of your :class:`tuner.Plugin` subclass, marked with ``@tuner.hookimpl``, with these very
argument names (a hook may leave out arguments it does not need).
"""

from __future__ import annotations

from tuner.hookspecs.markers import PROJECT, hookimpl, hookspec
from tuner.hookspecs.model import ModelHooks
from tuner.hookspecs.survey import SurveyHooks
from tuner.hookspecs.training import TrainingHooks

__all__ = ["PROJECT", "REQUIRED", "SINGLE", "HookSpecs", "hook_names", "hookimpl", "hookspec"]

REQUIRED = frozenset(
    {"describe_model", "prepare_data", "plan_epochs", "load_model", "fill_cache", "encode_batch", "compute_loss"}
)
"""Hooks with exactly one answer: a model family's, and those of the built-in datasets, epochs and encoding."""
SINGLE = REQUIRED | {"gradient_release", "route_tokens", "weight_variants"}
"""Hooks with at most one answer."""


class HookSpecs(SurveyHooks, ModelHooks, TrainingHooks):
    """All hooks."""


def hook_names() -> list[str]:
    """The names of all hooks, in the order a run calls them."""
    return [
        name
        for part in (SurveyHooks, ModelHooks, TrainingHooks)
        for name, member in vars(part).items()
        if hasattr(member, f"{PROJECT}_spec")
    ]
