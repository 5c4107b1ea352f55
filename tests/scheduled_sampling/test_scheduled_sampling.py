"""Scheduled sampling: exact levels, the sampler's own steps, an honest target, and no trace when it is off."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tuner import pipeline
from tuner.assembly import assemble
from tuner.errors import ConfigError
from tuner.testing.clips import render_clip
from tuner.testing.local_log import timeless_lines
from tuner.testing.opened import opened
from tuner.train.session import Session
from tuner.train.step import _loss, make_batch
from tuner_scheduled_sampling import ScheduledSamplingConfig
from tuner_scheduled_sampling.rollout import _euler, _unipc, levels, roll_out, share
from tuner_wan.tiny import build_tiny

Settings = Callable[..., dict[str, Any]]
ROUTES = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("rollouts")
    build_tiny(home / "model", layers=4)
    for index in range(4):
        render_clip(home / "clips" / f"clip {index}.mp4", width=48, height=32, frames=5, fps=16, seed=index)
    return home


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> Settings:
    def make(**keys: Any) -> dict[str, Any]:
        video = {
            "id": "clips",
            "dataset_type": "video",
            "instance_data_dir": str(folder / "clips"),
            "caption_strategy": "filename",
            "resolution": 32,
            "video": {"num_frames": 5},
        }
        return {
            "model_family": "wan",
            "pretrained_model_name_or_path": str(folder / "model"),
            "output_dir": str(tmp_path / "output"),
            "cache_dir": str(folder / "cache"),
            "max_train_steps": 4,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "lora_rank": 2,
            "mixed_precision": "no",
            "flow_schedule_shift": 3.0,
            "data_backend_config": [video, {"id": "text", "dataset_type": "text_embeds", "default": True}],
            **keys,
        }

    return make


# --- arithmetic -------------------------------------------------------------------------------------------


@given(sigma=st.floats(0.01, 1.0), shift=st.floats(0.5, 12), offset=st.integers(0, 9), steps=st.integers(10, 100))
def test_levels_are_those_of_the_sampler_that_ends_at_sigma(
    sigma: float, shift: float, offset: int, steps: int
) -> None:
    """Evenly spaced before the shift, in float64: by hand with the inverse of the shift's formula."""
    path = levels(sigma, offset, steps, shift)
    assert len(path) == offset + 1
    assert path[-1] == sigma
    unshifted = np.array(path, np.float64) / (shift - (shift - 1) * np.array(path, np.float64))
    assert np.allclose(np.diff(unshifted), -1 / steps, atol=1e-9)


def test_the_share_ramps_up_from_zero() -> None:
    ramp = {
        "scheduled_sampling_start_step": 10,
        "scheduled_sampling_ramp_steps": 20,
        "scheduled_sampling_prob_end": 0.8,
    }
    linear = ScheduledSamplingConfig(**ramp)
    assert [share(linear, step) for step in (0, 9, 10, 20, 30, 99)] == pytest.approx([0, 0, 0, 0.4, 0.8, 0.8])
    cosine = ScheduledSamplingConfig(**ramp, scheduled_sampling_ramp_shape="cosine")
    quarter = 0.8 * (1 - np.cos(np.pi / 4)) / 2
    assert [share(cosine, step) for step in (10, 15, 20, 30)] == pytest.approx([0, quarter, 0.4, 0.8])
    assert share(ScheduledSamplingConfig(scheduled_sampling_probability=0.3), 0) == 0.3


def test_euler_is_the_formula_in_float64() -> None:
    path = levels(0.3, 4, 20, 3.0)
    step = _euler(path)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, 2, 3, generator=generator, dtype=torch.float64)
    by_hand = state.clone()
    for index, left in enumerate(range(4, 0, -1)):
        velocity = torch.sin(state * (index + 1))
        by_hand = by_hand + (path[index + 1] - path[index]) * torch.sin(by_hand * (index + 1))
        state = step(velocity, state, left)
    assert torch.allclose(state, by_hand, atol=1e-12)


@pytest.mark.parametrize("taken", [1, 2, 4])
def test_unipc_is_diffusers_own_on_the_same_levels(taken: int) -> None:
    """A schedule of diffusers' own, driven by diffusers: our path is its first levels."""
    reference = UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    reference.set_timesteps(8)
    path = reference.sigmas[: taken + 1].double().tolist()
    step = _unipc(path)
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(1, 4, 2, 3, 3, generator=generator)
    for index, left in enumerate(range(taken, 0, -1)):
        ours = step(torch.cos(ours), ours, left)
        theirs = reference.step(torch.cos(theirs), reference.timesteps[index], theirs, return_dict=False)[0]
    assert torch.allclose(ours, theirs, atol=1e-6)


# --- on a tiny Wan ----------------------------------------------------------------------------------------


def rolled(session: Session, **keys: Any) -> tuple[Any, Any, int]:
    """The first batch before and after a rollout, and its cost."""
    session.take_turn()
    before, after = (make_batch(session, session.loader.load(0, 0)) for _ in range(2))
    config = ScheduledSamplingConfig(**{f"scheduled_sampling_{name}": value for name, value in keys.items()})
    return before, after, roll_out(config, session.run, session.model, after)


def test_the_rollout_is_eulers_with_the_model_itself(settings: Settings) -> None:
    """Every sample by itself, step by step, against the batch; the target leads from there to the clean latents."""
    with opened(settings()) as session:
        before, after, forwards = rolled(session, max_step_offset=3, num_inference_steps=20)
        network, model = session.model.network, session.model
        assert forwards in (1, 2, 3)
        moved = 0
        for at in range(2):
            sigma = float(before.sigmas[at])
            candidates = []
            for offset in range(1, 4):
                path = levels(sigma, offset, 20, 3.0)
                state = (1 - path[0]) * before.latents + path[0] * before.noise
                with network.inference():
                    for now, then in pairwise(path):
                        times = torch.full((2,), now, dtype=torch.float32)
                        before.noisy, kept = state, before.sigmas
                        before.sigmas = times
                        state = state + (then - now) * model.predict(before)
                        before.sigmas = kept
                candidates.append(state[at])
            fits = [torch.allclose(after.noisy[at], each, atol=1e-5) for each in candidates]
            moved += sum(fits)
            assert sum(fits) == 1, "the point that was reached is one of the model's own"
            expected = (after.noisy[at].double() - after.latents[at].double()) / sigma
            assert torch.allclose(after.target[at].double(), expected, rtol=1e-4, atol=1e-4)
        assert moved == 2


def test_a_share_of_nothing_changes_nothing(settings: Settings) -> None:
    with opened(settings()) as session:
        before, after, forwards = rolled(session, max_step_offset=3, probability=0.0)
        assert forwards == 0
        assert torch.equal(before.noisy, after.noisy)
        assert torch.equal(before.target, after.target)


def test_levels_above_an_experts_own_are_not_asked_of_it(settings: Settings) -> None:
    from dataclasses import replace

    with opened(settings(flow_custom_timesteps=[870])) as session:
        network = session.model.network
        network.spec = replace(network.spec, sigma_range=(0.0, 0.875))
        seen: list[float] = []
        predict = session.model.predict
        session.model.predict = lambda batch: seen.extend(batch.sigmas.tolist()) or predict(batch)  # type: ignore[method-assign]
        rolled(session, max_step_offset=9, num_inference_steps=500)
        assert seen
        assert max(seen) <= 0.875


def lines(output: Path) -> list[dict[str, Any]]:
    return timeless_lines(output)


def trained(config: dict[str, Any], **more: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    pipeline.run(assemble({**config, **more}))
    output = Path(config["output_dir"] if "output_dir" not in more else more["output_dir"])
    return load_file(output / "checkpoint-4" / "adapter.transformer.safetensors"), lines(output)


def test_off_leaves_no_trace_and_on_is_resumed_bit_equal(settings: Settings, tmp_path: Path) -> None:
    plain, plain_log = trained(settings(), output_dir=str(tmp_path / "plain"))
    off, off_log = trained(settings(scheduled_sampling_max_step_offset=0), output_dir=str(tmp_path / "off"))
    assert plain.keys() == off.keys()
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    assert plain_log == off_log

    on = settings(scheduled_sampling_max_step_offset=2, scheduled_sampling_sampler="unipc", tread_config=ROUTES)
    whole, whole_log = trained(on, output_dir=str(tmp_path / "whole"))
    assert any(not torch.equal(plain[name], whole[name]) for name in plain)
    assert all(1 <= line["scheduled_sampling/forwards"] <= 2 for line in whole_log)
    pipeline.run(assemble({**on, "output_dir": str(tmp_path / "parts"), "max_train_steps": 2}))
    parts, parts_log = trained(on, output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole_log == parts_log


def test_the_rollout_takes_no_route_and_keeps_the_mode(settings: Settings) -> None:
    with opened(settings(tread_config=ROUTES, scheduled_sampling_max_step_offset=2)) as session:
        session.take_turn()
        asked: list[bool] = []
        context = session.context

        def counted(batch: Any) -> Any:
            made = context(batch)
            router = made.router
            from dataclasses import replace

            return replace(made, router=lambda request: asked.append(True) or router(request))  # type: ignore[misc]

        session.context = counted  # type: ignore[method-assign]
        session.model.network.module.train()
        loss = _loss(session, make_batch(session, session.loader.load(0, 0)), 0)
        assert len(asked) == 1, "the training forward alone is routed"
        assert session.model.network.module.training
        assert loss.per_sample.requires_grad


def test_a_ramps_end_without_a_ramp_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="there is no ramp"):
        assemble(settings(scheduled_sampling_max_step_offset=1, scheduled_sampling_prob_end=0.5))
