"""The contract kit catches what it is there to catch: each test of it fails for a plugin that is wrong in that way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.errors import PluginError
from tuner.hookspecs import hookimpl
from tuner.model import Batch, EncodeBatch, Encoded, Loss, Model
from tuner.run import Run
from tuner.spec import ModelSpec
from tuner.testing.contract import FamilyContract, PluginContract
from tuner.testing.family import FamilyBench
from tuner.testing.plugin_env import importable, write_distribution
from tuner.testing.toy import ToyConfig, ToyPlugin, build_toy

GOOD = '''
from tuner import Plugin, PluginConfig, hookimpl, key

class Config(PluginConfig):
    specimen_size: int = key(1, "A size.")

class Specimen(Plugin[Config]):
    """A plugin in good order."""

    Config = Config
    count = 0

    @hookimpl
    def on_train_end(self, run):
        pass

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]
'''
WRONG: dict[str, tuple[str, str, str]] = {
    "heavy import": ("test_import_costs_nothing", "\nfrom tuner", "\nimport numpy\nfrom tuner"),
    "key without a default": ("test_defaults_are_valid", 'key(1, "A size.")', 'key(..., "A size.")'),
    "lax config": (
        "test_config_is_strict_and_frozen",
        "class Config(PluginConfig):",
        'class Config(PluginConfig):\n    model_config = {"extra": "allow"}',
    ),
    "undescribed key": ("test_keys_are_documented", 'key(1, "A size.")', 'key(1, "")'),
    "plain field": ("test_keys_are_documented", 'key(1, "A size.")', "1"),
    "unprefixed key": ("test_keys_are_its_own", "specimen_size", "size"),
    "the core's key": ("test_no_key_collides", "specimen_size", "learning_rate"),
    "another plugin's key": ("test_no_key_collides", "specimen_size", "tread_config"),
    "alias of a core key": ("test_no_key_collides", '"A size."', '"A size.", aliases=("validation_steps",)'),
    "no summary": ("test_summary", '    """A plugin in good order."""\n', ""),
    "misspelt hook": ("test_hooks_will_be_called", "def on_train_end", "def on_train_ends"),
    "unmarked hook": ("test_hooks_will_be_called", "    @hookimpl\n", ""),
    "unknown argument": ("test_hooks_will_be_called", "(self, run)", "(self, run, epoch)"),
    "state that is lost": ("test_state_survives", 'self.count = state["count"]', "self.count = 1"),
    "state that JSON cannot hold": (
        "test_state_survives",
        'return {"count": self.count}',
        'return {"count": object()}',
    ),
}


class SpecimenContract(PluginContract):
    """The contract, for whichever specimen is on the path."""

    plugin = "specimen"
    __test__ = False


def checks_of(contract: type) -> list[str]:
    return [name for name in dir(contract) if name.startswith("test_")]


def specimen(folder: Path, name: str, source: str) -> Path:
    # Modules are cached by name: each specimen needs one of its own.
    module = f"specimen_{name.replace(' ', '_').replace(chr(39), '')}"
    return write_distribution(folder, "specimen", {"specimen": f"{module}:Specimen"}, modules={module: source})


def test_a_good_plugin_passes(tmp_path: Path) -> None:
    with importable(specimen(tmp_path, "good", GOOD)):
        for test in checks_of(SpecimenContract):
            getattr(SpecimenContract(), test)()


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_plugin_is_caught(tmp_path: Path, wrong: str) -> None:
    test, old, new = WRONG[wrong]
    assert old in GOOD
    with (
        importable(
            specimen(tmp_path, wrong, GOOD.replace(old, new, 1) if old != "specimen_size" else GOOD.replace(old, new))
        ),
        pytest.raises((AssertionError, PluginError, ValueError, TypeError)),
    ):
        getattr(SpecimenContract(), test)()


def test_every_plugin_test_can_fail() -> None:
    """No test of the kit passes whatever it is given."""
    assert set(checks_of(SpecimenContract)) - {test for test, _, _ in WRONG.values()} == {
        "test_found_through_its_entry_point"
    }


def test_a_plugin_that_is_not_installed_is_caught() -> None:
    with pytest.raises(AssertionError, match="entry point"):
        SpecimenContract().test_found_through_its_entry_point()


class Restless(ToyPlugin):
    """A toy family that is wrong in one way."""

    def __init__(self, wrong: str) -> None:
        super().__init__("toy", ToyConfig())
        self.wrong = wrong

    @hookimpl
    def describe_model(self, run: Run) -> ModelSpec:
        spec = super().describe_model(run)
        return replace(spec, adapter_targets=("to_query",)) if self.wrong == "targets" else spec

    @hookimpl
    def load_model(self, run: Run) -> Model:
        model = super().load_model(run)
        if self.wrong == "storage":
            model.network.module.to_empty(device="cpu")
        if self.wrong == "dtype":
            model.network.dtype_of = lambda name: torch.bfloat16 if "blocks.0" in name else torch.float32
            model.network.weights = _as_is(model)
        if self.wrong == "feed_forward":
            model.network.feed_forwards = {"norm": torch.nn.Softmax(dim=1)}
        if self.wrong == "driver":
            model.network.stack.blocks = list(model.network.stack.blocks)[::-1]
        if self.wrong == "routes":
            model.network.trampoline.enabled = False
        return model

    @hookimpl
    def encode_batch(self, run: Run, model: Model, batch: EncodeBatch) -> Encoded:
        encoded = super().encode_batch(run, model, batch)
        if self.wrong == "latents":
            return [{"latents": each["latents"][:, :1]} if "latents" in each else each for each in encoded]
        if self.wrong == "captions":
            return [{"states": each["states"][:1]} if "states" in each else each for each in encoded]
        return encoded

    @hookimpl
    def compute_loss(self, run: Run, model: Model, batch: Batch) -> Loss:
        loss = super().compute_loss(run, model, batch)
        return (
            Loss(loss.per_sample.detach() + 0 * batch.noisy.requires_grad_().mean()) if self.wrong == "loss" else loss
        )


def _as_is(model: Model) -> Callable[[], Any]:
    """A reader of the network's weights that says one dtype and fills another."""
    weights, network = model.network.weights, model.network

    def read() -> Any:
        named = network.dtype_of
        network.dtype_of = lambda name: torch.float32
        yield from weights()
        network.dtype_of = named

    return read


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("toy") / "model")


FAMILY_WRONG = {
    "targets": "test_description_fits_the_model",
    "storage": "test_networks_load_without_storage",
    "dtype": "test_weights_have_their_dtype",
    "feed_forward": "test_feed_forwards_are_token_wise",
    "latents": "test_clips_are_encoded",
    "captions": "test_captions_are_encoded",
    "loss": "test_loss_reaches_every_weight",
    "routes": "test_tokens_can_be_routed",
}


def held_to(bench: FamilyBench) -> FamilyContract:
    """The kit, for the family on this bench."""
    return type("Tried", (FamilyContract,), {"_bench": bench})()


@pytest.mark.parametrize("wrong", FAMILY_WRONG)
def test_a_wrong_family_is_caught(toy_model: Path, wrong: str) -> None:
    settings = {"pretrained_model_name_or_path": str(toy_model)}
    right = FamilyBench(ToyPlugin("toy", ToyConfig()), settings, FamilyContract.clip)
    getattr(held_to(right), FAMILY_WRONG[wrong])()
    with pytest.raises(AssertionError):
        getattr(held_to(FamilyBench(Restless(wrong), settings, FamilyContract.clip)), FAMILY_WRONG[wrong])()


def test_a_wrong_driver_is_caught(toy_model: Path) -> None:
    bench = FamilyBench(Restless("driver"), {"pretrained_model_name_or_path": str(toy_model)}, FamilyContract.clip)
    with pytest.raises(AssertionError):
        held_to(bench).test_driver_equals_the_networks_own_forward()
