"""What is measured on held-out samples: against a computation by hand, and again and again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.special import expit
from scipy.stats import norm
from torch import Tensor, nn

from tuner import rng
from tuner.manager import Manager
from tuner.plugin import Plugin, PluginConfig
from tuner.testing.opened import opened
from tuner.testing.plugin_env import importable, write_distribution
from tuner.testing.toy.describe import read_dimensions
from tuner.testing.toy.model import read_weights
from tuner.testing.toy.networks import ToyTransformer
from tuner.train.session import Session
from tuner.train.step import train_step
from tuner.validate.stage import validate
from tuner_wan.tiny import build_tiny

Settings = Callable[..., dict[str, Any]]
LEVELS = 3
KEYS = {"eval_timesteps": LEVELS, "flow_schedule_shift": 3.0}
HALF = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}


def evaluate(session: Session) -> dict[str, float]:
    found = validate(session.run, session.model, session.manager, session.engine)
    return {name.removeprefix("evaluation/"): value for name, value in found.items() if name.startswith("evaluation/")}


def stray(session: Session) -> None:
    """Move the LoRA away from its start, where it does nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for each in session.model.network.adapter.groups[0].parameters.values():
            each.copy_(torch.randn(each.shape, generator=generator) / 10)


def by_hand(session: Session, folder: Path, shift: float) -> dict[tuple[str, int], float]:
    """The loss of each held-out sample at each level in float64, on the network's own class with the LoRA merged."""
    network = ToyTransformer(read_dimensions(folder / "model"))
    network.load_state_dict(dict(read_weights(folder / "model" / "transformer" / "model.safetensors")))
    network.double().eval()
    # The toy computes its sines in float32.
    network.time_in.register_forward_pre_hook(lambda _, arguments: tuple(each.double() for each in arguments))
    merge(network, session.model.network.adapter.state())
    cached, length = session.run.cached, session.model.network.spec.text_tokens
    losses = {}
    for sample in cached.prepared.held_out:
        latents = cached.video(sample)["latents"].double()[None]
        states = cached.text(sample.captions[0])["states"].double()
        text = torch.zeros(1, length, states.shape[1], dtype=torch.float64)
        text[0, : len(states)] = states
        for level in range(LEVELS):
            raw = float(expit(norm.ppf((level + 0.5) / LEVELS)))
            sigma = shift * raw / (1 + (shift - 1) * raw)
            generator = rng.generator(session.run.config.seed, f"evaluation/{sample.sample_id}", level)
            noise = torch.randn(latents.shape, generator=generator).double()
            with torch.no_grad():
                times = torch.tensor([1000 * sigma], dtype=torch.float64)
                velocity = network((1 - sigma) * latents + sigma * noise, times, text)
            losses[sample.sample_id, round(1000 * sigma)] = float((velocity - (noise - latents)).square().mean())
    return losses


def merge(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Add B A to the weights; rank and alpha are equal."""
    down = {name: each for name, each in state.items() if ".lora_A." in name}
    assert down
    for name, each in down.items():
        up = state[name.replace(".lora_A.", ".lora_B.")]
        module = network.get_submodule(name.partition(".lora_A.")[0])
        assert isinstance(module, nn.Linear)
        module.weight.data += up.double() @ each.double()


def mean(losses: Mapping[Any, float]) -> float:
    return sum(losses.values()) / len(losses)


def test_it_is_the_loss_computed_by_hand_in_float64(make_settings: Settings, folder: Path) -> None:
    with opened(make_settings(("unseen", "other"), **KEYS)) as session:
        stray(session)
        found, expected = evaluate(session), by_hand(session, folder, shift=3.0)
    assert len(expected) == LEVELS * (3 + 1)
    times = sorted({time for _, time in expected})
    assert set(found) == {"loss", "loss/unseen", "loss/other", *(f"loss/t{time}" for time in times)}
    assert found["loss"] == pytest.approx(mean(expected), rel=1e-5)
    for name in ("unseen", "other"):
        own = {key: loss for key, loss in expected.items() if key[0].startswith(name)}
        assert found[f"loss/{name}"] == pytest.approx(mean(own), rel=1e-5)
    for time in times:
        own = {key: loss for key, loss in expected.items() if key[1] == time}
        assert found[f"loss/t{time}"] == pytest.approx(mean(own), rel=1e-5)


def test_the_same_weights_give_the_same_numbers_at_any_step(make_settings: Settings) -> None:
    with opened(make_settings(lora_dropout=0.5, tread_config=HALF, **KEYS)) as session:
        stray(session)
        first = evaluate(session)
        session.run.step = 4
        torch.rand(7)
        assert evaluate(session) == first
        train_step(session)
        moved = evaluate(session)
    assert moved.keys() == first.keys()
    assert all(moved[name] != first[name] for name in first)


@pytest.mark.parametrize(
    ("keys", "tolerance"),
    [
        ({"tread_config": HALF}, 0),
        ({"lora_dropout": 0.5}, 0),
        ({"caption_dropout_probability": 1.0}, 0),
        ({"enable_group_offload": True, "gradient_checkpointing": True}, 1e-6),
        ({"mixed_precision": "bf16"}, 2e-2),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_no_feature_of_training_takes_part(make_settings: Settings, keys: dict[str, Any], tolerance: float) -> None:
    found = []
    for more in ({}, keys):
        with opened(make_settings(**KEYS, **more)) as session:
            stray(session)
            found.append(evaluate(session))
    assert found[1] == pytest.approx(found[0], rel=tolerance, abs=0)


def test_another_seed_is_another_noise_and_other_samples_change_nothing(make_settings: Settings) -> None:
    found = []
    for held_out, keys in ((("unseen",), {}), (("unseen", "other"), {}), (("unseen",), {"seed": 7})):
        with opened(make_settings(held_out, **KEYS, **keys)) as session:
            stray(session)
            found.append(evaluate(session)["loss/unseen"])
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert found[0] == pytest.approx(found[2], rel=0.5)


def test_only_so_many_samples_are_measured(make_settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), opened(make_settings(("unseen", "other"), eval_max_samples=2)) as session:
        found = evaluate(session)
    assert {"loss/unseen", "loss/other"} <= set(found), "each dataset has its share"
    assert found["loss"] == pytest.approx((found["loss/unseen"] + found["loss/other"]) / 2)
    said = [record.getMessage() for record in caplog.records if "eval_max_samples" in record.getMessage()]
    assert said == ["held-out loss: 2 of 4 samples (eval_max_samples) at 4 noise levels, at the end"]


def test_the_mask_of_a_held_out_clip_weighs_its_loss(make_settings: Settings, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "masks"
    folder.mkdir()
    for index, (width, height) in enumerate([(96, 64), (64, 64), (96, 64)]):
        picture = Image.new("L", (width, height))
        picture.paste(255, (0, 0, 32, 32))
        picture.save(folder / f"clip {index}.png")
    found = []
    for masked in (False, True):
        settings = make_settings(**KEYS)
        if masked:
            settings["data_backend_config"][1]["conditioning_data"] = "masks"
            settings["data_backend_config"].append(
                {"id": "masks", "dataset_type": "conditioning", "instance_data_dir": str(folder)}
            )
        with opened(settings) as session:
            losses = evaluate(session)
            found.append(losses["loss"])
            if masked:
                assert losses["loss"] == pytest.approx(corner(session), rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def corner(session: Session) -> float:
    """The loss over the top left corner of 32 x 32 pixels alone, which is 4 x 4 latents."""
    from tuner_evaluation.measure import batches

    losses = []
    with torch.no_grad():
        for sample in session.run.cached.prepared.held_out:
            for batch in batches(session.run, session.model, sample, LEVELS):
                difference = session.model.predict(batch) - batch.target
                losses.append(float(difference[..., :4, :4].double().square().mean()))
    return sum(losses) / len(losses)


MEDDLER = '''
from tuner import Plugin, hookimpl

class Meddler(Plugin):
    """Doubles the loss."""
    @hookimpl(wrapper=True)
    def compute_loss(self, batch):
        loss = yield
        return type(loss)(per_sample=2 * loss.per_sample)
'''


def test_what_plugins_make_of_the_training_loss_is_left_out(make_settings: Settings, tmp_path: Path) -> None:
    site = write_distribution(
        tmp_path / "site", "meddler", {"meddler": "meddler:Meddler"}, modules={"meddler": MEDDLER}
    )
    found = []
    with importable(site):
        for plugins in (["toy", "evaluation"], ["toy", "evaluation", "meddler"]):
            with opened(make_settings(plugins=plugins, **KEYS)) as session:
                found.append((evaluate(session), train_step(session).loss))
    (plain, loss), (meddled, doubled) = found
    assert doubled == pytest.approx(2 * loss)
    assert meddled == plain


def test_the_unwrapped_hook_leaves_other_wrappers_where_they_are() -> None:
    from tuner.hookspecs import hookimpl

    class Family(Plugin[PluginConfig]):
        @hookimpl
        def compute_loss(self) -> str:
            return "loss"

    class Wrapper(Plugin[PluginConfig]):
        @hookimpl(wrapper=True)
        def compute_loss(self) -> Any:
            return f"wrapped {(yield)}"

    manager = Manager()
    manager.add("family", Family("family", PluginConfig()))
    manager.add("wrapper", Wrapper("wrapper", PluginConfig()))
    plain = manager.unwrapped("compute_loss")
    assert plain(run=None, model=None, batch=None) == "loss"
    assert manager.hook.compute_loss(run=None, model=None, batch=None) == "wrapped loss"


def test_of_two_experts_each_is_measured_on_its_own_levels_and_the_one_before_is_back(
    make_settings: Settings, tmp_path: Path
) -> None:
    base = build_tiny(tmp_path / "pair", "t2v-14b-2.2-high")
    keys = {"eval_timesteps": 2, "eval_max_samples": 1, "wan_expert_switch_steps": 1}
    settings = make_settings(**wan(base, "t2v-14b-2.2-both"), **keys)
    boundary = 875
    with opened(settings) as session:
        before = []
        for session.run.step in range(2):
            session.take_turn()
            name = session.model.active
            found = evaluate(session)
            assert session.model.active == name
            times = [int(each.removeprefix("loss/t")) for each in found if each.startswith("loss/t")]
            assert len([time for time in times if time >= boundary]) == 2
            assert len([time for time in times if time < boundary]) == 2
            before.append(found)
        assert before[0] == before[1], "whichever is active"
        session.run.step = 0
        train_step(session)
        after = evaluate(session)
    changed = {int(name.removeprefix("loss/t")) for name in after if "/t" in name and after[name] != before[0][name]}
    assert changed == {time for time in times if time >= boundary}, "the expert that was trained, and it alone"


def wan(base: Path, flavour: str) -> dict[str, Any]:
    return {"model_family": "wan", "model_flavour": flavour, "pretrained_model_name_or_path": str(base)}


def test_a_first_frame_that_is_given_counts_nothing(make_settings: Settings, tmp_path: Path) -> None:
    """As in training: the family makes the loss, not the plugin."""
    from tuner_evaluation.measure import batches

    base = build_tiny(tmp_path / "ti2v", "ti2v-5b-2.2")
    with opened(make_settings(**wan(base, "ti2v-5b-2.2"), **KEYS, eval_max_samples=1)) as session:
        found, losses = evaluate(session)["loss"], []
        with torch.no_grad():
            for sample in session.run.cached.prepared.held_out:
                for batch in batches(session.run, session.model, sample, LEVELS):
                    difference = session.model.predict(batch).double() - batch.target
                    losses.append((float(difference[:, :, 1:].square().mean()), sample.sample_id))
    own = [sum(loss for loss, name in losses if name == each) / LEVELS for each in {name for _, name in losses}]
    assert any(found == pytest.approx(each, rel=1e-5) for each in own)


def test_an_image_model_is_given_its_first_frame_here_too(make_settings: Settings, tmp_path: Path) -> None:
    base = build_tiny(tmp_path / "i2v", "i2v-14b-2.1")
    with opened(make_settings(**wan(base, "i2v-14b-2.1"), **KEYS)) as session:
        found = evaluate(session)
    assert found["loss"] > 0
    assert len(found) == 2 + LEVELS
