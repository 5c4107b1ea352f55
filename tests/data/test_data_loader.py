"""Loading: what the plan says, collated, with captions dropped by counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tuner.builtin.datasets.prepare import prepare
from tuner.builtin.encoding.encodings import Encodings
from tuner.builtin.encoding.fill import build_cache
from tuner.builtin.epochs.plan import Plan
from tuner.config.keys import CoreConfig
from tuner.data import transfer
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
    loader.read_ahead(0, 1)
    loader.load(1, 1)
    loader.read_ahead(1, 1)
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


class LateCopies:
    """A device whose copies have landed only where someone has waited for them: before, they are NaN."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.queued: list[tuple[Tensor, Tensor]] = []
        self.held: list[int] = []
        self.inside = False
        patch.setattr(transfer, "sent", lambda given, device: tree_map_only(Tensor, self.copy, given))
        patch.setattr(torch.cuda, "Stream", lambda device: self)
        patch.setattr(torch.cuda, "stream", lambda stream: self)
        patch.setattr(torch.cuda, "current_stream", lambda device: self)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: self.held.append(id(tensor)))

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False

    def copy(self, tensor: Tensor) -> Tensor:
        assert self.inside, "a copy on the stream that computes"
        self.queued.append((torch.full_like(tensor, float("nan")), tensor))
        return self.queued[-1][0]

    def wait_stream(self, stream: LateCopies) -> None:
        for target, source in stream.queued:
            target.copy_(source)


def test_batches_are_on_the_device_before_anything_computes_with_them(
    cached: Encodings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(cached.samples, seed=1, batch_size=2)

    def draw(step: int, positions: Sequence[int], latents: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return torch.rand(len(positions), generator=generator), torch.randn(latents.shape, generator=generator)

    plain = Loader(cached, plan, seed=1)
    plain.draw = draw
    expected = [plain.load(step, 0) for step in range(3)]
    plain.close()
    late = LateCopies(monkeypatch)
    loader = Loader(cached, plan, seed=1, device=torch.device("cuda"))
    loader.draw = draw
    for step in range(3):
        loaded = loader.load(step, 0)
        for name in ("latents", "noise", "sigmas"):
            assert torch.equal(getattr(loaded, name), getattr(expected[step], name))
        assert torch.equal(loaded.text["states"], expected[step].text["states"])
        assert torch.equal(loaded.video["first_frame"], expected[step].video["first_frame"])
        received = (loaded.latents, loaded.noise, *loaded.text.values(), *loaded.video.values())
        assert {id(each) for each in received} <= {*late.held}, "memory that may be given away while it is read"
    loader.close()
    assert [each.noise is not None and each.sigmas is not None for each in expected] == [True] * 3


def test_what_goes_wrong_in_drawing_reaches_the_step(cached: Encodings) -> None:
    def draw(*_: object) -> tuple[Tensor, Tensor]:
        raise ValueError("no noise today")

    loader = Loader(cached, Plan(cached.samples, seed=1, batch_size=2), seed=1)
    loader.draw = draw
    with pytest.raises(ValueError, match="no noise today"):
        loader.load(0, 0)
    loader.close()


@pytest.mark.gpu
def test_on_a_gpu_batches_equal_those_of_the_cpu(cached: Encodings) -> None:
    plan = Plan(cached.samples, seed=1, batch_size=2)
    ours, theirs = (Loader(cached, plan, seed=1, device=torch.device(each)) for each in ("cuda", "cpu"))
    for step in range(6):
        there, here = ours.load(step, 0), theirs.load(step, 0)
        busy = torch.randn(2048, 2048, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 2048
        assert there.latents.is_cuda
        assert torch.equal(there.latents.cpu(), here.latents)
        assert torch.equal(there.text["states"].cpu(), here.text["states"])
    ours.close()
    theirs.close()
