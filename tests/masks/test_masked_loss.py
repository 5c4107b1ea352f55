"""What a mask does to the loss: a weighted mean, and nothing at all where it is 1 or absent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tuner import flow
from tuner.config.keys import CoreConfig
from tuner.model import Batch
from tuner.testing.opened import opened
from tuner.train.step import make_batch, train_step


def batch_of(target: Tensor, mask: Tensor | None = None) -> Batch:
    empty = torch.zeros(len(target))
    names = tuple(f"s{index}" for index in range(len(target)))
    positions = tuple(range(len(target)))
    return Batch(target, {}, {}, names, positions, empty, target, target, target, mask=mask)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """A prediction and its target, (2, 4, 3, 5, 6)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 3, 5, 6, generator=generator), torch.randn(2, 4, 3, 5, 6, generator=generator)


@pytest.mark.parametrize("kind", ["l2", "huber", "smooth_l1"])
def test_it_is_the_weighted_mean(pair: tuple[Tensor, Tensor], kind: str) -> None:
    prediction, target = pair
    mask = torch.rand(2, 1, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    found = flow.loss(CoreConfig(loss_type=kind, huber_c=0.1), prediction, batch_of(target, mask)).per_sample
    difference = prediction.double().numpy() - target.double().numpy()
    root = np.sqrt(difference**2 + 0.01) - 0.1
    distance = {"l2": difference**2, "huber": 0.2 * root, "smooth_l1": 2 * root}[kind]
    weights = np.broadcast_to(mask.double().numpy(), distance.shape)
    expected = (weights * distance).sum((1, 2, 3, 4)) / weights.sum((1, 2, 3, 4))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_a_mask_of_ones_changes_no_bit(pair: tuple[Tensor, Tensor]) -> None:
    prediction, target = pair
    losses = [
        flow.loss(CoreConfig(), prediction, batch_of(target, mask)).per_sample
        for mask in (None, torch.ones(2, 1, 3, 5, 6))
    ]
    assert torch.equal(*losses)


def test_nothing_is_learnt_where_the_mask_is_black(pair: tuple[Tensor, Tensor]) -> None:
    prediction, target = pair
    mask = torch.ones(2, 1, 3, 5, 6)
    mask[..., :3] = 0
    prediction.requires_grad_()
    flow.loss(CoreConfig(), prediction, batch_of(target, mask)).per_sample.sum().backward()
    assert prediction.grad is not None
    assert prediction.grad[..., :3].eq(0).all()
    assert prediction.grad[..., 3:].ne(0).all()


def test_the_size_of_the_mask_does_not_change_the_size_of_the_loss() -> None:
    target, prediction = torch.zeros(1, 2, 3, 4, 4), torch.ones(1, 2, 3, 4, 4)
    small = torch.zeros(1, 1, 3, 4, 4)
    small[..., 0, 0] = 0.25
    assert flow.loss(CoreConfig(), prediction, batch_of(target, small)).per_sample.tolist() == [1.0]


def test_a_step_trains_with_the_masks_of_its_clips(
    masks: Any, make_settings: Callable[..., dict[str, Any]], bright_half: Callable[..., np.ndarray]
) -> None:
    """From files to the loss: the step's own loss is the one that the masks as drawn would give."""
    masks.picture("clip 0.png", bright_half())
    masks.clip("clip 1.mkv", [255 - bright_half()] * 9)
    with opened(make_settings()) as session:
        loaded = session.loader.load(0, 0)
        left, right = torch.zeros(8, 12), torch.zeros(8, 12)
        left[:, :6] = right[:, 6:] = 1
        for drawn, name in zip(loaded.mask, loaded.sample_ids, strict=True):
            expected = left if "clip 0" in name else right
            # The resize blurs the edge, which lies between two cells, by a pixel or two.
            torch.testing.assert_close(drawn, expected.expand(1, 3, 8, 12), atol=0.1, rtol=0)
        batch = make_batch(session, loaded)
        with torch.no_grad():
            prediction = session.model.predict(batch)
        expected = flow.loss(session.run.config, prediction, batch).per_sample.mean()
        unmasked = flow.loss(session.run.config, prediction, replace(batch, mask=None)).per_sample.mean()
        result = train_step(session)
    assert result.loss == pytest.approx(float(expected), rel=1e-6)
    assert result.loss != pytest.approx(float(unmasked), rel=1e-3)


def test_samples_without_a_mask_count_everywhere(
    masks: Any, make_settings: Callable[..., dict[str, Any]], bright_half: Callable[..., np.ndarray], toy_folder: Path
) -> None:
    """In a batch that mixes both; and their loss is bit for bit the one of a batch without masks."""
    for index in range(2):
        masks.picture(f"clip {index}.png", bright_half())
    plain = {
        "id": "plain",
        "dataset_type": "video",
        "instance_data_dir": str(toy_folder / "clips"),
        "resolution": 64,
        "resolution_type": "pixel",
        "video": {"num_frames": 9},
    }
    with opened(make_settings(more=[plain])) as session:
        batches = (session.loader.load(step, 0) for step in range(20))
        loaded = next(each for each in batches if len({name.partition("/")[0] for name in each.sample_ids}) == 2)
        batch = make_batch(session, loaded)
        with torch.no_grad():
            prediction = session.model.predict(batch)
    masked = torch.tensor([name.startswith("clips") for name in loaded.sample_ids])
    assert loaded.mask is not None
    assert loaded.forced is not None
    assert loaded.mask[~masked].eq(1).all()
    assert not loaded.forced[~masked].any()
    assert loaded.forced[masked].any(1).all()
    losses = [flow.loss(CoreConfig(), prediction, each).per_sample for each in (batch, replace(batch, mask=None))]
    assert torch.equal(losses[0][~masked], losses[1][~masked])
    assert not torch.equal(losses[0][masked], losses[1][masked])
