"""`tuner configure` in a terminal, as a person goes through it; and what it wrote trains."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tuner import cli
from tuner.config.load import plain_data, raw_config
from tuner.testing.clips import render_folder
from tuner_wan.tiny import build_tiny_t2v

CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
PATIENCE = 40.0


class Person:
    """Someone at a terminal."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.parent, child = pty.openpty()
        fcntl.ioctl(self.parent, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 200, 0, 0))
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tuner", "configure", *words],
            stdin=child,
            stdout=child,
            stderr=child,
            cwd=folder,
            env={**kept, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        os.close(child)
        self.seen = ""

    def waits_for(self, text: str) -> str:
        """What came up to ``text``, which is awaited; the rest is still to be seen."""
        end = time.monotonic() + PATIENCE
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come; instead:\n{self.seen}"
            ready, _, _ = select.select([self.parent], [], [], 1.0)
            data = b""
            if ready:
                with suppress(OSError):
                    data = os.read(self.parent, 65536)
                assert data, f"it ended before {text!r}:\n{self.seen}"
            self.seen += CODES.sub("", data.decode(errors="replace")).replace("\r", "")
        before, _, self.seen = self.seen.partition(text)
        return before

    def answers(self, question: str, text: str) -> str:
        """What was shown before ``question``, which is answered."""
        shown = self.waits_for(question)
        os.write(self.parent, f"{text}\n".encode())
        return shown

    def item(self, name: str, value: str) -> str:
        """Set one item of the page at hand; what the page showed."""
        page = self.waits_for("an item's number, Enter to go back: ")
        row = re.search(rf"│ (\d+) +│ {name} +│", page)
        assert row is not None, page
        os.write(self.parent, f"{row[1]}\n".encode())
        self.answers(f"{name} [", value)
        return page

    def leaves(self) -> str:
        """The rest of what is shown, when the command has ended."""
        rest = self.seen
        while True:
            try:
                data = os.read(self.parent, 65536)
            except OSError:
                data = b""
            if not data:
                break
            rest += CODES.sub("", data.decode(errors="replace")).replace("\r", "")
        self.process.wait(timeout=PATIENCE)
        return rest

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self.parent)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model and captioned clips, and no variable that sets a key."""
    monkeypatch.chdir(tmp_path)
    for variable in ("TRAINER_EXTRA_ARGS", "WAN_FEED_FORWARD_CHUNK_SIZE", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    build_tiny_t2v(tmp_path / "model")
    render_folder(tmp_path / "clips", count=2)
    return tmp_path


@pytest.fixture
def person(workplace: Path) -> Iterator[Person]:
    someone = Person(workplace)
    yield someone
    someone.close()


def answer_all(person: Person) -> None:
    """The questions, with the mistakes that people make."""
    person.answers("teach [other]: ", "a carácter")
    assert "character, style, motion, other" in person.answers("teach [other]: ", "char")
    person.answers("trigger []: ", "ohwx")
    person.answers("clips []: ", "klips")
    assert "there is no folder 'klips'" in person.answers("clips []: ", "clips")
    shown = person.answers("model [t2v-480p-1.3b-2.1]: ", "t2v-480p-1.3b")
    assert "2 clips: 96x64" in shown
    assert "2 of 2 have captions" in shown
    assert "did you mean 't2v-480p-1.3b-2.1'?" in person.answers("model [t2v-480p-1.3b-2.1]: ", "")
    person.answers("base []: ", "model")
    person.answers("card [", "RTX 4090")


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tuner", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_a_person_goes_through_it_and_the_result_trains(
    person: Person, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_all(person)
    menu = "a page's number, s to show, w to write, q to quit [w]: "
    summary = person.answers(menu, "3")
    assert "model: t2v-480p-1.3b-2.1 from model" in summary
    assert "of 22.3 GiB" in summary
    person.item("max_train_steps", "two")
    assert "max_train_steps cannot be 'two'" in person.item("max_train_steps", "2")
    person.answers("an item's number, Enter to go back: ", "")
    person.answers(menu, "4")
    page = person.item("enable_chunked_feed_forward", "true")
    assert "Training → Memory Optimisation" in page
    assert re.search(r"│ gradient_checkpointing +│ false +│ [^│]*│ true: [^│]*, [+]\d+ % time", page)
    page = person.answers("an item's number, Enter to go back: ", "")
    assert re.search(r"enable_chunked_feed_forward +│ true ", page)
    person.answers(menu, "5")
    person.item("prompts", "a red circle | ohwx, a blue square")
    person.item("validation_num_inference_steps", "1")
    person.answers("an item's number, Enter to go back: ", "")
    person.answers(menu, "w")
    assert "wrote config/config.json" in person.leaves()
    assert person.process.returncode == 0

    written = raw_config(workplace / "config/config.json")
    assert written["max_train_steps"] == 2
    assert written["enable_chunked_feed_forward"] is True
    assert list(plain_data(workplace / "config/user_prompt_library.json").values()) == [
        "a red circle",
        "ohwx, a blue square",
    ]
    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "check") == 0
    assert call(monkeypatch, "run", "--mixed_precision", "no") == 0
    assert list((workplace / "output/clips").rglob("*lora*.safetensors"))
    rendered = {path.stem for path in (workplace / "output/clips/validation/step-2").glob("*.mp4")}
    assert rendered >= {"prompt_1", "prompt_2"}


def test_who_leaves_finds_nothing_written(person: Person, workplace: Path) -> None:
    person.waits_for("teach [other]: ")
    os.write(person.parent, b"\x04")
    assert "stopped: nothing was written" in person.leaves()
    assert person.process.returncode == 130
    assert not (workplace / "config").exists()
