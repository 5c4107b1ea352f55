"""Checkpoint folders: whole or absent, verified, passed over when broken, pruned only afterwards."""

from __future__ import annotations

import errno

import pytest
import torch

from tuner.errors import CheckpointError
from tuner.train import checkpoint, state


def write(output, step, content=b"weights"):
    with checkpoint.writing(checkpoint.folder(output, step), {"step": step}) as directory:
        (directory / "data.bin").write_bytes(content)


def test_a_written_checkpoint_is_found_and_verified(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 200)
    path, manifest, passed = checkpoint.find(tmp_path, "latest")
    assert (path.name, manifest["step"], passed) == ("checkpoint-200", 200, [])


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "empty-manifest"])
def test_a_damaged_one_is_passed_over_and_left_alone(tmp_path, damage):
    write(tmp_path, 10)
    write(tmp_path, 20)
    newest = tmp_path / "checkpoint-20"
    file, manifest = newest / "data.bin", newest / checkpoint.MANIFEST
    {
        "truncate": lambda: file.write_bytes(b"weig"),
        "flip": lambda: file.write_bytes(b"weightz"),
        "delete": file.unlink,
        "manifest": lambda: manifest.write_text(manifest.read_text()[:40]),
        "empty-manifest": lambda: manifest.write_text("{}"),
    }[damage]()
    path, manifest, passed = checkpoint.find(tmp_path, "latest")
    assert path.name == "checkpoint-10"
    assert len(passed) == 1
    assert "checkpoint-20" in passed[0]
    assert newest.is_dir()
    with pytest.raises(CheckpointError):
        checkpoint.find(tmp_path, str(newest))


def test_only_damaged_ones_are_an_error_not_a_fresh_start(tmp_path):
    write(tmp_path, 10)
    (tmp_path / "checkpoint-10" / "data.bin").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint"):
        checkpoint.find(tmp_path, "latest")


def test_a_folder_with_a_run_is_not_started_afresh(tmp_path):
    assert checkpoint.find(tmp_path / "new", None) is None
    assert checkpoint.find(tmp_path / "new", "latest") is None
    write(tmp_path, 10)
    with pytest.raises(CheckpointError, match="already holds a run"):
        checkpoint.find(tmp_path, None)


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path):
    write(tmp_path, 10)

    def fill():
        with checkpoint.writing(checkpoint.folder(tmp_path, 20), {"step": 20}) as directory:
            (directory / "half.bin").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="disk is full"):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_a_broken_folder_in_the_way_is_set_aside_not_removed(tmp_path):
    write(tmp_path, 20, b"broken")
    write(tmp_path, 20, b"good")
    assert (tmp_path / "checkpoint-20" / "data.bin").read_bytes() == b"good"
    assert (tmp_path / "checkpoint-20.old-1" / "data.bin").read_bytes() == b"broken"


def test_pruning_keeps_the_newest(tmp_path):
    for step in (2, 10, 30, 100):
        write(tmp_path, step)
    assert [path.name for path in checkpoint.prune(tmp_path, 2)] == ["checkpoint-2", "checkpoint-10"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-30"]
    assert checkpoint.prune(tmp_path, 0) == []


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / ".tuner-partial-checkpoint-5").mkdir()
    write(tmp_path, 10)
    checkpoint.prune(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_no_secret_reaches_a_manifest():
    kept = checkpoint.without_secrets({"hub_token": "hf_x", "WANDB_API_KEY": "y", "my_password": "z", "seed": 1})
    assert kept == {"seed": 1}
    datasets = [
        {
            "id": "d",
            "aws_access_key_id": "AKIA",
            "aws_secret_access_key": "s",
            "storage_options": {"key": "k"},
            "instance_data_dir": "https://anna:pass@host/clips?signature=x",
        }
    ]
    kept = checkpoint.without_secrets({"data_backend_config": datasets, "batch_tokens": 100, "prompt": "why? a@b"})
    assert kept == {
        "data_backend_config": [{"id": "d", "instance_data_dir": "https://host/clips"}],
        "batch_tokens": 100,
        "prompt": "why? a@b",
    }


def test_tensors_and_numbers_survive_without_pickle(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    state.write(tmp_path / "x.safetensors", state.Contents(tensors, {"step": 7, "rate": 0.1}))
    read, numbers = state.read(tmp_path / "x.safetensors")
    assert numbers == {"step": 7, "rate": 0.1}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read.values())
