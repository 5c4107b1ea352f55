"""Killed with SIGKILL at random moments and started again, a run ends bit-equal to an undisturbed one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import pytest

from tuner.testing.killing import start
from tuner.testing.plugin_env import environment

MOMENT = random.Random(7)
KEYS = {
    "max_train_steps": 12,
    "checkpoint_step_interval": 3,
    "checkpoints_total_limit": 2,
    "resume_from_checkpoint": "latest",
    "validation_prompt": "a red square",
    "validation_step_interval": 4,
    "validation_num_inference_steps": 2,
    "validation_resolution": "64x64",
    "validation_num_video_frames": 5,
    "tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]},
    "lora_dropout": 0.1,
}


def config(job, output):
    keys = job.config(output, **KEYS)
    datasets = [dict(entry) for entry in keys["data_backend_config"]]
    # A cache of its own, so that kills fall into probing and caching too.
    datasets[0]["cache_dir_vae"] = str(job.folder / output / "vae")
    datasets[1]["cache_dir"] = str(job.folder / output / "text")
    return {**keys, "data_backend_config": datasets}


def finish(job, output):
    process = start(config(job, output), [str(job.distribution)])
    process.join(120)
    assert process.exitcode == 0


def lines(output) -> int:
    log = output / "train.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def found(output, pattern) -> int:
    return len(list(output.glob(pattern)))


MOMENTS = [
    ("at once", lambda output: True),
    ("while caching", lambda output: found(output, "vae/**/*.safetensors") >= 1),
    ("in the first steps", lambda output: lines(output) >= 1),
    ("while the first checkpoint is written", lambda output: found(output, ".tuner-partial-checkpoint-*")),
    ("while validating", lambda output: found(output, "validation/step-4*")),
    ("between checkpoints", lambda output: lines(output) >= 5),
    ("while pruning", lambda output: found(output, "checkpoint-9")),
    ("in the last steps", lambda output: lines(output) >= 10),
]


def kill_when(process, due, output, patience=60.0) -> bool:
    """SIGKILL as soon as ``due(output)`` holds, and a random moment later; whether the run was still alive."""
    end = time.monotonic() + patience
    while not due(output) and process.is_alive() and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(MOMENT.uniform(0, 0.03))
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


RANDOM = 20
"""Kills at instants that nothing chose, beside the named moments and the cold starts: 30 in all."""


@pytest.fixture(scope="module")
def whole(job):
    """The output of the run that nobody disturbed."""
    finish(job, "kill-whole")
    return job.folder / "kill-whole"


def check_same(output, whole, state_of, steps_of):
    assert state_of(output, 12) == state_of(whole, 12)
    assert steps_of(output) == steps_of(whole)
    assert not list(output.glob(".tuner-partial-*"))


def test_killed_at_every_moment_the_run_ends_the_same(job, whole, steps_of, state_of):
    often = job.folder / "kill-often"
    killed = []
    for name, due in MOMENTS:
        process = start(config(job, "kill-often"), [str(job.distribution)])
        killed += [name] if kill_when(process, due, often) else []
    assert len(killed) >= len(MOMENTS) - 1, killed  # a very fast machine may finish before the last
    finish(job, "kill-often")
    check_same(often, whole, state_of, steps_of)


def test_killed_at_random_the_run_ends_the_same(job, whole, steps_of, state_of):
    killed, rounds = 0, 0
    while killed < RANDOM:
        output = f"kill-random-{rounds}"
        rounds += 1
        alive = True
        while alive and killed < RANDOM:
            process = start(config(job, output), [str(job.distribution)])
            process.join(MOMENT.uniform(0.02, 2.0))
            alive = process.is_alive()
            process.kill()
            process.join()
            killed += alive
        finish(job, output)
        check_same(job.folder / output, whole, state_of, steps_of)


def test_killed_cold_starts_end_the_same(job, whole, steps_of, state_of, tmp_path):
    """The real command, killed twice and started again."""
    file, output = tmp_path / "config.json", job.folder / "kill-cold"
    file.write_text(json.dumps(config(job, "kill-cold")))
    command = [sys.executable, "-m", "tuner", "run", "--config", str(file)]
    env = environment(job.distribution, OMP_NUM_THREADS="1")
    for due in (lambda: found(output, "checkpoint-3"), lambda: lines(output) >= 7):
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not due() and process.poll() is None:
            time.sleep(0.002)
        assert process.poll() is None
        process.kill()
        process.wait()
    finish(job, "kill-cold")
    check_same(output, whole, state_of, steps_of)
