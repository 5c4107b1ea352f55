"""Gradient release: full fine-tuning is the same run, with one gradient in memory, and refuses what cannot be."""

from __future__ import annotations

import math

import pytest
import torch

from tuner.errors import ConfigError, TrainingError
from tuner.model import Loss
from tuner.testing.opened import opened
from tuner.train.step import train_step

FULL = {
    "model_type": "full",
    "max_grad_norm": 0,
    "learning_rate": 1e-3,
    "max_train_steps": 4,
    "caption_dropout_probability": 0.0,
}


@pytest.mark.parametrize(
    "keys",
    [{}, {"gradient_checkpointing": False}, {"max_grad_norm": 1e-3, "grad_clip_method": "value"}],
    ids=["checkpointed", "kept", "clipped by value"],
)
def test_it_is_the_run_that_it_would_be_without(job, state_of, steps_of, keys):
    name = "-".join(keys) or "plain"
    plain = job.run(f"kept-{name}", **{**FULL, **keys})
    released = job.run(f"released-{name}", **{**FULL, **keys}, gradient_release=True)
    assert state_of(released, 4) == state_of(plain, 4)
    for ours, theirs in zip(steps_of(released), steps_of(plain), strict=True):
        assert ours["loss"] == theirs["loss"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_it_resumes_exactly(job, state_of):
    keys = {**FULL, "gradient_release": True, "optimizer": "optimi-lion"}
    whole = job.run("released-whole", **keys)
    job.run("released-half", **{**keys, "max_train_steps": 2})
    resumed = job.run("released-half", **keys, resume_from_checkpoint="latest")
    assert state_of(resumed, 4) == state_of(whole, 4)


def test_one_gradient_is_in_memory_at_a_time(job, monkeypatch):
    held = []
    plain = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        held.append(sum(each.grad is not None for each in parameters))
        return plain(self, *args, **kwargs)

    with job.on_path(), opened(job.config("one", **FULL, gradient_release=True)) as session:
        parameters = list(session.trained[0].module.parameters())
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        result = train_step(session)
    assert held == [1] * len(parameters)
    assert result.grad_norm > 0
    assert all(each.grad is None for each in parameters)


def spoil(session, monkeypatch, factor):
    """Multiply the loss, whose value stays what ``factor`` makes of it."""
    hook = session.manager.hook
    plain = hook.compute_loss

    def compute_loss(**arguments):
        loss = plain(**arguments)
        return Loss(factor(loss.per_sample), loss.metrics)

    monkeypatch.setattr(hook, "compute_loss", compute_loss)


def test_a_non_finite_loss_reaches_no_weight(job, monkeypatch):
    keys = {**FULL, "gradient_release": True}
    with job.on_path(), opened(job.config("nan", **keys, nonfinite="skip")) as session:
        before = [each.detach().clone() for each in session.trained[0].module.parameters()]
        spoil(session, monkeypatch, lambda loss: loss * math.nan)
        assert train_step(session).skipped
        assert all(torch.equal(*each) for each in zip(before, session.trained[0].module.parameters(), strict=True))
    with job.on_path(), opened(job.config("nan", **keys)) as session:
        spoil(session, monkeypatch, lambda loss: loss * math.nan)
        with pytest.raises(TrainingError, match="the loss is nan"):
            train_step(session)


class Infinite(torch.autograd.Function):
    """The same value, with an infinite gradient."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def test_a_non_finite_gradient_ends_the_run_even_where_steps_may_be_skipped(job, monkeypatch):
    """It is in the weights by the time that it is known."""
    with (
        job.on_path(),
        opened(job.config("inf", **FULL, gradient_release=True, nonfinite="skip")) as session,
    ):
        spoil(session, monkeypatch, Infinite.apply)
        with pytest.raises(TrainingError, match=r"the gradient norm (nan|inf)"):
            train_step(session)


def test_weights_without_a_gradient_are_found_in_the_first_step(job, monkeypatch):
    with job.on_path(), opened(job.config("cut", **FULL, gradient_release=True)) as session:
        network = session.trained[0]
        name, parameter = next(iter(network.adapter.groups[0].parameters.items()))
        parameter.requires_grad_(False)
        with pytest.raises(TrainingError, match=r"1 of .* trained tensors") as caught:
            train_step(session)
    assert name in str(caught.value)


def test_a_backward_within_backward_is_refused(job):
    with job.on_path(), opened(job.config("twice", **FULL, gradient_release=True)) as session:
        parameter = next(session.trained[0].module.parameters())
        parameter.sum().backward()
        with pytest.raises(TrainingError, match="two gradients in one backward"):
            parameter.sum().backward()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "lora"}, "gradient_release is for model_type full"),
        ({"gradient_accumulation_steps": 2}, "released gradients cannot be added up"),
        ({"max_grad_norm": 1.0}, "set max_grad_norm: 0, or grad_clip_method: value"),
        ({"optimizer_config": {"gradient_release": True}}, "the optimizer's own way"),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, "'prodigy' looks at all gradients at once"),
        ({"enable_group_offload": True}, "stream from the host"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_any_weight_is_read(job, monkeypatch, keys, message):
    from tuner import pipeline
    from tuner.assembly import assemble

    with job.on_path(), pytest.raises(ConfigError, match=message):
        pipeline.check(assemble(job.config("refused", **{**FULL, "gradient_release": True, **keys})))
