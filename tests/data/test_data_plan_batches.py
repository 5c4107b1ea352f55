"""Batches: small buckets, token budgets, datasets that do not fill a step, many samples, many processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.builtin.datasets.decode import decode_file
from tuner.builtin.epochs.plan import Plan, check_keys, check_sizes
from tuner.config.keys import CoreConfig
from tuner.data.order import MicroBatch
from tuner.data.report import DataReport
from tuner.data.samples import Bucket, Dataset, Framing, Prepared, Sample, Schedule, View
from tuner.errors import ConfigError, DataError

LONG, WIDE, PICTURE = Bucket(17, 64, 64), Bucket(9, 48, 80), Bucket(1, 64, 64)
BUCKETS = [LONG, WIDE, PICTURE]


def tokens(bucket: Bucket) -> int:
    """As of a model that turns 4 frames after the first, and 16 x 16 pixels, into a token."""
    return ((bucket.frames - 1) // 4 + 1) * (bucket.height // 16) * (bucket.width // 16)


def sample(name: str, bucket: Bucket, dataset: str = "a") -> Sample:
    views = tuple(View(Framing(bucket.width, bucket.height, 0, 0), start) for start in range(2))
    return Sample(name, dataset, Path(name), "0", ("a", "b"), 64, 64, 9, 16.0, bucket, views, Path("cache"))


def several(**counts: int) -> list[Sample]:
    """So many samples in the buckets of these names."""
    shapes = {"long": LONG, "wide": WIDE, "picture": PICTURE}
    return [sample(f"{name}{index:02d}", shapes[name]) for name, count in counts.items() for index in range(count)]


def first_epoch(plan: Plan) -> list[MicroBatch]:
    return [micro for step in range(plan.steps_per_epoch) for micro in plan.micro_batches(step)]


samples_in_buckets = st.lists(st.sampled_from(BUCKETS), min_size=1, max_size=40).map(
    lambda buckets: [sample(f"s{index:02d}", bucket) for index, bucket in enumerate(buckets)]
)


@settings(max_examples=80)
@given(
    samples=samples_in_buckets,
    batch_size=st.integers(1, 3),
    budget=st.integers(1, 400),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_batches_keep_to_the_budget_of_tokens(
    samples: list[Sample], batch_size: int, budget: int, accumulation: int, seed: int
) -> None:
    plan = Plan(
        samples, seed=seed, batch_size=batch_size, accumulation=accumulation, batch_tokens=budget, tokens=tokens
    )
    seen: Counter[str] = Counter()
    for step in range(plan.steps_per_epoch):
        micros = plan.micro_batches(step)
        positions = list(chain.from_iterable(micro.positions for micro in micros))
        assert positions == list(range(len(positions))), "positions count through the step"
        costs = [micro.bucket.cost * len(micro.samples) for micro in micros]
        assert costs == sorted(costs, reverse=True)
        for micro in micros:
            assert {each.bucket for each in micro.samples} == {micro.bucket}
            assert len(micro.samples) == len(micro.positions) == len(micro.views) == len(micro.captions)
            assert len(micro.samples) == batch_size or len(micro.samples) * tokens(micro.bucket) <= budget
            assert (len(micro.samples) + 1) * tokens(micro.bucket) > budget, "one more would not fit"
            seen.update(each.sample_id for each in micro.samples)
    assert set(seen) == {each.sample_id for each in samples}
    fewest, most = plan.samples_per_step
    assert all(
        fewest <= sum(len(micro.samples) for micro in plan.micro_batches(step)) <= most
        for step in range(plan.steps_per_epoch)
    )


def test_a_budget_makes_larger_batches_of_pictures_and_says_so() -> None:
    plan = Plan(several(long=4, picture=20), seed=0, batch_size=1, batch_tokens=160, tokens=tokens)
    assert {micro.bucket: len(micro.samples) for micro in first_epoch(plan)} == {LONG: 2, PICTURE: 10}
    assert plan.steps_per_epoch == 4
    assert any(str(PICTURE) in note and "16 tokens a clip: batches of 10" in note for note in plan.notes)


def test_a_budget_below_one_clip_is_said_to_have_no_effect() -> None:
    plan = Plan(several(long=4, picture=4), seed=0, batch_size=1, batch_tokens=15, tokens=tokens)
    assert [note for note in plan.notes if "batch_tokens 15 has no effect" in note and "16 tokens" in note]
    assert all(len(micro.samples) == 1 for micro in first_epoch(plan))


def test_small_buckets_are_left_out_on_request_and_named() -> None:
    samples = several(long=5, wide=2, picture=3)
    plan = Plan(samples, seed=0, batch_size=3, drop_small_buckets=True)
    seen = Counter(each.sample_id for micro in first_epoch(plan) for each in micro.samples)
    assert {name for name in seen if name.startswith("wide")} == set()
    assert set(seen) == {each.sample_id for each in samples if each.bucket != WIDE}
    assert any(f"bucket {WIDE}: 2 left out" in note for note in plan.notes)
    padded = Plan(samples, seed=0, batch_size=3)
    assert {each.sample_id for micro in first_epoch(padded) for each in micro.samples} == {
        each.sample_id for each in samples
    }


def test_repeats_keep_a_small_bucket() -> None:
    plan = Plan(
        several(wide=2), {"a": Dataset("a", Schedule(repeats=1))}, seed=0, batch_size=3, drop_small_buckets=True
    )
    assert {each.sample_id for micro in first_epoch(plan) for each in micro.samples} == {"wide00", "wide01"}


def test_leaving_out_everything_is_an_error() -> None:
    with pytest.raises(DataError, match="small_buckets: drop leaves no bucket") as error:
        Plan(several(wide=2, picture=1), seed=0, batch_size=3, drop_small_buckets=True)
    assert f"{WIDE}: 2 in batches of 3" in str(error.value)
    assert "small_buckets: pad" in str(error.value)


def test_dropping_and_not_pruning_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="disable_bucket_pruning"):
        check_keys(CoreConfig(small_buckets="drop", disable_bucket_pruning=True))
    check_keys(CoreConfig(disable_bucket_pruning=True))
    check_keys(CoreConfig(small_buckets="drop"))


@settings(max_examples=50)
@given(
    samples=samples_in_buckets,
    batch_size=st.integers(1, 3),
    budget=st.none() | st.integers(1, 400),
    drop=st.booleans(),
    probability=st.sampled_from([0.4, 1.0, 1.5]),
    seed=st.integers(0, 5),
)
def test_two_processes_share_the_global_batches_of_one(
    samples: list[Sample], batch_size: int, budget: int | None, drop: bool, probability: float, seed: int
) -> None:
    def plan(accumulation: int, world: int) -> Plan:
        return Plan(
            [*samples, sample("always", LONG, "b"), *(sample(f"{i}", LONG, "b") for i in range(40))],
            {"a": Dataset("a", Schedule(probability=probability)), "b": Dataset("b", Schedule(start_epoch=1))},
            seed=seed,
            batch_size=batch_size,
            accumulation=accumulation,
            world=world,
            drop_small_buckets=drop,
            batch_tokens=budget,
            tokens=tokens,
        )

    alone, together = plan(2, 1), plan(1, 2)
    assert alone.steps_until(4) == together.steps_until(4)
    for step in range(0, alone.steps_until(4), 3):
        micros = alone.micro_batches(step)
        assert micros == together.micro_batches(step)
        ranks = [together.micro_batches(step)[rank::2] for rank in range(2)]
        assert [len(rank) for rank in ranks] == [1, 1]
        assert sorted(position for rank in ranks for micro in rank for position in micro.positions) == list(
            range(sum(len(micro.samples) for micro in micros))
        )


def prepared(counts: dict[str, int], held_out: int = 0, **repeats: int) -> Prepared:
    return Prepared(
        samples=tuple(
            sample(f"{name}/{index}", LONG, name) for name, count in counts.items() for index in range(count)
        ),
        datasets={name: Dataset(name, Schedule(repeats=repeats.get(name, 0))) for name in [*counts, "held"]},
        text_cache=Path("text"),
        report=DataReport(()),
        decode=decode_file,
        held_out=tuple(sample(f"held/{index}", LONG, "held") for index in range(held_out)),
    )


def test_all_datasets_too_small_for_a_step_are_one_error_with_the_repeats_that_do() -> None:
    core = CoreConfig(train_batch_size=2, gradient_accumulation_steps=3)
    data = prepared({"tiny": 1, "small": 5, "enough": 6, "repeated": 2}, held_out=1, repeated=2)
    with pytest.raises(DataError) as error:
        check_sizes(data, core, processes=2)
    text = str(error.value)
    assert "train_batch_size 2 x gradient_accumulation_steps 3 x 2 processes" in text
    assert "'tiny': 1 x 1 = 1, a step takes 12" in text
    assert "set repeats: 11 in dataset 'tiny'" in text
    assert "set repeats: 2 in dataset 'small'" in text
    assert "set repeats: 1 in dataset 'enough'" in text
    assert "'repeated': 2 x 3 = 6" in text
    assert "set repeats: 5 in dataset 'repeated'" in text
    assert "held" not in text, "what is never trained on fills no step"
    datasets = dict(data.datasets) | {
        name: Dataset(name, Schedule(repeats=repeats))
        for name, repeats in {"tiny": 11, "small": 2, "enough": 1, "repeated": 5}.items()
    }
    check_sizes(replace(data, datasets=datasets), core, processes=2)


@given(count=st.integers(1, 50), batch=st.integers(1, 20), accumulation=st.integers(1, 5), world=st.integers(1, 4))
def test_the_repeats_named_are_the_smallest_that_do(count: int, batch: int, accumulation: int, world: int) -> None:
    core = CoreConfig(train_batch_size=batch, gradient_accumulation_steps=accumulation)
    try:
        check_sizes(prepared({"d": count}), core, world)
    except DataError as error:
        repeats = int(str(error.remedy).split("repeats: ")[1].split()[0])
        check_sizes(prepared({"d": count}, d=repeats), core, world)
        with pytest.raises(DataError):
            check_sizes(prepared({"d": count}, d=repeats - 1), core, world)
    else:
        assert count >= batch * accumulation * world


def test_a_dataset_smaller_than_a_batch_of_the_vae_is_an_error_and_held_out_ones_count() -> None:
    core = CoreConfig(vae_batch_size=4)
    check_sizes(prepared({"a": 4}, held_out=4), core)
    with pytest.raises(DataError) as error:
        check_sizes(prepared({"a": 3}, held_out=2, a=9), core)
    text = str(error.value)
    assert "'a': 3 samples, vae_batch_size is 4" in text
    assert "'held': 2 samples" in text
    assert "set vae_batch_size: 2" in text


def test_two_hundred_thousand_samples_are_planned_once_and_looked_up() -> None:
    """Nothing is quadratic: a quadratic plan of this many would take hours."""
    template = several(long=1, wide=1, picture=1)
    samples = [replace(template[index % 3], sample_id=f"{index:06d}") for index in range(200_000)]
    plan = Plan(samples, {"a": Dataset("a", Schedule(probability=0.7))}, seed=0, batch_size=4, accumulation=2)
    seen = Counter(each.sample_id for micro in first_epoch(plan) for each in micro.samples)
    assert len(seen) == 140_000
    assert plan.micro_batches(10**9) == plan.micro_batches(10**9)
