"""The plugin and the family keep tuner's contract."""

from __future__ import annotations

from tuner_ltx.contract import LtxContract, LtxFamilyContract


class TestLtxPlugin(LtxContract):
    """Every check of it."""


class TestLtxFamily(LtxFamilyContract):
    """Every check of it."""
