"""The files that `tuner configure` reads and writes. A file that changes is copied first."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.cli.configure import edit
from tuner.cli.configure.propose import LONGEST, Answers, Proposal
from tuner.config.load import bare_name, plain_data, raw_config
from tuner.config.owners import KeyIndex, canonical
from tuner.errors import ConfigError
from tuner.files import atomic_write_text

if TYPE_CHECKING:
    from tuner.cli.configure.draft import Draft

CONFIG, LIST, LIBRARY = "config.json", "multidatabackend.json", "user_prompt_library.json"
LISTED = "data_backend_config"
HEAD = "// tuner configure: "
REMEMBERED = re.compile(r"^// tuner configure: (\{.*\})$", re.MULTILINE)
MEDIA = ("video", "image")
OURS = re.compile(r"(prompt|seen)_\d+|unseen")
"""Nicknames of prompts that are made here."""
CAPTIONS = ("caption_strategy", "caption_prepend", "instance_prompt")
FRAMES = ("num_frames", "min_frames", "frame_buckets", "fps")
AFTER = {
    "trigger": CAPTIONS,
    "caption": CAPTIONS,
    "frames": ("video",),
    "model": ("resolution", "video"),
    "family": ("resolution", "video"),
    "clips": ("id", "instance_data_dir", "cache_dir_vae", "resolution", "resolution_type", "video", *CAPTIONS),
}
"""Keys of an entry that are proposed anew when an answer is another one."""
ASSUMED: dict[str, Any] = {"trigger": "", "caption": "", "frames": LONGEST, "prompts": []}
"""Answers that a config written by hand is taken to have."""
PROMPTED = frozenset(("prompts", "trigger", "teach", "clips"))


@dataclass
class Existing:
    """What the folder holds already."""

    folder: Path
    index: KeyIndex
    settings: dict[str, Any] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    prompts: dict[str, str] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    """by name; those that the files tell"""
    ours: bool = False
    """whether the config was written by this command: what its owner took out stays out"""

    @classmethod
    def read(cls, folder: Path, index: KeyIndex) -> Existing:
        """The files in ``folder``. Raises ConfigError where one is malformed, or no JSON."""
        found, path = cls(folder, index), folder / CONFIG
        if not path.is_file():
            return found
        found.settings = canonical(raw_config(path), index, path)
        found.entries = found._entries()
        if found.library.is_file():
            named = plain_data(found.library)
            found.prompts = {str(key): str(text) for key, text in named.items()} if isinstance(named, dict) else {}
        remembered = found._remembered(path)
        found.ours, found.answers = bool(remembered), remembered | found._told()
        return found

    @property
    def list_path(self) -> Path:
        """The file with the list of datasets."""
        named = self.settings.get(LISTED)
        return Path(named) if isinstance(named, str) else self.folder / LIST

    @property
    def library(self) -> Path:
        """The file with the prompts."""
        return Path(self.settings.get("user_prompt_library") or self.folder / LIBRARY)

    def differing(self, answers: Answers) -> frozenset[str]:
        """Names of the answers that are others than those of the files."""
        new = _words(answers)
        known = ASSUMED | self.answers if self.settings else {}
        return frozenset(name for name, value in known.items() if new[name] != value)

    def entries_with(
        self, proposed: Sequence[Proposal], changed: frozenset[str]
    ) -> list[tuple[dict[str, Any], dict[str, str]]]:
        """The entries of the list, with the reasons of what is new in each.

        Entries of the file stay, but those of clips and pictures where an answer about them ``changed``.
        """
        left = list(proposed)
        result: list[tuple[dict[str, Any], dict[str, str]]] = []
        for entry in self.entries:
            kind = entry.get("dataset_type", "video")
            match = None if entry.get("disabled") else next((p for p in left if p.values["dataset_type"] == kind), None)
            if match is not None:
                left.remove(match)
            if match is None or kind not in MEDIA:
                result.append((entry, {}))
            else:
                result.append((_renewed(entry, match, changed), match.why))
        if not self.entries or "clips" in changed:
            result += [(each.values, each.why) for each in left]
        return result

    def prompts_with(self, proposed: Mapping[str, str], changed: frozenset[str]) -> dict[str, str]:
        """The prompts of the file; where an answer about them ``changed``, the proposed ones for those made here."""
        if self.prompts and not changed & PROMPTED:
            return self.prompts
        return {name: text for name, text in self.prompts.items() if not OURS.fullmatch(name)} | dict(proposed)

    def write(self, draft: Draft) -> list[str]:
        """Write what differs; a line for each file. Raises ConfigError when what was written does not read back."""
        lines = [self._write_config(draft)]
        if isinstance(draft.settings[LISTED], str):
            lines.append(self._write_list(draft))
        library = self.folder / LIBRARY
        if draft.settings.get("user_prompt_library") == str(library):
            lines.append(self._write_library(draft, library))
        return lines

    def _write_config(self, draft: Draft) -> str:
        path, whole = self.folder / CONFIG, draft.whole
        if isinstance(whole[LISTED], list):
            whole[LISTED] = draft.entries
        head = HEAD + json.dumps(_words(draft.answers), ensure_ascii=False)
        if not path.is_file():
            about = "// Every key is described in docs/config.md. Run `tuner configure` again to change answers.\n"
            return _put(path, edit.fresh(whole, draft.reasons, f"{head}\n{about}"), whole, self._canonical)
        text = path.read_text(encoding="utf-8-sig")
        text = REMEMBERED.sub("", text, count=1).lstrip("\n") if REMEMBERED.search(text) else text
        values = {key: value for key, value in whole.items() if self.settings.get(key, ...) != value}
        text = edit.changed(
            text,
            edit.container_at(text),
            values,
            why=draft.reasons,
            without=draft.gone - whole.keys(),
            name_of=self._name,
        )
        return _put(path, f"{head}\n{text}", whole, self._canonical)

    def _write_list(self, draft: Draft) -> str:
        path = Path(draft.settings[LISTED])
        if not path.is_file():
            items = [
                edit.indented(edit.fresh(values, why))
                for values, why in zip(draft.entries, draft.entry_why, strict=True)
            ]
            return _put(path, f"// docs/datasets.md describes every key.\n[\n{''.join(items)}]\n", draft.entries)
        text = path.read_text(encoding="utf-8-sig")
        for number, values in reversed(list(enumerate(draft.entries))):
            why = draft.entry_why[number]
            if number >= len(self.entries):
                continue
            old = self.entries[number]
            at = edit.members(text, edit.container_at(text))[0][number].value
            new = {key: value for key, value in values.items() if old.get(key, ...) != value}
            text = edit.changed(text, at, new, why=why, without=old.keys() - values.keys())
        for number in range(len(self.entries), len(draft.entries)):
            text = edit.appended(
                text, edit.container_at(text), edit.fresh(draft.entries[number], draft.entry_why[number])
            )
        return _put(path, text, draft.entries)

    def _write_library(self, draft: Draft, path: Path) -> str:
        if not path.is_file():
            head = "// Rendered at every validation: nickname -> prompt.\n"
            return _put(path, edit.fresh(draft.prompts, {}, head), draft.prompts)
        text, old = path.read_text(encoding="utf-8-sig"), self.prompts
        new = {name: prompt for name, prompt in draft.prompts.items() if old.get(name) != prompt}
        text = edit.changed(text, edit.container_at(text), new, without=old.keys() - draft.prompts.keys())
        return _put(path, text, draft.prompts)

    def _name(self, spelt: str) -> str:
        place = self.index.find(bare_name(spelt))
        return place.key if place else bare_name(spelt)

    def _canonical(self, data: Any) -> Any:
        return canonical(data, self.index)

    def _entries(self) -> list[dict[str, Any]]:
        named = self.settings.get(LISTED)
        data = named if isinstance(named, list) else plain_data(self.list_path) if self.list_path.is_file() else []
        if isinstance(named, str) and self.list_path.suffix not in (".json", ".json5", ".jsonc"):
            raise ConfigError(
                "tuner configure changes lists of datasets in JSON alone",
                where=self.list_path,
                remedy="keep the list in a .json file, or write new files with --output FOLDER",
            )
        if not isinstance(data, list) or not all(isinstance(each, dict) for each in data):
            raise ConfigError("a list of datasets is a list of objects", where=self.list_path)
        return data

    def _told(self) -> dict[str, Any]:
        """Answers that can be told from the settings."""
        told = {
            "family": self.settings.get("model_family"),
            "model": self.settings.get("model_flavour"),
            "base": self.settings.get("pretrained_model_name_or_path", ""),
            "card": self.settings.get("plan_card"),
            "clips": next(
                (
                    each.get("instance_data_dir", each.get("data_dir"))
                    for each in self.entries
                    if each.get("dataset_type", "video") in MEDIA and not each.get("disabled")
                ),
                None,
            ),
        }
        return {name: value for name, value in told.items() if value is not None}

    def _remembered(self, path: Path) -> dict[str, Any]:
        """Answers in the comment that was written with the file."""
        found = REMEMBERED.search(path.read_text(encoding="utf-8-sig"))
        try:
            words = json.loads(found[1]) if found else {}
        except ValueError:
            words = {}
        names = {each.name for each in fields(Answers)}
        return {name: value for name, value in words.items() if name in names}


def _words(answers: Answers) -> dict[str, Any]:
    return asdict(answers) | {"clips": str(answers.clips), "prompts": list(answers.prompts)}


def _renewed(entry: Mapping[str, Any], proposal: Proposal, changed: frozenset[str]) -> dict[str, Any]:
    """An entry with what is proposed for the answers that changed; all else is its own."""
    keys = {key for answer in changed for key in AFTER.get(answer, ())}
    new = {key: value for key, value in proposal.values.items() if key in keys}
    kept = {key: value for key, value in entry.items() if key not in keys or key in new or key not in CAPTIONS}
    if isinstance(frames := kept.get("video"), Mapping) and "video" in new:
        new["video"] = {**{key: value for key, value in frames.items() if key not in FRAMES}, **new["video"]}
    return {**kept, **new}


def _put(path: Path, text: str, expected: Any, reading: Any = lambda data: data) -> str:
    """Write ``text`` unless the file has it already; a copy of the old file stays beside it."""
    import json5

    if reading(json5.loads(text)) != json.loads(json.dumps(expected)):
        raise ConfigError(
            "the file could not be changed without changing more than that",
            where=path,
            remedy="write new files with --output FOLDER, and report this file",
        )
    if not path.exists():
        atomic_write_text(path, text)
        return f"wrote {path}"
    old = path.read_text(encoding="utf-8-sig")
    if old == text:
        return f"{path} is as it was"
    copy = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}.bak")
    number = 1
    while copy.exists():
        number += 1
        copy = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}-{number}.bak")
    atomic_write_text(copy, old)
    atomic_write_text(path, text)
    return f"changed {path}; as it was: {copy.name}"
