"""The container's recipe: known steps, sources that exist and are let in, a fixed base, nobody's secrets."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
KNOWN = {"FROM", "RUN", "COPY", "WORKDIR", "USER", "ENV", "VOLUME", "ENTRYPOINT", "CMD"}


def steps() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def test_every_step_is_one_that_there_is_and_the_base_is_fixed() -> None:
    found = steps()
    assert {word for word, _ in found} <= KNOWN
    word, base = found[0]
    assert word == "FROM"
    assert re.fullmatch(r"python:3\.1[123]-\S+", base)


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [source for word, rest in steps() if word == "COPY" for source in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source


def test_it_installs_with_constraints_and_does_not_run_as_root() -> None:
    found = steps()
    [install] = [rest for word, rest in found if "pip install" in rest]
    assert "-c constraints.txt" in install
    assert "[cuda]" in install
    words = [word for word, _ in found]
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert dict(found)["ENTRYPOINT"] == '["tuner"]'
