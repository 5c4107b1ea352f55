"""The markers of specifications and implementations."""

from __future__ import annotations

import pluggy

PROJECT = "tuner"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
