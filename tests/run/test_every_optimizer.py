"""Every optimizer in a real run: warm-up, a curve, steps of the training loop, and a checkpoint in between."""

from __future__ import annotations

import pytest
import torch

from tuner.builtin.optimizers import OptimizersPlugin
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.run import Run
from tuner.testing.opened import opened
from tuner.train import optimizers, state
from tuner.train.step import train_step

OFFERED = OptimizersPlugin("optimizers", OptimizersPlugin.Config()).optimizers(Run(CoreConfig(), {}))
# Each class once; what is paged on CUDA is the same as its plain sibling here.
NAMES = sorted({(each.module, each.cls): name for name, each in OFFERED.items() if "paged" not in name}.values())


@pytest.fixture(autouse=True)
def uncompiled():
    """torchao compiles its steps, which takes half a minute: here they run as they are written."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def session(job):
    with job.on_path(), opened(job.config("every", lr_scheduler="cosine", lr_warmup_steps=2, max_train_steps=8)) as one:
        yield one


def weights(network):
    return {name: each.clone() for name, each in network.adapter.state().items()}


def train(session, start, stop):
    for session.run.step in range(start, stop):
        train_step(session)
    return weights(session.trained[0])


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_a_checkpoint_in_between_changes_nothing(session, tmp_path, name):
    network = session.trained[0]
    begin = weights(network)
    run = session.run
    run.config = run.config.model_copy(update={"optimizer": name, "learning_rate": 0.01})

    def fresh(state_of_weights):
        network.adapter.load(state_of_weights)
        session.optimizers[network.name] = optimizers.make(run, network.adapter.groups, session.engine.device)

    fresh(begin)
    try:
        half = train(session, 0, 3)
        rates = [float(group["lr"]) for group in session.optimizers[network.name].param_groups]
        assert rates == pytest.approx([session.learning_rate(network.name)] * len(rates))
        state.write_all(tmp_path, state.of_network(network, session.optimizers[network.name]))
        whole = train(session, 3, 4)
        fresh(begin)
        state.load_network(network, session.optimizers[network.name], tmp_path)
        resumed = train(session, 3, 4)
    finally:
        network.adapter.load(begin)
    assert all(torch.isfinite(each).all() for each in whole.values())
    assert any(not torch.equal(half[key], begin[key]) for key in begin), "trained"
    assert all(torch.equal(whole[key], resumed[key]) for key in whole), "resumed to the bit"


def test_a_wrong_option_is_refused_before_any_weight_is_read(job, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    with job.on_path():
        monkeypatch.setattr("tuner.testing.toy.model.load", read)
        with pytest.raises(ConfigError, match="did you mean 'weight_decay'"):
            job.run("wrong-option", optimizer_config={"weight_decy": 1})


def test_a_schedule_free_run_is_the_same_with_a_save_and_a_validation_more(job, state_of, steps_of):
    keys = {"optimizer": "adamw_schedulefree", "max_train_steps": 4}
    plain = job.run("free", **keys)
    busy = job.run("free-busy", **keys, checkpoint_step_interval=1, validation_step_interval=1)
    assert state_of(plain, 4) == state_of(busy, 4)
    resumed = job.run("free-resumed", **{**keys, "max_train_steps": 2})
    job.run("free-resumed", **keys, resume_from_checkpoint="latest")
    assert state_of(resumed, 4) == state_of(plain, 4)
