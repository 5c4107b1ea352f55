"""Clips and pictures of validations, by prompt and step: what the page's grid shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tuner.validate.results import PREVIEWS

VIDEOS = frozenset({".mp4", ".webm"})
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif"})
SHEET = "contact-sheet"
RECORD = "validation"
_STEP = re.compile(r"step-(\d+)")


@dataclass
class Media:
    """Files by name and step; looked for on the disk, so that a page can be made of any run."""

    output_dir: Path
    cells: dict[str, dict[int, dict[str, str]]] = field(default_factory=dict)
    """name of a clip (``cat``, ``cat@ema``) -> step -> ``video``, ``picture``, and ``previews`` (what it was like while
    it was sampled): paths from the output folder"""
    sheets: dict[str, str] = field(default_factory=dict)
    """path of a contact sheet -> what it is called"""
    prompts: dict[str, str] = field(default_factory=dict)
    """name of a clip -> its prompt"""
    _read: set[Path] = field(default_factory=set)

    def scan(self) -> None:
        """Take every ``validation/step-<n>/`` of the output folder."""
        for folder in (self.output_dir / "validation").glob("step-*"):
            if (step := _STEP.fullmatch(folder.name)) and folder.is_dir():
                self.add(int(step[1]), sorted((*folder.iterdir(), *folder.glob(f"{PREVIEWS}/*/sheet.*"))))

    def add(self, step: int, paths: Iterable[Path]) -> None:
        """Take the files of a validation; those that are gone, or outside the output folder, are left out."""
        for path in paths:
            suffix, name = path.suffix.lower(), path.stem
            if suffix not in VIDEOS | PICTURES or not path.is_file() or name.startswith("."):
                continue
            if (relative := self._relative(path)) is None:
                continue
            if path.parent.parent.name == PREVIEWS:
                self.cells.setdefault(path.parent.name, {}).setdefault(step, {})["previews"] = relative
                continue
            if name.partition("@")[0] == SHEET:
                self.sheets[relative] = f"step {step}" + (f" ({name.partition('@')[2]})" if "@" in name else "")
                continue
            kind = "video" if suffix in VIDEOS else "picture"
            self.cells.setdefault(name, {}).setdefault(step, {})[kind] = relative
            self._name_prompts(path.parent)

    def files(self) -> frozenset[str]:
        """All paths from the output folder."""
        cells = (path for steps in self.cells.values() for cell in steps.values() for path in cell.values())
        return frozenset((*cells, *self.sheets))

    def as_json(self) -> dict[str, Any]:
        """Rows of the grid by name, and the sheets; addresses are relative to the page's folder."""
        rows = [
            {
                "name": name,
                "prompt": self.prompts.get(name) or self.prompts.get(name.partition("@")[0], ""),
                "cells": {str(step): {kind: _address(path) for kind, path in cell.items()} for step, cell in found},
            }
            for name, found in ((name, sorted(steps.items())) for name, steps in sorted(self.cells.items()))
        ]
        sheets = [{"name": name, "address": _address(path)} for path, name in self.sheets.items()]
        return {"rows": rows, "sheets": sorted(sheets, key=lambda each: (len(each["name"]), each["name"]))}

    def _relative(self, path: Path) -> str | None:
        try:
            return path.resolve().relative_to(self.output_dir.resolve()).as_posix()
        except ValueError:
            return None

    def _name_prompts(self, folder: Path) -> None:
        """Read which prompt each clip of ``folder`` shows, where that is recorded beside them."""
        if folder in self._read:
            return
        self._read.add(folder)
        for record in folder.glob(f"{RECORD}*.json"):
            try:
                prompts = json.loads(record.read_text(encoding="utf-8"))["prompts"]
                found = {Path(name).stem: str(each["prompt"]) for each in prompts for name in each["files"]}
            except (OSError, ValueError, KeyError, TypeError):
                continue  # no record of ours
            self.prompts |= found


def _address(path: str) -> str:
    return "../" + quote(path)
