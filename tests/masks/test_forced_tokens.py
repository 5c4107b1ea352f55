"""Tokens under a mask are never routed around: real files, a tiny Wan, the real TREAD."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tuner.assembly import assemble
from tuner.blocks import RouteRequest, StepContext, TokenRoute
from tuner.data.loader import LoadedBatch
from tuner.pipeline import survey
from tuner.testing.opened import opened
from tuner.train.session import Session
from tuner.train.step import _loss, make_batch
from tuner_wan.tiny import build_tiny_t2v

TOKENS = 3 * 4 * 6  # latent frames, then 64 and 96 pixels in patches of 16
FORCED = {"clips/clip 0.mp4": TOKENS // 3, "clips/clip 1.mp4": TOKENS // 2}
NINE_TENTHS = {
    "routes": [
        {"selection_ratio": 0.9, "start_layer_idx": 1, "end_layer_idx": 1},
        {"selection_ratio": 0.8, "start_layer_idx": 2, "end_layer_idx": 2},
    ]
}


@pytest.fixture(scope="module")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_t2v(tmp_path_factory.mktemp("wan") / "tiny", layers=4)


@pytest.fixture
def wan_settings(
    make_settings: Callable[..., dict[str, Any]], tiny_wan: Path, toy_folder: Path, masks: Any, bright_half: Any
) -> Callable[..., dict[str, Any]]:
    """Two masked clips, one a third and one half covered, and the same two without masks: one bucket."""
    third = np.zeros((64, 96), np.uint8)
    third[:, :32] = 255
    masks.picture("clip 0.png", third)
    masks.picture("clip 1.png", bright_half())
    plain = {
        "id": "plain",
        "dataset_type": "video",
        "instance_data_dir": str(toy_folder / "clips"),
        "resolution": 64,
        "resolution_type": "pixel",
        "video": {"num_frames": 9},
        "repeats": 1,  # each dataset by itself must fill a batch
    }

    def make(**keys: Any) -> dict[str, Any]:
        values = {
            "more": [plain],
            "entry": {"repeats": 1},
            "model_family": "wan",
            "pretrained_model_name_or_path": str(tiny_wan),
        }
        return make_settings(**(values | {"tread_config": NINE_TENTHS, "train_batch_size": 4} | keys))

    return make


@pytest.fixture
def session(wan_settings: Callable[..., dict[str, Any]]) -> Iterator[Session]:
    with opened(wan_settings()) as session:
        yield session


def mixed(session: Session) -> LoadedBatch:
    """The first batch that holds both masked clips and one without; the run then stands at its step."""
    for session.run.step in range(20):
        loaded = session.loader.load(session.run.step, 0)
        if {*FORCED} < {*loaded.sample_ids}:
            return loaded
    raise AssertionError("no batch mixes them")


def routed(session: Session, context: StepContext, batch: Any) -> tuple[RouteRequest, Sequence[TokenRoute]]:
    """What the router was asked, and answered, in one training forward."""
    asked: list[tuple[RouteRequest, Sequence[TokenRoute]]] = []

    def spy(request: RouteRequest) -> Sequence[TokenRoute]:
        assert context.router is not None
        asked.append((request, context.router(request)))
        return asked[-1][1]

    session.model.network.trampoline.context = replace(context, router=spy)
    session.model.predict(batch)
    (only,) = asked
    return only


def test_every_route_keeps_every_token_under_a_mask(session: Session) -> None:
    loaded = mixed(session)
    batch = make_batch(session, loaded)
    request, routes = routed(session, session.context(batch), batch)
    expected = [FORCED.get(name, 0) for name in loaded.sample_ids]
    assert request.forced.sum(1).tolist() == expected
    assert loaded.keep_at_least == TOKENS // 2
    assert [tuple(route.keep.shape) for route in routes] == [(4, TOKENS // 2)] * 2, "K is raised to the largest count"
    for route in routes:
        for forced, keep in zip(request.forced, route.keep, strict=True):
            assert set(forced.nonzero().flatten().tolist()) <= set(keep.tolist())


def test_families_forced_tokens_stay_forced(session: Session) -> None:
    """What the network itself forces (a given first frame, say) and what a mask forces are both kept."""
    batch = make_batch(session, mixed(session))
    own = torch.zeros(4, TOKENS, dtype=torch.bool)
    own[:, -1] = True
    stack = session.model.network.stack
    embed = stack.embed
    stack.embed = lambda *args, **kwargs: replace(embed(*args, **kwargs), forced=own)  # type: ignore[method-assign]
    request, _ = routed(session, session.context(batch), batch)
    assert torch.equal(request.forced, own | batch.forced)


def test_a_white_mask_leaves_nothing_to_route(wan_settings: Callable[..., dict[str, Any]], masks: Any) -> None:
    for index in range(2):
        masks.picture(f"clip {index}.png", np.full((64, 96), 255, np.uint8))
    losses = []
    for keys in ({}, {"tread_config": None}):
        with opened(wan_settings(**keys)) as session:
            batch = make_batch(session, mixed(session))
            assert batch.keep_at_least == TOKENS
            losses.append(_loss(session, batch, 0).per_sample)
    assert torch.equal(*losses)


def test_the_number_of_processes_changes_nothing(wan_settings: Callable[..., dict[str, Any]]) -> None:
    """Each micro-batch has its own K, whichever process computes it."""
    one = {"train_batch_size": 1}

    def steps(rank: int, world: int, accumulation: int) -> dict[tuple[int, int], tuple[int, float]]:
        found = {}
        with opened(wan_settings(**one, gradient_accumulation_steps=accumulation), rank=rank, world=world) as session:
            for session.run.step in range(4):
                for slot in range(rank, 2, world):
                    batch = make_batch(session, session.loader.load(session.run.step, slot))
                    loss = _loss(session, batch, slot)
                    found[session.run.step, slot] = (batch.keep_at_least, float(loss.per_sample.item()))
        return found

    alone = steps(0, 1, 2)
    assert steps(0, 2, 1) | steps(1, 2, 1) == alone
    assert {keep for keep, _ in alone.values()} == {0, TOKENS // 3, TOKENS // 2}


def test_wan_warns_of_masked_loss_once(
    wan_settings: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        survey(assemble(wan_settings()))
        (warning,) = [record for record in caplog.records if "harmful" in record.getMessage()]
        assert "2 of 4 samples have a mask" in warning.getMessage()
        caplog.clear()
        survey(assemble(wan_settings(entry={"conditioning_data": None, "repeats": 1})))
    assert "harmful" not in caplog.text
