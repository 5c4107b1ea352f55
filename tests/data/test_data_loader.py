"""Loading: what the plan says, collated, with captions dropped by counter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.builtin.datasets.prepare import prepare
from tuner.builtin.encoding.encodings import Encodings
from tuner.builtin.encoding.fill import build_cache
from tuner.builtin.epochs.plan import Plan
from tuner.config.keys import CoreConfig
from tuner.data.loader import Loader, collate_text
from tuner.errors import DataError
from tuner.run import Run
from tuner.spec import ModelSpec


@pytest.fixture
def cached(clips: Path, make_core: Callable[..., CoreConfig], spec: ModelSpec, model: Any, hooks: Any) -> Encodings:
    core = make_core(clips)
    return build_cache(Run(core, {}), model, hooks, prepare(core, spec), show_progress=False)


def test_a_batch_holds_what_was_cached_for_its_samples(cached: Encodings) -> None:
    plan = Plan(cached.samples, seed=1, batch_size=2)
    loader = Loader(cached, plan, seed=1)
    for step in range(2 * plan.steps_per_epoch):
        (micro,) = plan.micro_batches(step)
        loaded = loader.load(step, 0)
        assert loaded.sample_ids == tuple(each.sample_id for each in micro.samples)
        assert loaded.captions == micro.captions
        assert loaded.positions == micro.positions
        for index, sample in enumerate(micro.samples):
            stored = cached.video(sample)
            assert torch.equal(loaded.latents[index], stored["latents"])
            assert torch.equal(loaded.video["first_frame"][index], stored["first_frame"])
            states = cached.text(micro.captions[index])["states"]
            assert torch.equal(loaded.text["states"][index, : len(states)], states)
            assert not loaded.text["states"][index, len(states) :].any()
        assert set(loaded.video) == {"first_frame"}
    loader.close()


def test_reading_ahead_changes_nothing(cached: Encodings) -> None:
    """Slots in any order, as ranks and resumed runs ask for them, give the same batches."""
    plan = Plan(cached.samples, seed=1, batch_size=1, accumulation=2, world=2)
    wanted = [(step, slot) for step in range(4) for slot in range(4)]

    def ids(order: list[tuple[int, int]], **ranks: int) -> dict[tuple[int, int], tuple[str, ...]]:
        loader = Loader(cached, plan, seed=1, caption_dropout=0.5, **ranks)
        loaded = {each: loader.load(*each) for each in order}
        loader.close()
        return {each: (*batch.sample_ids, *batch.captions) for each, batch in loaded.items()}

    alone = ids(wanted)
    assert ids(wanted[::-1]) == alone
    first = ids([each for each in wanted if each[1] % 2 == 0], rank=0, world=2)
    second = ids([each for each in wanted if each[1] % 2 == 1], rank=1, world=2)
    assert first | second == alone


def test_the_next_batch_is_read_before_it_is_asked_for(cached: Encodings, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(cached.samples, seed=1, batch_size=1, world=2)
    loader = Loader(cached, plan, rank=1, world=2, seed=1)
    asked: list[tuple[int, int]] = []
    read = Loader._read
    monkeypatch.setattr(Loader, "_read", lambda self, *wanted: asked.append(wanted) or read(self, *wanted))
    loader.load(0, 1)
    loader.load(1, 1)
    assert loader._ahead is not None
    loader._ahead[1].result()
    loader.close()
    assert asked == [(0, 1), (1, 1), (2, 1)], "each once, and one ahead"


def test_captions_are_dropped_by_step_and_position(cached: Encodings) -> None:
    plan = Plan(cached.samples, seed=1, batch_size=2)
    captions = {}
    for dropout in (0.0, 0.3, 1.0):
        loader = Loader(cached, plan, seed=7, caption_dropout=dropout)
        captions[dropout] = [caption for step in range(200) for caption in loader.load(step, 0).captions]
        loader.close()
    assert "" not in captions[0.0]
    assert set(captions[1.0]) == {""}
    share = captions[0.3].count("") / 400
    assert 0.2 < share < 0.4
    kept = [pair for pair in zip(captions[0.0], captions[0.3], strict=True) if pair[1]]
    assert all(without == with_ for without, with_ in kept), "a caption that stays is the plan's"


def test_a_datasets_own_dropout_stands_above_the_runs(
    cached: Encodings, clips: Path, make_core: Callable[..., CoreConfig], spec: ModelSpec, model: Any, hooks: Any
) -> None:
    plan = Plan(cached.samples, seed=1, batch_size=2)

    def captions(own: float | None, run: float) -> set[str]:
        core = make_core(clips, caption_dropout_probability=own)
        with_own = build_cache(Run(core, {}), model, hooks, prepare(core, spec), show_progress=False)
        loader = Loader(with_own, plan, seed=7, caption_dropout=run)
        found = {caption for step in range(20) for caption in loader.load(step, 0).captions}
        loader.close()
        return found

    assert captions(1.0, 0.0) == {""}
    assert "" not in captions(0.0, 1.0)
    assert captions(None, 1.0) == {""}


def test_without_masks_a_batch_has_none(cached: Encodings) -> None:
    loader = Loader(cached, Plan(cached.samples, seed=1, batch_size=2), seed=1)
    loaded = loader.load(0, 0)
    loader.close()
    assert (loaded.mask, loaded.forced, loaded.keep_at_least) == (None, None, 0)
    assert loaded.regularisation == (False, False)


def test_a_dropped_caption_is_the_encoding_of_the_empty_one(cached: Encodings) -> None:
    plan = Plan(cached.samples, seed=1, batch_size=1)
    loader = Loader(cached, plan, seed=1, caption_dropout=1.0)
    assert torch.equal(loader.load(0, 0).text["states"][0], cached.text("")["states"])
    loader.close()


def test_an_entry_damaged_since_the_start_is_an_error(cached: Encodings) -> None:
    for file in cached.prepared.samples[0].cache.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    loader = Loader(cached, Plan(cached.samples, seed=1, batch_size=1), seed=1)
    with pytest.raises(DataError, match=r"damaged(.|\n)*start again"):
        loader.load(0, 0)
    loader.close()


def test_text_of_unequal_length_and_scalars_are_collated() -> None:
    long, short = torch.ones(5, 3), torch.ones(2, 3)
    collated = collate_text([{"states": long, "n": torch.tensor(5)}, {"states": short, "n": torch.tensor(2)}])
    assert collated["states"].shape == (2, 5, 3)
    assert collated["states"].sum() == 21
    assert collated["n"].tolist() == [5, 2]
