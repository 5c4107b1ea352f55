"""Killed with SIGKILL at random moments and started again, a run ends bit-equal to an undisturbed one."""

from __future__ import annotations

import random
import time

from tuner.testing.killing import start

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


def test_killed_anywhere_the_run_ends_the_same(job, steps_of, state_of):
    finish(job, "kill-whole")
    whole, often = job.folder / "kill-whole", job.folder / "kill-often"
    killed = []
    for name, due in MOMENTS:
        process = start(config(job, "kill-often"), [str(job.distribution)])
        killed += [name] if kill_when(process, due, often) else []
    assert len(killed) >= len(MOMENTS) - 1, killed  # a very fast machine may finish before the last
    finish(job, "kill-often")
    assert state_of(often, 12) == state_of(whole, 12)
    assert steps_of(often) == steps_of(whole)
    assert not list(often.glob(".tuner-partial-*"))
