"""The pages keep their word: links lead somewhere, and every command in them is one that there is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tuner.cli import app, config_command
from tuner.cli.flags import parse_flags
from tuner.config.describe import facts
from tuner.testing.drift import DriftConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
PAGES = [page for page in PAGES if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as they are made from them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    bare = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {each.strip().replace(" ", "-") for each in bare}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", link):
            continue  # of the net: not asked here
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), link
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), link


def commands() -> Iterator[tuple[str, list[str]]]:
    """(where, words) of every line of a fenced block that begins with the command."""
    for page in PAGES:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            text = block.replace("\\\n", " ")
            for line in text.splitlines()[1:-1]:
                words = re.sub(r"^(\$ |\.venv/bin/)", "", line.strip())
                if words.startswith("tuner "):
                    # What follows two spaces, or a mark, says what the command does.
                    plain = re.split(r"\s{2,}|\s#\s|\s[&|>]", words)[0]
                    yield page.relative_to(ROOT).as_posix(), shlex.split(plain)[1:]


def known_keys() -> set[str]:
    models = [*(model for _, model in config_command.models()), DriftConfig]  # the tutorial's plugin has a key, too
    fields = [(name, field) for model in models for name, field in model.model_fields.items()]
    return {name for name, _ in fields} | {other for _, field in fields for other in facts(field).aliases}


def test_every_command_is_one_that_there_is() -> None:
    group: Any = typer.main.get_command(app)
    keys, seen = known_keys(), 0
    for page, words in commands():
        where, command, rest = f"{page}: tuner {' '.join(words)}", group, list(words)
        while hasattr(command, "commands") and rest and rest[0] in command.commands:
            command = command.commands[rest.pop(0)]
        assert command is not group or words[0].startswith("--"), where
        parameters = [*command.params, *(group.commands["run"].params if "launch" in words else ())]  # it passes on
        options = {name for each in parameters for name in (*each.opts, *each.secondary_opts)}
        flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
        unknown = [flag for flag in flags if flag not in {*options, "--help", "--version"}]
        if command.context_settings.get("ignore_unknown_options"):
            unknown = [flag for flag in unknown if next(iter(parse_flags([flag], where))) not in keys]
        assert not unknown, f"{where}: {unknown}"
        seen += 1
    assert seen > 20
