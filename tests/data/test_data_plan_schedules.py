"""When datasets join and leave, the share of an epoch they have, and what an epoch and a step are then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.builtin.epochs.plan import Plan
from tuner.builtin.epochs.timeline import Span
from tuner.config.keys import CoreConfig
from tuner.data.samples import Bucket, Dataset, Framing, Sample, Schedule, View
from tuner.errors import DataError
from tuner.train import schedules

BUCKETS = [Bucket(9, 48, 80), Bucket(9, 80, 48), Bucket(1, 64, 64)]


def sample(dataset: str, index: int, bucket: Bucket = BUCKETS[0], views: int = 1, captions: int = 1) -> Sample:
    """The ``index``-th sample of ``dataset``."""
    name = f"{dataset}/{index:03d}"
    shown = tuple(View(Framing(bucket.width, bucket.height, 0, 0), start) for start in range(views))
    texts = tuple(f"{name} said {number}" for number in range(captions))
    return Sample(name, dataset, Path(name), "0", texts, 64, 64, 9, 16.0, bucket, shown, Path("cache"))


def folder(dataset: str, count: int, buckets: int = 1, **more: int) -> list[Sample]:
    return [sample(dataset, index, BUCKETS[index % buckets], **more) for index in range(count)]


def datasets(**schedules: Schedule) -> dict[str, Dataset]:
    return {name: Dataset(name, schedule) for name, schedule in schedules.items()}


def steps_of(plan: Plan, epoch: int) -> range:
    return range(plan.steps_until(epoch), plan.steps_until(epoch + 1))


def shown(plan: Plan, steps: Iterable[int]) -> Counter[str]:
    """How often each sample is shown."""
    micros = chain.from_iterable(plan.micro_batches(step) for step in steps)
    return Counter(each.sample_id for micro in micros for each in micro.samples)


def in_epoch(plan: Plan, epoch: int) -> set[str]:
    """The datasets of an epoch."""
    return {name.split("/")[0] for name in shown(plan, steps_of(plan, epoch))}


def test_half_a_dataset_is_another_half_in_every_epoch() -> None:
    plan = Plan(folder("a", 20, 2), datasets(a=Schedule(probability=0.5)), seed=0, batch_size=1)
    halves = [shown(plan, steps_of(plan, epoch)) for epoch in range(4)]
    assert all(len(half) == 10 and set(half.values()) == {1} for half in halves)
    assert set(halves[0]) | set(halves[1]) == {f"a/{index:03d}" for index in range(20)}
    assert set(halves[2]) == set(halves[0])
    buckets = Counter(int(name[-3:]) % 2 for name in halves[0])
    assert buckets == {0: 5, 1: 5}, "each part holds its share of every bucket"
    assert any("probability 0.5: 10 turns per epoch for 20 samples" in note for note in plan.notes)


def test_a_probability_of_two_is_twice_and_the_smallest_is_one_turn() -> None:
    samples = folder("twice", 5) + folder("seldom", 30)
    schedule = datasets(twice=Schedule(probability=2.0), seldom=Schedule(probability=0.001))
    plan = Plan(samples, schedule, seed=0, batch_size=1)
    epoch = shown(plan, steps_of(plan, 0))
    assert {name: count for name, count in epoch.items() if name.startswith("twice")} == {
        f"twice/{index:03d}": 2 for index in range(5)
    }
    assert sum(count for name, count in epoch.items() if name.startswith("seldom")) == 1
    assert set(shown(plan, range(plan.steps_until(30))).values()) == {1, 60}, "in 30 epochs each had its turn"


@settings(max_examples=60)
@given(
    count=st.integers(1, 30),
    buckets=st.integers(1, 3),
    probability=st.floats(0.02, 3.0),
    repeats=st.integers(0, 2),
    epochs=st.integers(1, 12),
    seed=st.integers(0, 5),
)
def test_all_samples_are_shown_equally_often(
    count: int, buckets: int, probability: float, repeats: int, epochs: int, seed: int
) -> None:
    schedule = datasets(a=Schedule(repeats=repeats, probability=probability))
    plan = Plan(folder("a", count, buckets), schedule, seed=seed, batch_size=1)
    turns = max(1, round(probability * count * (1 + repeats)))
    assert [len(steps_of(plan, epoch)) for epoch in range(epochs)] == [turns] * epochs
    total = shown(plan, range(plan.steps_until(epochs)))
    assert sum(total.values()) == turns * epochs
    times = [total[f"a/{index:03d}"] for index in range(count)]
    assert max(times) - min(times) <= 1


def appearances(plan: Plan, steps: Iterable[int]) -> dict[str, list[tuple[int, str]]]:
    """The view and the caption of each sample's appearances, in order."""
    seen: dict[str, list[tuple[int, str]]] = {}
    for micro in chain.from_iterable(plan.micro_batches(step) for step in steps):
        for each, view, caption in zip(micro.samples, micro.views, micro.captions, strict=True):
            seen.setdefault(each.sample_id, []).append((view, caption))
    return seen


@pytest.mark.parametrize("probability", [1.0, 0.5, 0.3])
def test_each_time_a_sample_is_shown_it_is_the_next_view_and_the_next_caption(probability: float) -> None:
    samples = folder("a", 10, 2, views=3, captions=4)
    plan = Plan(samples, datasets(a=Schedule(probability=probability)), seed=3, batch_size=1)
    seen = appearances(plan, range(plan.steps_until(40)))
    assert set(seen) == {each.sample_id for each in samples}
    for name, turns in seen.items():
        assert [view for view, _ in turns] == [number % 3 for number in range(len(turns))]
        first = int(turns[0][1][-1])
        assert [caption for _, caption in turns] == [f"{name} said {(first + n) % 4}" for n in range(len(turns))]


def test_with_repeats_each_one_is_another_view() -> None:
    plan = Plan(folder("a", 2, views=3), datasets(a=Schedule(repeats=1)), seed=0, batch_size=1)
    views = [sorted(view for view, _ in appearances(plan, steps_of(plan, epoch))["a/000"]) for epoch in range(3)]
    assert views == [[0, 1], [0, 2], [1, 2]]


def test_a_dataset_has_its_first_view_when_it_joins() -> None:
    schedule = datasets(late=Schedule(start_epoch=2))
    plan = Plan(folder("early", 2) + folder("late", 2, views=2), schedule, seed=0, batch_size=1)
    assert [view for view, _ in appearances(plan, range(plan.steps_until(4)))["late/000"]] == [0, 1, 0]


def test_epochs_say_when_a_dataset_joins_and_leaves() -> None:
    schedule = datasets(a=Schedule(end_epoch=3), b=Schedule(start_epoch=3), c=Schedule(start_epoch=2, end_epoch=2))
    plan = Plan(folder("a", 4) + folder("b", 6) + folder("c", 3), schedule, seed=0, batch_size=1)
    assert [in_epoch(plan, epoch) for epoch in range(5)] == [{"a"}, {"a", "c"}, {"a", "b"}, {"b"}, {"b"}]
    assert [plan.steps_until(epoch) for epoch in range(6)] == [0, 4, 11, 21, 27, 33]
    assert plan.steps_per_epoch == 4
    assert [plan.epoch_of(step) for step in (0, 3, 4, 10, 11, 20, 21, 26, 27)] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert "at first: a; 4 steps per epoch" in plan.notes
    assert "from epoch 3 (step 11) on: a, b; 10 steps per epoch" in plan.notes


def test_a_dataset_joins_after_a_step_and_the_epoch_ends_there() -> None:
    plan = Plan(
        folder("a", 10) + folder("b", 4), datasets(b=Schedule(start_step=13, end_step=20)), seed=0, batch_size=1
    )
    assert [plan.steps_until(epoch) for epoch in range(6)] == [0, 10, 13, 20, 30, 40]
    assert [in_epoch(plan, epoch) for epoch in range(5)] == [{"a"}, {"a"}, {"a", "b"}, {"a"}, {"a"}]
    assert sum(count for name, count in shown(plan, range(13)).items() if name.startswith("b")) == 0


def test_a_step_that_begins_an_epoch_cuts_none() -> None:
    plan = Plan(folder("a", 10) + folder("b", 5), datasets(b=Schedule(start_step=20)), seed=0, batch_size=1)
    assert [plan.steps_until(epoch) for epoch in range(5)] == [0, 10, 20, 35, 50]


def test_a_dataset_with_both_limits_joins_at_the_later_one() -> None:
    schedule = datasets(b=Schedule(start_step=5, start_epoch=3))
    plan = Plan(folder("a", 10) + folder("b", 2), schedule, seed=0, batch_size=1)
    assert [in_epoch(plan, epoch) for epoch in range(3)] == [{"a"}, {"a"}, {"a", "b"}]
    assert plan.steps_until(2) == 20, "step 5 changes nothing, so it ends no epoch"


limits = st.builds(
    Schedule,
    repeats=st.integers(0, 1),
    probability=st.sampled_from([0.3, 0.5, 1.0, 2.0]),
    start_epoch=st.integers(1, 4),
    end_epoch=st.none() | st.integers(4, 8),
    start_step=st.integers(0, 30),
    end_step=st.none() | st.integers(31, 70),
)


@settings(max_examples=80)
@given(
    first=limits,
    second=limits,
    counts=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8)),
    batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 2),
)
def test_every_step_holds_the_datasets_that_may_be_in_it(
    first: Schedule, second: Schedule, counts: tuple[int, int, int], batch_size: int, accumulation: int
) -> None:
    """Against the definition, step by step: the set at an epoch's first step holds for the whole of it."""
    schedule = datasets(a=first, b=second)
    samples = [each for name, count in zip("abc", counts, strict=True) for each in folder(name, count, 2)]

    def active(name: str, epoch: int, step: int) -> bool:
        own = schedule[name].schedule if name in schedule else Schedule()
        in_epochs = own.start_epoch <= epoch + 1 and (own.end_epoch is None or epoch + 1 <= own.end_epoch)
        return in_epochs and own.start_step <= step and (own.end_step is None or step < own.end_step)

    plan = Plan(samples, schedule, seed=0, batch_size=batch_size, accumulation=accumulation)
    fresh = Plan(samples, schedule, seed=0, batch_size=batch_size, accumulation=accumulation)
    for step in range(90):
        epoch = plan.epoch_of(step)
        assert plan.steps_until(epoch) <= step < plan.steps_until(epoch + 1)
        allowed = {name for name in "abc" if active(name, epoch, step)}
        micros = plan.micro_batches(step)
        assert len(micros) == accumulation
        assert {each.dataset_id for micro in micros for each in micro.samples} <= allowed
        begins = plan.steps_until(epoch)
        assert allowed == {name for name in "abc" if active(name, epoch, begins)}, "an epoch ends where the set changes"
    for step in (89, 3, 50):
        assert fresh.micro_batches(step) == plan.micro_batches(step), "a resumed run goes on the same"


def test_an_epoch_in_which_nothing_joins_is_whole() -> None:
    samples = folder("a", 7, 2) + folder("b", 3, 2)
    plan = Plan(samples, datasets(b=Schedule(start_epoch=2, end_epoch=3)), seed=1, batch_size=1)
    for epoch in range(5):
        names = {"a", "b"} if epoch in (1, 2) else {"a"}
        assert shown(plan, steps_of(plan, epoch)) == Counter(
            each.sample_id for each in samples if each.dataset_id in names
        )


def test_a_run_without_data_is_one_error_that_names_the_place_and_the_keys() -> None:
    samples = folder("a", 10) + folder("b", 10)
    with pytest.raises(DataError, match="from epoch 1 on, after 0 steps") as start:
        Plan(samples, datasets(a=Schedule(start_step=5), b=Schedule(start_epoch=2)), seed=0, batch_size=1)
    assert "'a': start_step: 5" in str(start.value)
    assert "'b': start_epoch: 2" in str(start.value)

    plan = Plan(samples, datasets(a=Schedule(end_epoch=2), b=Schedule(start_step=70)), seed=0, batch_size=1)
    assert plan.micro_batches(19)
    for past in (
        lambda: plan.micro_batches(20),
        lambda: plan.epoch_of(20),
        lambda: plan.steps_until(3),
        lambda: plan.check_until(21),
        lambda: schedules.total_steps(CoreConfig(max_train_steps=100), plan),
        lambda: schedules.total_steps(CoreConfig(num_train_epochs=3), plan),
    ):
        with pytest.raises(DataError, match="from epoch 3 on, after 20 steps") as gap:
            past()
        assert "'a': end_epoch: 2; dataset 'b': start_step: 70" in str(gap.value)
        assert "max_train_steps: 20" in str(gap.value)
    assert schedules.total_steps(CoreConfig(max_train_steps=20), plan) == 20
    assert schedules.total_steps(CoreConfig(num_train_epochs=2), plan) == 20
    assert schedules.total_steps(CoreConfig(max_train_steps=15, num_train_epochs=9), plan) == 15


def test_the_length_of_a_run_adds_up_epochs_of_different_lengths() -> None:
    plan = Plan(folder("a", 4) + folder("b", 6), datasets(b=Schedule(start_epoch=3)), seed=0, batch_size=1)
    assert schedules.total_steps(CoreConfig(num_train_epochs=4), plan) == 4 + 4 + 10 + 10
    assert schedules.total_steps(CoreConfig(num_train_epochs=4, max_train_steps=20), plan) == 20
    assert schedules.total_steps(CoreConfig(num_train_epochs=4, max_train_steps=50), plan) == 28
    assert plan.epochs_in(28) == 4
    assert plan.epochs_in(6) == 1.5


def test_what_joins_after_the_end_is_said() -> None:
    plan = Plan(folder("a", 4) + folder("b", 6), datasets(b=Schedule(start_step=100)), seed=0, batch_size=1)
    assert plan.never_shown(101) == []
    (line,) = plan.never_shown(100)
    assert "'b'" in line
    assert "100 steps" in line


def test_no_walk_through_millions_of_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step far away is found by arithmetic: the turns of few epochs are counted, those of two are listed."""
    counted: list[int] = []
    count = Span.counts

    def counting(span: Span, index: int) -> dict[Bucket, int]:
        counted.append(index)
        return count(span, index)

    monkeypatch.setattr(Span, "counts", counting)
    schedule = datasets(a=Schedule(probability=0.3), b=Schedule(start_step=1_000_000_000))
    plan = Plan(folder("a", 7, 2) + folder("b", 5), schedule, seed=0, batch_size=1)
    assert plan.steps_until(10**8) == 2 * 10**8
    assert plan.epoch_of(3 * 10**12) < 10**12
    assert plan.micro_batches(2 * 10**12) == plan.micro_batches(2 * 10**12)
    assert len(counted) < 100
