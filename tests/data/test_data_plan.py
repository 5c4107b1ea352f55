"""The order of training: complete, one bucket per batch, a pure function of seed, epoch and position."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.builtin.epochs.plan import Plan
from tuner.data.samples import Bucket, Dataset, Framing, Sample, Schedule, View


def sample(name: str, bucket: Bucket, repeats: int = 0, captions: tuple[str, ...] = ("a caption",)) -> Sample:
    """A sample of the dataset that has this many repeats."""
    view = View(Framing(bucket.width, bucket.height, 0, 0))
    return Sample(name, f"{repeats}", Path(name), "0", captions, 64, 64, 9, 16.0, bucket, (view,), Path("cache"))


DATASETS = {f"{repeats}": Dataset(f"{repeats}", Schedule(repeats=repeats)) for repeats in range(4)}


def repeats_of(each: Sample) -> int:
    return int(each.dataset_id)


BUCKETS = [Bucket(9, 48, 80), Bucket(9, 80, 48), Bucket(1, 64, 64)]
samples_of_sizes = st.lists(st.tuples(st.sampled_from(BUCKETS), st.integers(0, 3)), min_size=1, max_size=25).map(
    lambda entries: [sample(f"s{i:02d}", bucket, repeats) for i, (bucket, repeats) in enumerate(entries)]
)


def epoch(plan: Plan, number: int) -> list[list[str]]:
    """Sample ids of each micro-batch of an epoch."""
    steps = range(number * plan.steps_per_epoch, (number + 1) * plan.steps_per_epoch)
    return [[each.sample_id for each in micro.samples] for step in steps for micro in plan.micro_batches(step)]


@settings(max_examples=60, deadline=None)
@given(
    samples=samples_of_sizes,
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_every_sample_appears_as_often_as_asked_and_padding_is_all_there_is_more(
    samples: list[Sample], batch_size: int, accumulation: int, world: int, seed: int
) -> None:
    plan = Plan(samples, DATASETS, seed=seed, batch_size=batch_size, accumulation=accumulation, world=world)
    per_bucket = Counter(each.bucket for each in samples for _ in range(1 + repeats_of(each)))
    batches = sum(-(-count // batch_size) for count in per_bucket.values())
    assert plan.steps_per_epoch == -(-batches // (accumulation * world))
    seen: Counter[str] = Counter()
    for step in range(plan.steps_per_epoch):
        micros = plan.micro_batches(step)
        assert len(micros) == accumulation * world, "every step is full"
        positions = [position for micro in micros for position in micro.positions]
        assert positions == list(range(accumulation * world * batch_size))
        for micro in micros:
            assert len(micro.samples) == batch_size
            assert {each.bucket for each in micro.samples} == {micro.bucket}
            seen.update(each.sample_id for each in micro.samples)
        costs = [micro.bucket.cost for micro in micros]
        assert costs == sorted(costs, reverse=True)
    for each in samples:
        assert seen[each.sample_id] >= 1 + repeats_of(each)
    if not plan.notes:
        assert seen == Counter({each.sample_id: 1 + repeats_of(each) for each in samples})


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    samples = [sample(f"s{i}", BUCKETS[i % 2]) for i in range(20)]
    plan = Plan(samples, DATASETS, seed=1, batch_size=2)
    first, second = epoch(plan, 0), epoch(plan, 1)
    assert first != second
    assert Counter(chain(*first)) == Counter(chain(*second))
    assert epoch(plan, 0) == first, "asking for another epoch in between changes nothing"
    assert epoch(Plan(samples[::-1], seed=1, batch_size=2), 1) == second
    assert epoch(Plan(samples, DATASETS, seed=2, batch_size=2), 0) != first


def test_two_processes_see_the_global_batches_of_one_with_accumulation() -> None:
    samples = [sample(f"s{i}", BUCKETS[i % 3]) for i in range(23)]
    alone = Plan(samples, DATASETS, seed=3, batch_size=2, accumulation=2)
    together = Plan(samples, DATASETS, seed=3, batch_size=2, world=2)
    assert alone.steps_per_epoch == together.steps_per_epoch
    for step in range(2 * alone.steps_per_epoch):
        assert alone.micro_batches(step) == together.micro_batches(step)


def test_a_bucket_smaller_than_a_batch_is_padded_and_said() -> None:
    plan = Plan([sample("only", BUCKETS[0])], seed=0, batch_size=3, accumulation=2)
    assert plan.steps_per_epoch == 1
    assert epoch(plan, 0) == [["only"] * 3] * 2
    assert any("2 are shown once more" in note for note in plan.notes)
    assert any("1 is shown once more" in note for note in plan.notes)


def test_alternative_captions_take_turns() -> None:
    plan = Plan([sample("s", BUCKETS[0], repeats=1, captions=("a", "b", "c"))], DATASETS, seed=5, batch_size=1)
    captions = [plan.micro_batches(step)[0].captions[0] for step in range(6)]
    assert Counter(captions) == {"a": 2, "b": 2, "c": 2}


def test_epoch_of_counts_from_zero() -> None:
    plan = Plan([sample(f"s{i}", BUCKETS[0]) for i in range(4)], seed=0, batch_size=2)
    assert [plan.epoch_of(step) for step in range(5)] == [0, 0, 1, 1, 2]


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Plan([], DATASETS, seed=0, batch_size=1)


def test_a_step_of_a_large_dataset_is_a_lookup() -> None:
    """An epoch is ordered once: thousands of steps must not each order it again."""
    plan = Plan([sample(f"s{i}", BUCKETS[0]) for i in range(20_000)], seed=0, batch_size=2)
    ordered = plan._epoch.cache_info
    for step in range(0, plan.steps_per_epoch, 10):
        plan.micro_batches(step)
    assert ordered().misses == 1


def test_two_threads_may_ask_for_two_epochs() -> None:
    """The loader reads ahead into the next epoch while the loop is in this one."""
    samples = [sample(f"{index}.mp4", Bucket(9, 64, 64)) for index in range(6)]
    alone, shared = (Plan(samples, DATASETS, seed=0, batch_size=1) for _ in range(2))
    expected = {step: alone.micro_batches(step) for step in (0, 6)}
    steps = [0, 6] * 500
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(shared.micro_batches, steps)] == [expected[step] for step in steps]
