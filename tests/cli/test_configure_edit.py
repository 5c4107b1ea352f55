"""Changing a JSON file with comments: what is not named stays to the letter, whatever its owner's style."""

from __future__ import annotations

from typing import Any

import json5
import pytest

from tuner.cli.configure.edit import appended, changed, container_at, fresh, members

OWN = """// head
{
  // mine
  "--learning_rate": 1e-4, // old
  'quo\\'ted': [1, {x: "}, // no end"}], /* keep */
  "gone": true, // with it
  seed: 42 // last
}
"""


def bare(name: str) -> str:
    return name.lstrip("-")


def test_values_change_are_added_and_go_and_the_rest_stays_to_the_letter() -> None:
    new = {"learning_rate": 2e-4, "seed": 7, "object": {"a": 1}}
    text = changed(OWN, container_at(OWN), new, why={"seed": "lucky", "object": "new"}, without=["gone"], name_of=bare)
    assert (
        text
        == """// head
{
  // mine
  "--learning_rate": 0.0002,
  'quo\\'ted': [1, {x: "}, // no end"}], /* keep */
  seed: 7, // lucky
  "object": {
    "a": 1
  }, // new
}
"""
    )


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"a": 1}',
        '{"a": 1, "b": [2, {"a": 3}], "c": 4}',
        '{"a": 1,}',
        '{\n  "a": 1\n}',
        "/* { */ {a: 'x', // one\n}",
        '\ufeff{"a":[{"b":{}}],\n"c":-Infinity}',
        '{"a": "\\\\"}',
        '{"a": 1 /* , */ }',
    ],
)
@pytest.mark.parametrize("new", [{"a": 2}, {"z": [1]}, {"a": None, "z": "//", "y": {"}": 1}}])
def test_any_style_reads_back_as_expected(text: str, new: dict[str, Any]) -> None:
    at = container_at(text)
    old = json5.loads(text.removeprefix("\ufeff"))
    for why in ({}, dict.fromkeys(new, "because")):
        assert json5.loads(changed(text, at, new, why=why).removeprefix("\ufeff")) == {**old, **new}
    rest = {key: value for key, value in old.items() if key != "a"}
    assert json5.loads(changed(text, at, {}, without=["a"]).removeprefix("\ufeff")) == rest


@pytest.mark.parametrize("text", ["[]", '[{"id": "x"}]', '[\n  {"id": "x"}, // one\n]', '[\n  {"id": "x"}\n]\n'])
def test_items_are_appended_to_lists_of_any_style(text: str) -> None:
    longer = appended(text, container_at(text), fresh({"id": "y", "video": {"fps": 16}}, {"id": "why"}))
    assert json5.loads(longer) == [*json5.loads(text), {"id": "y", "video": {"fps": 16}}]
    assert "// why" in longer
    assert len(members(longer, 0)[0]) == len(json5.loads(text)) + 1
