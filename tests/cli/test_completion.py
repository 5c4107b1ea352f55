"""Completion by the shells' own protocol, and how commands end when they are interrupted or nobody reads on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = "from tuner.cli import main; main()"


def offered(*words: str) -> list[str]:
    """What bash is offered for the last of ``words``."""
    line = {"_TUNER_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    code = f"import sys; sys.argv = ['tuner']; {PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | line, capture_output=True, text=True, check=False
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("tuner", "conf"), ["configure", "config"]),
        (("tuner", "plugins", "che"), ["check"]),
        (("tuner", "run", "--plugins", "wan,tre"), ["wan,tread"]),
        (("tuner", "plugins", "show", "scheduled"), ["scheduled_sampling"]),
        (("tuner", "run", "--learning"), ["--learning_rate"]),
    ],
)
def test_commands_plugins_and_keys_are_completed(words: tuple[str, ...], expected: list[str]) -> None:
    assert offered(*words) == expected


def test_completion_imports_no_torch() -> None:
    code = (
        "import sys\nfrom tuner.cli.completion import plugin_names, _flags\n"
        "assert 'wan' in plugin_names('') and '--lora_rank' in set(_flags())\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_nobody_reads_on() -> None:
    """As with `tuner config schema | head -1`."""
    command = [sys.executable, "-m", "tuner", "config", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "{\n"
        process.stdout.close()
        assert process.stderr.read() == ""


def test_ctrl_c_is_no_traceback() -> None:
    code = (
        "import sys, time\nfrom tuner.cli import main, doctor\n"
        "doctor.asked = lambda group: (print('begun', flush=True), time.sleep(60))\n"
        "sys.argv = ['tuner', 'doctor']\nmain()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in told
