"""Killed with SIGKILL at random moments and started again, a run ends bit-equal to an undisturbed one."""

from __future__ import annotations

import random
import shutil
import time

from tuner.testing.killing import start

KILLS = 8
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


def test_killed_anywhere_the_run_ends_the_same(job, steps_of, state_of):
    finish(job, "kill-warm-up")  # the fork server imports once
    began = time.monotonic()
    finish(job, "kill-whole")
    length = time.monotonic() - began
    moments = random.Random(7)
    killed = 0
    for _ in range(KILLS):
        process = start(config(job, "kill-often"), [str(job.distribution)])
        process.join(moments.uniform(0.05, 1.0) * length)
        killed += process.is_alive()
        process.kill()
        process.join()
    assert killed >= KILLS // 2
    finish(job, "kill-often")
    whole, often = job.folder / "kill-whole", job.folder / "kill-often"
    assert state_of(often, 12) == state_of(whole, 12)
    assert steps_of(often) == steps_of(whole)
    assert not list(often.glob(".tuner-partial-*"))
    shutil.rmtree(often)
