"""A plugin that is left out leaves no trace: not in the numbers, not in what is imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tuner.testing.plugin_env import environment

ROUTES = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}
PROGRAM = """
import sys
from tuner.cli import main
sys.argv[1:] = ["run", "--config", {config!r}, *{flags!r}]
try:
    main()
finally:
    print("imported:", *sorted(name for name in sys.modules if name.startswith("tuner_")))
"""


def run(job, tmp_path, output, flags, **keys):
    config = tmp_path / f"{output}.json"
    config.write_text(json.dumps(job.config(output, max_train_steps=2, **keys)))
    program = PROGRAM.format(config=str(config), flags=flags)
    env = environment(job.distribution, OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("flags", [["--plugins", "toy"], ["--without", "tread"]])
def test_nothing_of_it_is_imported_but_its_entry_module(job, tmp_path, state_of, flags):
    done = run(job, tmp_path, "left-out" + flags[0], flags, tread_config=ROUTES)
    assert done.returncode == 0, done.stderr
    imported = done.stdout.splitlines()[-1].split()[1:]
    assert [name for name in imported if name.startswith("tuner_tread")] == ["tuner_tread"]
    assert not [name for name in imported if "." in name]
    assert "tread_config" in done.stdout  # the line that says what was set aside
    assert "set aside" in done.stdout


def test_a_config_that_never_names_it_is_trained_bit_equal(job, tmp_path, state_of, steps_of):
    states = []
    for output, flags, keys in [
        ("named", ["--without", "tread"], {"tread_config": ROUTES}),
        ("unnamed", [], {}),
    ]:
        done = run(job, tmp_path, output, flags, **keys)
        assert done.returncode == 0, done.stderr
        states.append((state_of(job.folder / output, 2), steps_of(job.folder / output)))
    assert states[0] == states[1]


def test_a_key_that_saves_memory_is_not_set_aside_behind_the_users_back(job, tmp_path):
    done = run(job, tmp_path, "memory", ["--plugins", "toy"], enable_group_offload=True)
    assert done.returncode == 2
    assert "enable_group_offload" in done.stderr
    assert "--without offload" in done.stderr
    done = run(job, tmp_path, "memory", ["--plugins", "toy", "--without", "offload"], enable_group_offload=True)
    assert done.returncode == 0, done.stderr
