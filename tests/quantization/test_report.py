"""The report of a quantised run: bytes, and the error of the network's output, which nothing of the run notices."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.testing.clips import render_clip
from tuner.testing.opened import opened
from tuner.train.session import Session
from tuner.train.step import make_batch, train_step
from tuner_quantization import QuantisationPlugin, report
from tuner_wan.tiny import build_tiny_t2v


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("report")
    build_tiny_t2v(home / "model", layers=5, heads=2, head_dim=64, ffn_dim=256)
    (home / "clips").mkdir()
    render_clip(home / "clips" / "one.mp4", width=64, height=64, frames=5, fps=16, seed=0)
    (home / "clips" / "one.txt").write_text("shapes", encoding="utf-8")
    return home


@contextmanager
def session_of(folder: Path, **keys: Any) -> Iterator[Session]:
    entries = [
        {
            "id": "clips",
            "type": "local",
            "instance_data_dir": str(folder / "clips"),
            "cache_dir_vae": str(folder / "cache"),
            "dataset_type": "video",
            "caption_strategy": "textfile",
            "resolution": 64,
            "resolution_type": "pixel",
            "video": {"num_frames": 5, "min_frames": 5},
        },
        {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": str(folder / "t")},
    ]
    with opened(
        {
            "model_family": "wan",
            "pretrained_model_name_or_path": str(folder / "model"),
            "output_dir": str(folder / "output"),
            "mixed_precision": "no",
            "max_train_steps": 2,
            "lora_rank": 2,
            "data_backend_config": entries,
            **keys,
        }
    ) as session:
        session.take_turn()
        yield session


def prediction(session: Session) -> torch.Tensor:
    batch = make_batch(session, session.loader.load(0, 0))
    with session.model.network.inference():
        return session.model.predict(batch)


@pytest.mark.parametrize(
    ("precision", "keys"),
    [
        ("fp8-scaled", {}),
        ("int8-quanto", {}),
        ("nf4-bnb", {}),
        ("fp8-scaled", {"enable_group_offload": True}),
        ("int8-torchao", {"enable_group_offload": True}),
    ],
    ids=str,
)
def test_the_error_is_that_of_the_two_networks_side_by_side(folder, caplog, precision, keys) -> None:
    with session_of(folder) as plain:
        exact = prediction(plain)
    with session_of(folder, base_model_precision=precision, **keys) as session, caplog.at_level(logging.INFO):
        found = prediction(session)
        train_step(session)
        layers = [each for each in session.model.network.module.modules() if "forward" in vars(each)]
    [line] = [each.getMessage() for each in caplog.records if f"in {precision}:" in each.getMessage()]
    error = float((found - exact).norm() / exact.norm())
    assert error > 0
    assert f"output differs by {100 * error:.2f} %" in line
    assert "50 layers" in line
    assert [type(each).__name__ for each in layers] == ["WanTransformer3DModel"], "every layer is as it was"


def test_a_large_error_is_a_warning(folder, caplog, monkeypatch) -> None:
    monkeypatch.setattr(report, "output_error", lambda *_: float("nan"))
    with session_of(folder, base_model_precision="nf4-bnb") as session:
        train_step(session)
    assert "nf4-bnb changes the output of transformer by nan %" in caplog.text


def test_the_run_does_not_notice_its_report(folder, monkeypatch) -> None:
    def losses() -> list[float]:
        with session_of(folder, base_model_precision="fp8-scaled", lora_dropout=0.2) as session:
            found = []
            for _ in range(2):
                found.append(train_step(session).loss)
                session.run.step += 1
            return found

    with_report = losses()
    monkeypatch.setattr(QuantisationPlugin, "_report", lambda *_: None)
    assert losses() == with_report
