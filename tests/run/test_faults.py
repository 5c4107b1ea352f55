"""What may go wrong in a run: nothing half written is taken for whole, nothing trains on nonsense."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tuner.errors import CheckpointError, TrainingError
from tuner.testing.plugin_env import environment, importable, write_distribution

POISON = '''
from tuner import Plugin, hookimpl

class Poison(Plugin):
    """Makes one step's loss NaN."""
    provides = frozenset({"poison"})

    @hookimpl(wrapper=True)
    def compute_loss(self, run):
        import dataclasses
        loss = yield
        return dataclasses.replace(loss, per_sample=loss.per_sample * float("nan")) if run.step == 2 else loss
'''
CUT = '''
from tuner import Plugin, hookimpl

class Cut(Plugin):
    """Cuts the gradient of every attention input, as a kernel without a backward does."""

    @hookimpl
    def model_transforms(self, model):
        from tuner.model import Stage, Transform

        def apply(network):
            for name, module in network.module.named_modules():
                if name.endswith(("to_q", "to_k")):
                    module.register_forward_hook(lambda _module, _inputs, output: output.detach())

        return [Transform(Stage.REWRITE, "cut", frozenset({"attention"}), apply)]
'''


@pytest.fixture
def extra(tmp_path):
    """A distribution with a faulty plugin on the path."""

    def write(name: str, cls: str, source: str):
        folder = write_distribution(
            tmp_path / name, f"tuner-{name}", {name: f"{name}_module:{cls}"}, modules={f"{name}_module": source}
        )
        return importable(folder)

    return write


def test_a_nonfinite_step_stops_the_run_and_names_its_samples(job, extra):
    with extra("poison", "Poison", POISON), pytest.raises(TrainingError) as caught:
        job.run("nan-stop", plugins=["toy", "poison"], checkpoint_step_interval=1)
    assert "step 3" in str(caught.value)
    assert "clips/clip" in str(caught.value)
    output = job.folder / "nan-stop"
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    saved = load_file(output / "checkpoint-2" / "adapter.transformer.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_a_nonfinite_step_can_be_skipped(job, extra, steps_of):
    with extra("poison", "Poison", POISON):
        output = job.run("nan-skip", plugins=["toy", "poison"], nonfinite="skip")
    assert [line.get("skipped", False) for line in steps_of(output)] == [False, False, True, False, False, False]
    saved = load_file(output / "checkpoint-6" / "adapter.transformer.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_parameters_without_gradient_end_the_run_at_its_first_step(job, extra):
    with extra("cut", "Cut", CUT), pytest.raises(TrainingError, match=r"got no gradient.*\n.*to_[qk]"):
        job.run("cut", plugins=["toy", "cut"])
    assert not list((job.folder / "cut").glob("checkpoint-*"))


def test_two_runs_do_not_share_an_output_folder(job):
    output = job.folder / "locked"
    output.mkdir()
    with (output / ".tuner-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another run"):
            job.run("locked")
    job.run("locked", max_train_steps=1)


def test_an_output_folder_that_cannot_be_made_is_one_error(job):
    (job.folder / "no-folder").write_text("a file stands where a folder must be")
    with pytest.raises(CheckpointError, match="the output folder cannot be written"):
        job.run("no-folder/inside")


def test_a_full_disk_while_saving_loses_nothing(job, monkeypatch, state_of):
    from tuner.train import state

    whole = job.run("disk-whole")
    job.run("disk", max_train_steps=3)

    def full(path, contents):
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state, "write", full)
        with pytest.raises(CheckpointError, match="disk is full"):
            job.run("disk", resume_from_checkpoint="latest")
    output = job.folder / "disk"
    assert [path.name for path in output.glob("*checkpoint*")] == ["checkpoint-3"]
    job.run("disk", resume_from_checkpoint="latest")
    assert state_of(output, 6) == state_of(whole, 6)


def test_a_damaged_newest_checkpoint_is_passed_over(job, state_of, steps_of, caplog):
    whole = job.run("damage-whole")
    output = job.run("damage", max_train_steps=4, checkpoint_step_interval=2)
    file = output / "checkpoint-4" / "adapter.transformer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    job.run("damage", resume_from_checkpoint="latest")
    assert "checkpoint-4" in caplog.text
    assert state_of(output, 6) == state_of(whole, 6)
    assert steps_of(output) == steps_of(whole)


def test_an_interrupted_run_saves_and_goes_on_bit_equal(job, state_of, steps_of, tmp_path):
    """SIGTERM to the real command: it finishes the step, saves, and says how to go on."""
    keys = {"max_train_steps": 400, "resume_from_checkpoint": "latest"}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(job.config("stopped", **keys)))
    command = [sys.executable, "-m", "tuner", "run", "--config", str(config)]
    env = environment(job.distribution, OMP_NUM_THREADS="1")
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = job.folder / "stopped" / "train.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "resume_from_checkpoint: latest" in err
    assert "Traceback" not in err
    done = int(next((job.folder / "stopped").glob("checkpoint-*")).name.rpartition("-")[2])
    assert 3 < done < 400
    total = done + 3
    whole = job.run("stopped-whole", max_train_steps=total, resume_from_checkpoint="latest")
    again = job.run("stopped", max_train_steps=total, resume_from_checkpoint="latest")
    assert state_of(again, total) == state_of(whole, total)
    assert steps_of(again) == steps_of(whole)
