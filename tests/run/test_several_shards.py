"""Checkpoints that every process writes its part of, in runs of one and of two processes."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tuner.errors import CheckpointError
from tuner.sharded import FOLDER
from tuner.testing.killing import start_several
from tuner.train import checkpoint

KEYS = {
    "model_type": "full",
    "fsdp_enable": True,
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "use_ema": True,
    "train_batch_size": 1,
    "learning_rate": 1e-3,
    "checkpoint_step_interval": 2,
    "resume_from_checkpoint": "latest",
}


def in_two(job, output, **keys):
    """Run the config in two processes; the output folder."""
    ranks = start_several(job.config(output, **{**KEYS, **keys}), [str(job.distribution)])
    for each in ranks:
        each.join(120)
    assert [each.exitcode for each in ranks] == [0, 0]
    return job.folder / output


def alone(job, output, **keys):
    """The same global batches in one process."""
    return job.run(output, **{**KEYS, "gradient_accumulation_steps": 2, **keys})


@pytest.fixture(scope="module")
def two(job):
    """A run of two processes that nothing disturbed."""
    return in_two(job, "shards-two")


def weights(output, step=6):
    return load_file(output / f"checkpoint-{step}" / "transformer" / "diffusion_pytorch_model.safetensors")


def same_weights(output, other):
    for name, each in weights(other).items():
        # Adam divides tiny gradients by their size.
        torch.testing.assert_close(weights(output)[name], each, rtol=1e-3, atol=2e-4)


def test_every_process_writes_its_part_and_people_get_the_whole(job, two):
    saved = two / "checkpoint-6"
    files = json.loads((saved / "manifest.json").read_text())["files"]
    shards = sorted(name for name in files if name.startswith(FOLDER))
    assert [name.partition("-model")[0] for name in shards] == [f"{FOLDER}/shard-0000{rank}" for rank in (1, 2)]
    assert not load_file(saved / "adapter.transformer.safetensors"), "nothing is kept twice"
    one = load_file(saved / shards[0])
    assert {name.partition("/")[0] for name in one} == {
        "adapter.transformer.safetensors",
        "optimizer.transformer.safetensors",
        "plugin.ema.safetensors",
    }
    same_weights(alone(job, "shards-alone"), two)


def begun(job, output, source, step):
    """An output folder that holds ``source``'s checkpoint of ``step``."""
    name = f"checkpoint-{step}"
    shutil.copytree(source / name, job.folder / output / name)


def test_going_on_in_two_ends_as_if_nothing_had_happened(job, two, steps_of):
    begun(job, "shards-resumed", two, 2)
    output = in_two(job, "shards-resumed")
    assert steps_of(output) == steps_of(two)[2:]
    for folder in ("", "ema"):
        again, undisturbed = (each / "checkpoint-6" / folder / "transformer" for each in (output, two))
        for name, each in load_file(undisturbed / "diffusion_pytorch_model.safetensors").items():
            assert torch.equal(load_file(again / "diffusion_pytorch_model.safetensors")[name], each), name


def test_one_process_two_and_one_again(job, two, steps_of):
    output = alone(job, "shards-worlds", max_train_steps=2)
    in_two(job, "shards-worlds", max_train_steps=4)
    assert (output / "checkpoint-4" / FOLDER).is_dir()
    alone(job, "shards-worlds")
    assert [line["loss"] for line in steps_of(output)] == pytest.approx(
        [line["loss"] for line in steps_of(two)], rel=1e-5
    )
    same_weights(output, two)


def test_a_checkpoint_without_one_of_its_parts_is_refused(two):
    lost = next((two / "checkpoint-4" / FOLDER).glob("shard-00002-*"))
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CheckpointError, match="missing or damaged") as refusal:
        checkpoint.read_manifest(two / "checkpoint-4")
    assert lost.name in str(refusal.value)
    lost.write_bytes(content)


def test_where_one_process_cannot_write_its_part_there_is_no_checkpoint(job, two):
    """Its files may not grow beyond a few bytes, as on a full disk."""
    begun(job, "shards-full-disk", two, 2)
    ranks = start_several(job.config("shards-full-disk", **KEYS), [str(job.distribution)])
    resource.prlimit(ranks[1].pid, resource.RLIMIT_FSIZE, (2**12, resource.RLIM_INFINITY))
    for each in ranks:
        each.join(120)
    assert [each.exitcode for each in ranks] == [2, 2]
    assert [path.name for path in (job.folder / "shards-full-disk").glob("*checkpoint-*")] == ["checkpoint-2"]
