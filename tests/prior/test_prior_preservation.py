"""Prior preservation: regularisation data hold the model to what its base predicts, and touch nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tuner import pipeline
from tuner.assembly import assemble
from tuner.builtin.prior.target import take_base_as_target
from tuner.errors import ConfigError, PluginError
from tuner.model import Batch
from tuner.testing.opened import opened
from tuner.testing.toy.describe import read_dimensions
from tuner.testing.toy.model import read_weights
from tuner.testing.toy.networks import ToyTransformer
from tuner.train.session import Session
from tuner.train.step import _loss, make_batch, train_step
from tuner_wan.tiny import build_tiny_t2v

Settings = Callable[..., dict[str, Any]]
PLUGIN = "prior_preservation"
HALF = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}
STREAMED = {"enable_group_offload": True, "gradient_checkpointing": True}


def parameters(session: Session) -> Mapping[str, Tensor]:
    return session.model.network.adapter.groups[0].parameters


def stray(session: Session) -> None:
    """Move the LoRA away from its start, where it does nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for each in parameters(session).values():
            each.copy_(torch.randn(each.shape, generator=generator) / 10)


def mixed(session: Session) -> Batch:
    """The first batch that holds samples of every dataset; the run then stands at its step."""
    wanted = set(session.run.cached.datasets)
    for session.run.step in range(20):
        batch = make_batch(session, session.loader.load(session.run.step, 0))
        if {name.partition("/")[0] for name in batch.sample_ids} == wanted:
            return batch
    raise AssertionError("no batch mixes the datasets")


def held(batch: Batch) -> Tensor:
    return torch.tensor([name.startswith("hold") for name in batch.sample_ids])


def learn(session: Session) -> tuple[Batch, Tensor, dict[str, Tensor]]:
    """The batch after one forward and backward, the loss of each sample, and the gradients."""
    batch = mixed(session)
    losses = _loss(session, batch, 0).per_sample
    losses.sum().backward()
    return batch, losses.detach(), {name: each.grad for name, each in parameters(session).items()}


def test_at_its_start_the_model_has_nothing_to_correct(make_settings: Settings) -> None:
    with opened(make_settings(("hold",))) as session:
        _, losses, gradients = learn(session)
    assert losses.tolist() == [0, 0]
    assert all(gradient.eq(0).all() for gradient in gradients.values())


def test_steps_on_regularisation_data_alone_leave_the_model_where_it_is(make_settings: Settings) -> None:
    with opened(make_settings(("hold",))) as session:
        for session.run.step in range(3):
            assert train_step(session).loss == 0
        assert all(each.eq(0).all() for name, each in parameters(session).items() if "lora_B" in name)


def test_away_from_its_start_it_is_held_to_the_untouched_base(make_settings: Settings, folder: Path) -> None:
    with opened(make_settings()) as session:
        stray(session)
        batch, losses, gradients = learn(session)
        own = batch.noise - batch.latents
    base = ToyTransformer(read_dimensions(folder / "model"))
    base.load_state_dict(dict(read_weights(folder / "model" / "transformer" / "model.safetensors")))
    states = batch.text["states"]
    text = functional.pad(states, (0, 0, 0, session.model.network.spec.text_tokens - states.shape[1]))
    with torch.no_grad():
        expected = base.eval()(batch.noisy, batch.sigmas * 1000, text)
    for index, name in enumerate(batch.sample_ids):
        if name.startswith("hold"):
            torch.testing.assert_close(batch.target[index], expected[index], rtol=1e-6, atol=1e-6)
            assert losses[index] > 0
        else:
            assert torch.equal(batch.target[index], own[index])
    assert any(gradient.ne(0).any() for gradient in gradients.values())


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"lora_dropout": 0.5},
        {"mixed_precision": "bf16"},
        {"tread_config": HALF},
        STREAMED,
        {**STREAMED, "tread_config": HALF, "mixed_precision": "bf16", "lora_dropout": 0.5},
    ],
    ids=lambda keys: "+".join(keys) or "plain",
)
def test_other_samples_learn_what_they_would_without_it(make_settings: Settings, keys: dict[str, Any]) -> None:
    """Losses bit for bit; and gradients too, once the held samples are taken out of the sum."""
    found = []
    for without in ((), (PLUGIN,)):
        with opened(make_settings(**keys), without=without) as session:
            stray(session)
            batch = mixed(session)
            losses = _loss(session, batch, 0).per_sample
            taught = ~held(batch)
            losses[taught].sum().backward()
            gradients = {name: each.grad for name, each in parameters(session).items()}
            found.append((losses.detach(), gradients))
    (losses, gradients), (plain, expected) = found
    assert torch.equal(losses[taught], plain[taught])
    assert not torch.equal(losses[~taught], plain[~taught])
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize(
    "keys",
    [{"tread_config": HALF}, STREAMED, {"lora_dropout": 0.5}, {"gradient_checkpointing": False}],
    ids=lambda keys: "+".join(keys),
)
def test_the_target_depends_on_no_feature_of_training(make_settings: Settings, keys: dict[str, Any]) -> None:
    targets = []
    for more in ({}, keys):
        with opened(make_settings(**more)) as session:
            stray(session)
            batch = mixed(session)
            session.model.network.trampoline.context = session.context(batch)
            take_base_as_target(session.model, batch)
            targets.append(batch.target)
    torch.testing.assert_close(*targets, rtol=1e-6, atol=1e-6)


def test_the_network_is_left_as_it_was(make_settings: Settings) -> None:
    with opened(make_settings()) as session:
        network = session.model.network
        frozen_block = network.stack.blocks[2].eval()
        before = {name: each.requires_grad for name, each in network.module.named_parameters()}
        context = network.trampoline.context = session.context(mixed(session))
        modes = [each.training for each in network.module.modules()]
        with network.base():
            assert not network.module.training
            assert not torch.is_grad_enabled()
            assert network.trampoline.context.router is None
        with pytest.raises(ZeroDivisionError), network.base():
            1 / 0  # noqa: B018
        assert network.trampoline.context is context
        assert [each.training for each in network.module.modules()] == modes
        assert not frozen_block.training
        assert {name: each.requires_grad for name, each in network.module.named_parameters()} == before
        assert torch.is_grad_enabled()
        stray(session)
        batch, losses, _ = learn(session)
        assert losses[held(batch)].gt(0).all(), "the adapter is on again"


def test_with_bf16_a_tiny_wan_has_nothing_to_correct_at_its_start(
    make_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tiny = build_tiny_t2v(tmp_path_factory.mktemp("wan") / "tiny", layers=4)
    keys = {"model_family": "wan", "pretrained_model_name_or_path": str(tiny), "mixed_precision": "bf16"}
    with opened(make_settings(**keys)) as session:
        batch, losses, _ = learn(session)
    assert losses[held(batch)].eq(0).all()
    assert losses[~held(batch)].gt(0).all()


def test_a_whole_run_says_what_it_holds(make_settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        settings = make_settings()
        pipeline.run(assemble(settings))
    assert "2 of 4 samples hold the model to its base" in caplog.text
    lines = (Path(settings["output_dir"]) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_without_regularisation_data_the_plugin_does_nothing(
    make_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    losses = []
    with caplog.at_level(logging.INFO):
        for without in ((), (PLUGIN,)):
            with opened(make_settings(("teach",)), without=without) as session:
                losses.append(learn(session)[1])
    assert torch.equal(*losses)
    assert "hold" not in caplog.text
    assert "regularisation" not in caplog.text


def test_left_out_it_is_missed_in_one_line(make_settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipeline.survey(assemble(make_settings(), without=(PLUGIN,)))
    (line,) = [record.getMessage() for record in caplog.records if "regularisation" in record.getMessage()]
    assert "'hold'" in line
    assert "trained on like any other" in line


def test_full_training_has_no_base_to_hold_to(make_settings: Settings) -> None:
    with pytest.raises(ConfigError, match="'hold' is regularisation data, which needs an adapter"):
        pipeline.survey(assemble(make_settings(model_type="full")))
    pipeline.survey(assemble(make_settings(("teach",), model_type="full")))


def test_an_adapter_that_cannot_be_switched_off_is_refused_before_the_first_step(make_settings: Settings) -> None:
    with opened(make_settings()) as session:
        network = session.model.network
        network.adapter = replace(network.adapter, disabled=None)
        with pytest.raises(PluginError, match="cannot be switched off"):
            session.manager.hook.on_train_start(run=session.run, model=session.model)


def test_samples_know_what_they_are_for(make_settings: Settings) -> None:
    with opened(make_settings()) as session:
        batch = mixed(session)
    assert batch.regularisation == tuple(held(batch).tolist())
    assert set(batch.regularisation) == {False, True}
