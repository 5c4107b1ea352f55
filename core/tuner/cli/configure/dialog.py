"""The conversation in a terminal: questions, a summary, and pages to visit before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from tuner.cli.configure import pages
from tuner.cli.configure.look import lines
from tuner.cli.configure.questions import BETWEEN, QUESTIONS, family_of, parsed, value_of
from tuner.config.owners import KeyIndex
from tuner.errors import Stopped, TunerError

if TYPE_CHECKING:
    from tuner.cli.configure.draft import Draft, Drafting
    from tuner.cli.configure.propose import Answers
    from tuner.spec import ModelSpec

FIRST = ("teach", "trigger", "clips", "model", "base", "card")
"""What is asked of everybody; the rest is on the pages."""


@dataclass
class Dialog:
    """One conversation."""

    drafting: Drafting
    index: KeyIndex
    known: Mapping[str, ModelSpec]
    fixed: dict[str, Any]
    given: frozenset[str]
    """answers that flags gave: not asked"""
    console: Console = field(default_factory=Console)

    def hold(self, answers: dict[str, Any], make: Any) -> Draft:
        """Ask, show what comes of it, let pages be visited. Raises Stopped when the person leaves.

        Arguments
            answers: what is known, by name; the defaults of the questions.
            make: makes Answers of them.
        """
        while True:
            try:
                draft = self._drafted(self._asked(answers, make))
                break
            except Stopped:
                raise
            except TunerError as error:
                self._say(error)
                self.given = frozenset()
        return self._pages(draft)

    def _asked(self, answers: dict[str, Any], make: Any) -> Answers:
        for name in FIRST:
            if name not in self.given:
                answers[name] = self._question(name, answers.get(name))
            if name == "model" and answers["model"]:
                answers["family"] = family_of(answers["model"], self.known)
            if name == "clips":
                found = self.drafting.look(answers["clips"])
                for line in lines(found):
                    self.console.print(f"  {escape(line)}", highlight=False)
                if found.uncaptioned and "caption" not in self.given:
                    answers["caption"] = self._question("caption", answers.get("caption"))
        made: Answers = make(answers)
        return made

    def _question(self, name: str, now: Any) -> Any:
        """The answer to a question; Enter keeps what stands in brackets."""
        asked = QUESTIONS[name]
        if name == "model":
            self.console.print("  " + ", ".join(self.known), highlight=False)
        shown = BETWEEN.join(now) if isinstance(now, tuple | list) else "" if now is None else str(now)
        while True:
            self.console.print(f"[bold]{asked.text}[/] ({escape(asked.allowed)})", highlight=False)
            text = self._input(f"{name} [{shown}]: ")
            try:
                if name == "model" and (text or shown):
                    family_of(text.strip() or shown, self.known)
                return parsed(name, text or shown)
            except TunerError as error:
                self._say(error)

    def _input(self, prompt: str) -> str:
        try:
            return self.console.input(escape(prompt)).strip()
        except (EOFError, KeyboardInterrupt):
            raise Stopped("nothing was written") from None

    def _drafted(self, answers: Answers, fixed: Mapping[str, Any] | None = None) -> Draft:
        with self._thinking("looking at model and data ..."):
            draft = self.drafting.draft(answers, self.fixed if fixed is None else fixed)
        with self._thinking("planning memory ..."):
            return self.drafting.plan(draft)

    @contextmanager
    def _thinking(self, words: str) -> Iterator[None]:
        self.console.print(words, style="dim", highlight=False)
        yield

    def _pages(self, draft: Draft) -> Draft:
        self._show(draft)
        names = list(pages.PAGES)
        while True:
            self.console.print("  ".join(f"[bold]{number}[/] {name}" for number, name in enumerate(names, 1)))
            choice = self._input("a page's number, s to show, w to write, q to quit [w]: ").casefold()
            if choice in ("", "w"):
                return draft
            if choice == "q":
                raise Stopped("nothing was written")
            if choice.isdigit() and 1 <= int(choice) <= len(names):
                draft = self._page(names[int(choice) - 1], draft)
            else:
                self._show(draft)

    def _page(self, page: str, draft: Draft) -> Draft:
        while True:
            rows = pages.items(page, draft, self.index, self.drafting.catalog)
            self.console.print(pages.table(page, rows))
            choice = self._input("an item's number, Enter to go back: ")
            if not choice:
                return draft
            if not choice.isdigit() or not 1 <= int(choice) <= len(rows):
                self.console.print(f"allowed: 1 to {len(rows)}")
                continue
            row = rows[int(choice) - 1]
            self.console.print(f"{row.name}: {row.allowed}", markup=False, highlight=False)
            text = self._input(f"{row.name} [{row.now}]: ")
            draft = self._changed(draft, row.name, text) if text else draft

    def _changed(self, draft: Draft, name: str, text: str) -> Draft:
        """The draft with one more answer or key; as it was, with the error shown, where that cannot be."""
        answers, fixed = draft.answers, dict(self.fixed)
        try:
            if name in QUESTIONS:
                answers = replace(answers, **{name: parsed(name, text)})
                if name == "model":
                    answers = replace(answers, family=family_of(answers.model, self.known))
            else:
                value = value_of(name, text, self.index)
                fixed |= pages.companions(name, value, self.drafting.catalog, answers.family)
            new = self._drafted(answers, fixed)
        except TunerError as error:
            self._say(error)
            return draft
        self.fixed = fixed
        if new.planned is not None and new.planned.problem is not None:
            self._say(new.planned.problem)
        return new

    def _show(self, draft: Draft) -> None:
        for line in pages.summary(draft):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _say(self, error: TunerError) -> None:
        self.console.print(f"{error.label}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
