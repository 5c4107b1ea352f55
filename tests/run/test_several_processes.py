"""One run in two processes: the same losses and weights as one process that does both shares."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tuner.testing.killing import start_several
from tuner.testing.plugin_env import environment

ROUTES = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}
KEYS = {"caption_dropout_probability": 0.5, "tread_config": ROUTES, "train_batch_size": 1, "learning_rate": 1e-3}


def in_two(job, output, **keys):
    """Run the config in two processes; their exit codes."""
    ranks = start_several(job.config(output, **KEYS, **keys), [str(job.distribution)])
    for each in ranks:
        each.join(120)
    return [each.exitcode for each in ranks]


def alone(job, output, **keys):
    """The same global batches in one process."""
    return job.run(output, **KEYS, gradient_accumulation_steps=2, **keys)


def losses(steps):
    return [line["loss"] for line in steps]


def by_level(steps):
    found = {name: value for name, value in steps[-1].items() if name.startswith("noise_levels/")}
    assert sum(value for name, value in found.items() if "/samples/" in name) == sum(line["samples"] for line in steps)
    return found


def weights(output, step):
    return load_file(output / f"checkpoint-{step}" / "adapter.transformer.safetensors")


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"model_type": "full", "tread_config": None},
        {"optimizer": "adamw_bf16"},
        {"fsdp_enable": True},
        # Not Adam, which divides tiny gradients by their size, so that their last bits show.
        {"fsdp_enable": True, "model_type": "full", "gradient_checkpointing": True, "optimizer": "sgd"},
    ],
    ids=["lora", "full", "bf16", "fsdp-lora", "fsdp-full"],
)
def test_two_train_as_one_that_does_both_shares(job, steps_of, keys, request):
    name = request.node.callspec.id
    keys = {key: value for key, value in {**KEYS, **keys}.items() if value is not None}
    one = job.run(f"several-{name}-one", **keys, gradient_accumulation_steps=2)
    ranks = start_several(job.config(f"several-{name}-two", **keys), [str(job.distribution)])
    for each in ranks:
        each.join(120)
    assert [each.exitcode for each in ranks] == [0, 0]
    two = job.folder / f"several-{name}-two"
    assert [line["step"] for line in steps_of(two)] == [1, 2, 3, 4, 5, 6]
    assert losses(steps_of(two)) == pytest.approx(losses(steps_of(one)), rel=1e-5)
    for name, each in weights(one, 6).items():
        torch.testing.assert_close(weights(two, 6)[name], each, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "keys", [{}, {"fsdp_enable": True, "model_type": "full", "use_ema": True}], ids=["lora", "fsdp-full"]
)
def test_a_run_goes_on_in_another_number_of_processes(job, steps_of, keys, request):
    name = f"worlds-{request.node.callspec.id}"
    keys = {**keys, "noise_levels_interval": 6}  # counted in one process, in two, and in one again
    whole = alone(job, f"{name}-whole", **keys)
    output = alone(job, name, max_train_steps=2, **keys)
    assert in_two(job, name, max_train_steps=4, resume_from_checkpoint="latest", **keys) == [0, 0]
    alone(job, name, resume_from_checkpoint="latest", **keys)
    assert losses(steps_of(output)) == pytest.approx(losses(steps_of(whole)), rel=1e-5)
    assert by_level(steps_of(output)) == pytest.approx(by_level(steps_of(whole)), rel=1e-5)


def test_one_that_is_told_to_stop_stops_both_with_everything_saved(job, steps_of):
    total = 400
    config = job.config("several-stopped", **KEYS, max_train_steps=total, resume_from_checkpoint="latest")
    ranks = start_several(config, [str(job.distribution)])
    log = job.folder / "several-stopped" / "train.jsonl"
    while all(each.is_alive() for each in ranks) and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.02)
    os.kill(ranks[1].pid, signal.SIGTERM)
    for each in ranks:
        each.join(60)
    assert [each.exitcode for each in ranks] == [130, 130]
    [saved] = (job.folder / "several-stopped").glob("checkpoint-*")
    done = int(saved.name.rpartition("-")[2])
    assert 2 < done < total
    assert steps_of(job.folder / "several-stopped")[-1]["step"] == done


def test_one_that_dies_does_not_leave_the_other_waiting(job):
    config = job.config("several-dead", **KEYS, max_train_steps=400, checkpoint_step_interval=2)
    ranks = start_several(config, [str(job.distribution)])
    output = job.folder / "several-dead"
    while all(each.is_alive() for each in ranks) and not (output / "checkpoint-2").exists():
        time.sleep(0.02)
    ranks[1].kill()
    ranks[0].join(60)
    assert ranks[0].exitcode not in (None, 0)
    assert (output / "checkpoint-2" / "manifest.json").exists()


def test_a_launcher_s_processes_say_once_what_is_wrong(job, tmp_path):
    """The real command under the real launcher."""
    broken = [{**entry, "instance_data_dir": "nowhere"} for entry in job.config("x")["data_backend_config"][:1]]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(job.config("several-broken", data_backend_config=broken)))
    command = [sys.executable, "-m", "tuner", "launch", "--processes", "2"]
    env = environment(job.distribution, OMP_NUM_THREADS="1")
    done = subprocess.run([*command, "--config", str(config)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("does not exist: nowhere") == 1, done.stderr
    assert "Traceback" not in done.stderr
