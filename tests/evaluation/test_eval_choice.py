"""What is measured of held-out data: which noise levels, which samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit

from tuner import flow, rng
from tuner.config.keys import CoreConfig
from tuner.data.samples import Bucket, Framing, Sample, View
from tuner.errors import ConfigError
from tuner_evaluation.choice import check_ids, chosen

DENSITIES: list[tuple[dict[str, Any], Any, float]] = [
    ({}, lambda u: expit(stats.norm.ppf(u)), 1.0),
    ({"flow_sigmoid_scale": 2.0, "flow_schedule_shift": 3.0}, lambda u: expit(2 * stats.norm.ppf(u)), 3.0),
    ({"flow_use_uniform_schedule": True, "flow_schedule_shift": 5.0}, lambda u: u, 5.0),
    ({"flow_use_beta_schedule": True}, lambda u: stats.beta(2, 2).ppf(u), 1.0),
]


def sample(name: str, dataset: str) -> Sample:
    return Sample(
        sample_id=f"{dataset}/{name}",
        dataset_id=dataset,
        path=Path(name),
        content_hash="",
        captions=("",),
        width=64,
        height=64,
        frames=9,
        fps=16,
        bucket=Bucket(9, 64, 64),
        views=(View(Framing(64, 64, 0, 0)),),
        cache=Path(),
    )


@pytest.mark.parametrize(("keys", "inverse", "shift"), DENSITIES, ids=["logit-normal", "wide", "uniform", "beta"])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_levels_are_the_quantiles_of_the_density(keys: dict[str, Any], inverse: Any, shift: float, count: int) -> None:
    levels = flow.quantiles(CoreConfig(**keys), count, tokens=100)
    raw = [float(inverse((index + 0.5) / count)) for index in range(count)]
    expected = [shift * each / (1 + (shift - 1) * each) for each in raw]
    assert levels.dtype == torch.float32
    assert levels.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("keys", [keys for keys, _, _ in DENSITIES], ids="+".join)
@pytest.mark.parametrize("sigma_range", [(0.0, 1.0), (0.875, 1.0), (0.0, 0.875)], ids=str)
def test_as_many_draws_lie_below_a_level_as_its_quantile_says(
    keys: dict[str, Any], sigma_range: tuple[float, float]
) -> None:
    core, draws = CoreConfig(**keys), 4000 if "flow_use_beta_schedule" not in keys else 400
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([flow.draw_sigma(core, generator, 100, sigma_range) for _ in range(draws)])
    for index, level in enumerate(flow.quantiles(core, 4, 100, sigma_range)):
        share = (index + 0.5) / 4
        # Four standard errors.
        assert float((drawn < level).double().mean()) == pytest.approx(
            share, abs=4 * (share * (1 - share) / draws) ** 0.5
        )


@given(
    st.integers(1, 64),
    st.floats(0.01, 0.99),
    st.booleans(),
    st.fixed_dictionaries({"flow_schedule_shift": st.floats(0.5, 12), "flow_use_uniform_schedule": st.booleans()}),
)
def test_levels_ascend_and_stay_where_the_expert_is_trained(
    count: int, boundary: float, high: bool, keys: dict[str, Any]
) -> None:
    sigma_range = (boundary, 1.0) if high else (0.0, boundary)
    levels = flow.quantiles(CoreConfig(**keys), count, 100, sigma_range).double().tolist()
    assert len(levels) == count
    assert levels == sorted(levels)
    assert all(boundary <= each <= 1.0 if high else 0.0 <= each < boundary for each in levels)


def test_of_custom_timesteps_those_of_the_expert_are_measured() -> None:
    core = CoreConfig(flow_custom_timesteps=[900, 100, 500, 300])
    assert (1000 * flow.quantiles(core, 4, 100)).tolist() == pytest.approx([100, 300, 500, 900])
    assert (1000 * flow.quantiles(core, 2, 100)).tolist() == pytest.approx([300, 900])
    assert (1000 * flow.quantiles(core, 3, 100, (0.875, 1.0))).tolist() == pytest.approx([900, 900, 900])


def test_drawing_did_not_change_with_the_quantiles() -> None:
    """The formula that was there before, on the same numbers."""
    core = CoreConfig(flow_schedule_shift=3.0)
    for step in range(20):
        uniform = float(torch.rand((), generator=rng.generator(0, "sigma", step, 0), dtype=torch.float64))
        raw = expit(stats.norm.ppf(uniform))
        drawn = flow.draw_sigma(core, rng.generator(0, "sigma", step, 0), 100)
        assert drawn == pytest.approx(3 * raw / (1 + 2 * raw), rel=1e-9)


NAMES = st.sets(st.text("abcdefgh 0123456789", min_size=1, max_size=6), max_size=30)


@given(st.dictionaries(st.sampled_from("xyz"), NAMES, min_size=1), st.integers(1, 40))
def test_the_share_of_each_dataset_is_even(files: dict[str, set[str]], most: int) -> None:
    samples = [sample(name, dataset) for dataset, names in files.items() for name in sorted(names)]
    taken = chosen(samples, most)
    assert len(taken) == min(most, len(samples))
    assert chosen(samples[::-1], most) == taken
    counts = Counter(each.dataset_id for each in taken)
    largest = max(counts.values(), default=0)
    for dataset, names in files.items():
        assert counts[dataset] == len(names) or counts[dataset] >= largest - 1


@given(NAMES, st.text("ijkl", min_size=1, max_size=6), st.integers(1, 20))
def test_one_file_more_changes_at_most_one_sample(names: set[str], more: str, most: int) -> None:
    before = {each.sample_id for each in chosen([sample(name, "x") for name in sorted(names)], most)}
    after = {each.sample_id for each in chosen([sample(name, "x") for name in sorted({*names, more})], most)}
    assert len(before - after) <= 1
    assert after - before <= {f"x/{more}"}


def test_a_dataset_called_like_a_timestep_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'t500' would be called loss/t500"):
        check_ids([sample("a", "clips"), sample("a", "t500")])
    check_ids([sample("a", "t"), sample("a", "t50x"), sample("a", "test")])
