"""A checkpoint holds the step it is of, however slowly it is copied while the next step is computed."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner.errors import CheckpointError
from tuner.testing.clips import render_clip
from tuner.testing.opened import opened
from tuner.testing.project import flat_config
from tuner.train import state
from tuner.train.saving import Saving
from tuner.train.session import Session
from tuner.train.step import train_step
from tuner_wan.tiny import build_tiny_t2v

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"learning_rate": 1e-2},
    "average": {"learning_rate": 1e-2, "use_ema": True},
    "full": {"learning_rate": 1e-2, "model_type": "full"},
    "gradient release": {"learning_rate": 1e-2, "model_type": "full", "gradient_release": True, "max_grad_norm": 0},
}

MEASURED = {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.0, "samples": 1, "seconds": 0.1, "stages": {}}


@pytest.fixture
def folder(tmp_path):
    build_tiny_t2v(tmp_path / "model", layers=2, heads=1)
    render_clip(tmp_path / "clips" / "a red square.mp4", width=64, height=64, frames=9, fps=16, seed=1)
    return tmp_path


@pytest.fixture
def slow(monkeypatch):
    """Copies take their time, so that a step which did not wait for them would be seen in the checkpoint."""
    copied = state._copied

    def later(tensor: Tensor, into: Tensor | None) -> Tensor:
        time.sleep(0.002)
        return copied(tensor, into)

    monkeypatch.setattr(state, "_copied", later)


def now(session: Session) -> dict[str, dict[str, Tensor]]:
    """What a resume needs, as it is now."""
    return {
        name: {key: each.detach().clone() for key, each in contents.tensors.items()}
        for name, contents in session.contents().items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_step_changes_nothing_that_is_being_saved(folder, slow, kind):
    with opened(flat_config(folder, family="wan", max_train_steps=20, **KINDS[kind])) as session:
        session.manager.hook.on_train_start(run=session.run, model=session.model)
        saving = Saving(session)
        for _ in range(2):  # the second is copied over the first
            step(session)
            before = now(session)
            path = saving.start()
            step(session)
            saving.finish()
            after = now(session)
            for name, tensors in before.items():
                saved, _ = state.read(path / name)
                assert saved.keys() == tensors.keys()
                assert all(torch.equal(saved[key], each) for key, each in tensors.items()), name
                assert any(not torch.equal(after[name][key], each) for key, each in tensors.items()), name


def step(session: Session) -> None:
    train_step(session)
    session.run.step += 1
    session.manager.notify("on_step_end", run=session.run, model=session.model, metrics=MEASURED)


@pytest.mark.parametrize("kind", ["standard", "lycoris"])
def test_files_for_other_programs_are_of_that_step_too(folder, kind):
    """Written when the weights have changed, they are what they were."""
    keys = {"lora_type": kind, **KINDS["LoRA"]}
    if kind == "lycoris":
        settings = folder / "lycoris.json"
        settings.write_text(json.dumps({"algo": "lora", "linear_dim": 4, "linear_alpha": 4}))
        keys["lycoris_config"] = str(settings)
    with opened(flat_config(folder, family="wan", max_train_steps=20, **keys)) as session:
        step(session)
        files = []
        for name in ("at once", "later", "changed"):
            (folder / name).mkdir()
            writes = session.export_into(folder / name)
            if name == "later":
                step(session)
                session.run.step -= 1  # the metadata says which step it was
            for write in writes:
                write()
            files.append((folder / name / "pytorch_lora_weights.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_copies_that_fail_do_not_keep_the_step_waiting(folder, monkeypatch):
    copied = state._copied

    def full(tensor: Tensor, into: Tensor | None) -> Tensor:
        if threading.current_thread() is threading.main_thread():
            return copied(tensor, into)
        raise MemoryError("no room")

    with opened(flat_config(folder, family="wan", max_train_steps=20, **KINDS["LoRA"])) as session:
        saving = Saving(session)
        step(session)
        monkeypatch.setattr(state, "_copied", full)
        path = saving.start()
        step(session)
        with pytest.raises(MemoryError, match="no room"):
            saving.finish()
        assert not path.exists()
        assert not list(session.run.output_dir.glob("*checkpoint*"))
        monkeypatch.undo()
        assert saving.start().name == "checkpoint-2"
        saving.finish()


def test_older_checkpoints_go_when_the_new_one_is_there(folder, caplog):
    with opened(flat_config(folder, family="wan", max_train_steps=20, checkpoints_total_limit=1)) as session:
        caplog.set_level("INFO", logger="tuner")
        saving = Saving(session)
        for _ in range(3):
            step(session)
            path = saving.start()
        saving.finish()
        assert [each.name for each in session.run.output_dir.glob("checkpoint-*")] == [path.name] == ["checkpoint-3"]
        assert "checkpoint-2 (checkpoints_total_limit 1)" in caplog.text


def test_without_room_for_copies_training_waits(folder, monkeypatch):
    def never(tensor: Tensor, into: Tensor | None) -> Tensor:
        raise AssertionError("copied")

    monkeypatch.setattr("tuner.train.saving.ROOM", 2**60)
    monkeypatch.setattr(state, "_copied", never)
    with opened(flat_config(folder, family="wan", max_train_steps=20)) as session:
        step(session)
        path = Saving(session).start()
        assert (path / "manifest.json").exists()
        assert session.copied.is_set()


def test_a_full_disk_is_said_at_the_next_look(folder, monkeypatch):
    def full(path: Any, contents: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "write", full)
    with opened(flat_config(folder, family="wan", max_train_steps=20)) as session:
        saving = Saving(session)
        step(session)
        saving.start()
        with pytest.raises(CheckpointError, match="disk is full"):
            saving.finish()
