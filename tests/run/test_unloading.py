"""A plugin that is left out leaves no trace: not in the numbers, not in what is imported."""

from __future__ import annotations

import json
import subprocess
import sys

from typer.testing import CliRunner

from tuner.cli import app
from tuner.errors import TunerError
from tuner.testing.plugin_env import environment

ROUTES = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}
PROGRAM = """
import sys
from tuner.cli import main
for flags in {all_flags!r}:
    sys.argv[1:] = ["run", "--config", {config!r}, *flags]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
    print("imported:", *sorted(name for name in sys.modules if name.startswith("tuner_")))
"""


def test_nothing_of_it_is_imported_but_its_entry_module(job, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(job.config("left-out", max_train_steps=1, tread_config=ROUTES)))
    flags = [["--plugins", "toy"], ["--without", "tread", "--output_dir", str(job.folder / "left-out-too")]]
    program = PROGRAM.format(config=str(config), all_flags=flags)
    env = environment(job.distribution, OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("imported:")]
    assert len(found) == len(flags)
    for imported in found:
        assert [name for name in imported if name.startswith("tuner_tread")] == ["tuner_tread"]
        assert not [name for name in imported if "." in name]
    told = [line for line in done.stdout.splitlines() if "tread_config" in line and "set aside" in line]
    assert len(told) == len(flags)


def test_a_config_that_never_names_it_is_trained_bit_equal(job, state_of, steps_of):
    named = job.run("tread-named", max_train_steps=2, without=["tread"], tread_config=ROUTES)
    unnamed = job.run("tread-unnamed", max_train_steps=2)
    assert state_of(named, 2) == state_of(unnamed, 2)
    assert steps_of(named) == steps_of(unnamed)


def test_a_key_that_saves_memory_is_not_set_aside_behind_the_users_back(job, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(job.config("tread-memory", max_train_steps=1, enable_group_offload=True)))
    command = ["run", "--config", str(config), "--plugins", "toy"]
    with job.on_path():
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, TunerError)
        assert "enable_group_offload" in str(refused.exception)
        assert "--without offload" in str(refused.exception)
        agreed = CliRunner().invoke(app, [*command, "--without", "offload"])
        assert agreed.exception is None, agreed.exception
