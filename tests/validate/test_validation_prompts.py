"""Which prompts are rendered, and what their files are called."""

from __future__ import annotations

import json

import pytest

from tuner.builtin.sampling.prompts import placeholders, slug, validation_prompts
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError


@pytest.fixture
def with_library(tmp_path):
    def make(text, **keys):
        path = tmp_path / "library.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False), encoding="utf-8")
        return CoreConfig(user_prompt_library=path, **keys)

    return make


def test_the_prompt_comes_first_then_the_library_in_its_order(with_library):
    core = with_library({"zebra": "a zebra", "ape": "an ape"}, validation_prompt="一只猫坐在窗台上")
    assert [(each.nickname, each.slug, each.text) for each in validation_prompts(core)] == [
        ("validation", "validation", "一只猫坐在窗台上"),
        ("zebra", "zebra", "a zebra"),
        ("ape", "ape", "an ape"),
    ]


def test_no_prompts():
    assert validation_prompts(CoreConfig()) == ()
    assert validation_prompts(CoreConfig(validation_prompt="")) == ()


def test_comments_and_trailing_commas_are_read(with_library):
    core = with_library('{\n  // the hero\n  "hero": "a hero",\n}\n')
    assert [each.text for each in validation_prompts(core)] == ["a hero"]


@pytest.mark.parametrize(
    ("nickname", "name"),
    [
        ("anime_<token>", "anime_token"),
        ("two words", "two_words"),
        ("../../etc/passwd", "etc_passwd"),
        ("a:b*c?", "a_b_c"),
        ("猫", "猫"),
        ("con", "con_"),
        ("contact-sheet", "contact-sheet_"),
        ("x" * 300, "x" * 100),
    ],
)
def test_nicknames_become_file_names(nickname, name):
    assert slug(nickname) == name


def test_placeholders_stay_and_are_found(with_library):
    prompts = validation_prompts(with_library({"a": "a <token> and a <token>", "b": "1 < 2 > 0", "c": "<other>"}))
    assert prompts[0].text == "a <token> and a <token>"
    assert placeholders(prompts) == ("<token>", "<other>")


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ({"a b": "1", "a/b": "2"}, "'a b' and 'a/b' would both be written to 'a_b'"),
        ({"Cat": "1", "cat": "2"}, "'Cat' and 'cat' would both be written to 'cat'"),
        ({"validation": "2"}, "stands for validation_prompt"),
        ('{"a": "1", "a": "2"}', "'a' comes twice"),
        ({"???": "1"}, "has no letter or digit"),
        ({"a": 3}, "the prompt 'a' is a number, not a text"),
        ({"a": " "}, "the prompt 'a' is empty"),
        (["a prompt"], "holds a list, not nicknames with prompts"),
        ("{nothing", "malformed JSON"),
    ],
)
def test_libraries_that_cannot_be_used_are_refused(with_library, library, words):
    with pytest.raises(ConfigError) as refusal:
        validation_prompts(with_library(library, validation_prompt="a prompt"))
    assert words in str(refusal.value)
    assert "library.json" in str(refusal.value)


def test_all_wrong_prompts_are_named_together(with_library):
    with pytest.raises(ConfigError) as refusal:
        validation_prompts(with_library({"a": 3, "b": "fine", "c": None}))
    assert "'a'" in str(refusal.value)
    assert "'c'" in str(refusal.value)


def test_a_missing_library_is_named(tmp_path):
    with pytest.raises(ConfigError, match="names a file that does not exist"):
        validation_prompts(CoreConfig(user_prompt_library=tmp_path / "nowhere.json"))
