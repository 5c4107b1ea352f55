"""What every plugin is held to. Subclass these in your own tests (they need pytest)::

    from tuner.testing.contract import PluginContract

    class TestMyPlugin(PluginContract):
        plugin = "my_plugin"

A model family subclasses :class:`FamilyContract` beside it.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tuner import flow
from tuner.blocks import RouteRequest, StepContext, TokenRoute
from tuner.config.describe import facts
from tuner.config.keys import CoreConfig
from tuner.manager import Manager
from tuner.model import Model, SampleRequest
from tuner.plugin import AnyPlugin, PluginConfig
from tuner.selection import Catalog, discover
from tuner.testing.family import FamilyBench

HEAVY = ("torch", "diffusers", "transformers", "numpy")
"""What an entry module must not import."""


def imported_by(code: str, modules: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of ``modules`` a fresh interpreter holds after running ``code``. Raises AssertionError when it fails."""
    report = f"{code}\nimport sys; print('\\n' + ' '.join(m for m in {modules!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def names_of(config: type[PluginConfig]) -> set[str]:
    """Every name that a config's keys go by, aliases included."""
    return {name for key, field in config.model_fields.items() for name in (key, *facts(field).aliases)}


class PluginContract:
    """A plugin is found, costs nothing to import, owns clean keys, and has hooks that will be called."""

    plugin: ClassVar[str]
    """Its name."""
    legacy_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys without the plugin's name as their prefix, because users' files already have them."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """Keys of its own to make it with."""

    def cls(self) -> type[AnyPlugin]:
        """The plugin's class, through its entry point."""
        found = discover()
        assert self.plugin in found, f"no installed package has an entry point {self.plugin!r} in group 'tuner.plugins'"
        return found[self.plugin].load()

    def make(self) -> AnyPlugin:
        """An instance with ``settings``."""
        cls = self.cls()
        return cls(self.plugin, cls.Config(**self.settings))

    def test_found_through_its_entry_point(self) -> None:
        """The package names it, and it loads."""
        self.make()

    def test_import_costs_nothing(self) -> None:
        """The module behind the entry point imports nothing heavy: hook bodies and sibling modules do."""
        module = discover()[self.plugin].entry_point.module
        heavy = imported_by(f"import importlib; importlib.import_module({module!r})")
        assert not heavy, f"importing {module} imports {', '.join(heavy)}: move them into the hook bodies"

    def test_defaults_are_valid(self) -> None:
        """It can be loaded without a single key of its own."""
        self.cls().Config()

    def test_config_is_strict_and_frozen(self) -> None:
        """Unknown keys are refused, and nothing changes after the start."""
        options = self.cls().Config.model_config
        assert options.get("extra") == "forbid"
        assert options.get("frozen")

    def test_keys_are_documented(self) -> None:
        """Each key is made with ``tuner.key`` and says what it does."""
        for name, field in self.cls().Config.model_fields.items():
            assert field.description, f"{name} has no description"
            extra = field.json_schema_extra
            assert isinstance(extra, dict), f"{name} is not made with tuner.key"
            assert "tuner" in extra, f"{name} is not made with tuner.key"

    def test_keys_are_its_own(self) -> None:
        """Each key starts with the plugin's name, or is declared a legacy name."""
        strange = [
            name
            for name in self.cls().Config.model_fields
            if not name.startswith(f"{self.plugin}_") and name not in self.legacy_keys
        ]
        assert not strange, f"prefix with '{self.plugin}_' or list in legacy_keys: {strange}"

    def test_no_key_collides(self) -> None:
        """No key or alias is the core's or another installed plugin's."""
        mine = names_of(self.cls().Config)
        others: dict[str, type[PluginConfig]] = {"the core": CoreConfig}
        catalog = Catalog()  # another package that fails to import is not this plugin's fault
        others |= {
            name: cls.Config for name in catalog.installed if name != self.plugin and (cls := catalog.peek(name))
        }
        for owner, config in others.items():
            both = sorted(mine & names_of(config))
            assert not both, f"{both} belong to {owner} already"

    def test_summary(self) -> None:
        """The docstring's first line is what ``tuner plugins`` shows."""
        summary = (inspect.getdoc(self.cls()) or "").partition("\n")[0]
        assert self.cls().__doc__, "the class has no docstring"
        assert 0 < len(summary) <= 110, f"the docstring's first line should be a short summary: {summary!r}"

    def test_hooks_will_be_called(self) -> None:
        """No misspelt hook, no hook without its mark, no argument that is never passed."""
        Manager().add(self.plugin, self.make())

    def test_state_survives(self) -> None:
        """A fresh instance that takes the state gives the same state; it is tensors and JSON values."""
        state = self.make().state_dict()
        json.dumps({name: value for name, value in state.items() if not isinstance(value, Tensor)})
        restored = self.make()
        restored.load_state_dict(state)
        assert _same(restored.state_dict(), state)


def _same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
        for name, value in ours.items()
    )


class FamilyContract:
    """A model family describes, loads, encodes, learns and samples as the core relies on."""

    plugin: ClassVar[str]
    clip: ClassVar[tuple[int, int, int]] = (9, 32, 48)
    """Frames, height and width of the clips it is tried with."""

    def build(self, folder: Path) -> dict[str, Any]:
        """Write a tiny model into ``folder``; returns the core keys that a run with it needs."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def bench(self, tmp_path_factory: pytest.TempPathFactory) -> FamilyBench:
        """The family with a tiny model, ready to be tried."""
        folder = tmp_path_factory.mktemp(self.plugin)
        cls = discover()[self.plugin].load()
        return FamilyBench(cls(self.plugin, cls.Config()), self.build(folder), self.clip)

    def test_description_needs_no_torch(self, bench: FamilyBench) -> None:
        """``tuner check`` is quick because of this."""
        heavy = imported_by(
            "import json\n"
            "from tuner.config.keys import CoreConfig\n"
            "from tuner.run import Run\n"
            "from tuner.selection import discover\n"
            f"cls = discover()[{self.plugin!r}].load()\n"
            f"core = CoreConfig(**json.loads({json.dumps(bench.settings)!r}))\n"
            f"cls({self.plugin!r}, cls.Config()).describe_model(run=Run(core, {{}}))",
            ("torch", "diffusers", "transformers"),
        )
        assert not heavy, f"describe_model imports {', '.join(heavy)}"

    def test_description_fits_the_model(self, bench: FamilyBench) -> None:
        """Names, counts and sizes of the description are the model's."""
        model, spec = bench.load(), bench.spec
        assert [network.name for network in spec.networks] == list(model.networks)
        assert {name for names in spec.encoders.values() for name in names} <= set(model.components)
        assert {"text", "video"} <= set(spec.encoders)
        for network in model.networks.values():
            assert len(network.stack.blocks) == network.spec.blocks
            names = [name for name, _ in network.module.named_modules()]
            for target in spec.adapter_targets:
                assert any(name.endswith(f".{target}") for name in names), f"no module is called {target}"
        assert spec.latents.frames_allowed(self.clip[0]) == self.clip[0], "choose a clip length the family allows"
        assert spec.size_multiple % spec.latents.stride_space == 0

    def test_networks_load_without_storage(self, bench: FamilyBench) -> None:
        """Nothing is read before the core asks for it; buffers are real, for nobody would fill them."""
        for network in bench.hand_over().networks.values():
            assert all(parameter.is_meta for parameter in network.module.parameters())
            assert not any(buffer.is_meta for buffer in network.module.buffers())

    def test_weights_have_their_dtype(self, bench: FamilyBench) -> None:
        """Every parameter is filled, in the dtype the family names, and frozen."""
        for network in bench.load().networks.values():
            for name, parameter in network.module.named_parameters():
                assert not parameter.is_meta, f"{name} was never filled"
                assert parameter.dtype == network.dtype_of(name), name
                assert not parameter.requires_grad, name

    def test_feed_forwards_are_token_wise(self, bench: FamilyBench) -> None:
        """What is offered for chunking may be run on any part of the tokens."""
        for network in bench.load().networks.values():
            for name, module in network.feed_forwards.items():
                dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
                tokens = torch.randn(1, 4, network.spec.dim, dtype=dtype)
                with torch.no_grad():
                    whole, part = module(tokens), module(tokens[:, 1:3])
                assert whole.shape == tokens.shape, name
                torch.testing.assert_close(whole[:, 1:3], part, msg=name)

    def test_clips_are_encoded(self, bench: FamilyBench) -> None:
        """Latents have the described shape, are finite, and do not depend on the other clips of the batch."""
        model = bench.hand_over()
        encoded = bench.encode_clips(model, bench.pixels)
        assert len(encoded) == len(bench.pixels)
        for tensors in encoded:
            assert tuple(tensors["latents"].shape) == bench.spec.latents.shape(*self.clip)
            for name, tensor in tensors.items():
                assert torch.isfinite(tensor).all(), name
                assert not tensor.requires_grad, name
        alone = bench.encode_clips(model, bench.pixels[:1])[0]
        torch.testing.assert_close(alone["latents"], encoded[0]["latents"], rtol=1e-4, atol=1e-5)

    def test_captions_are_encoded(self, bench: FamilyBench) -> None:
        """Each caption has its true length, the empty one included, and longer ones are cut to what the model reads."""
        model = bench.hand_over()
        limit = bench.spec.networks[0].text_tokens
        captions = ("", "a cat walks", "一只猫", "word " * (2 * limit))
        lengths = [len(next(iter(each.values()))) for each in bench.encode_captions(model, captions)]
        assert lengths[0] >= 1
        assert lengths[1] > lengths[0]
        assert max(lengths) <= limit
        assert lengths[3] == limit

    def test_loss_reaches_every_weight(self, bench: FamilyBench) -> None:
        """One loss per sample, and a finite gradient for every parameter of the network."""
        model = bench.load()
        losses, gradients = bench.learn(model, StepContext())
        assert losses.shape == (len(bench.pixels),)
        assert losses.dtype == torch.float32
        assert torch.isfinite(losses).all()
        missing = [
            name for name, gradient in gradients.items() if gradient is None or not torch.isfinite(gradient).all()
        ]
        assert not missing, f"no finite gradient: {missing}"

    def test_loss_is_that_of_the_prediction(self, bench: FamilyBench) -> None:
        """``predict`` gives a velocity for each latent, ``compute_loss`` compares it, and no target is looked at."""
        model, batch = bench.load(), bench.batch(bench.hand_over())
        with torch.no_grad():
            prediction = model.predict(batch)
            compared = bench.hook.compute_loss(run=bench.run, model=model, batch=batch).per_sample
            blind = model.predict(replace(batch, target=torch.full_like(batch.target, float("nan"))))
        assert prediction.shape == batch.latents.shape
        assert torch.equal(compared, flow.loss(bench.run.config, prediction, batch).per_sample)
        assert torch.equal(prediction, blind)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_driver_equals_the_networks_own_forward(self, bench: FamilyBench, checkpointing: bool) -> None:
        """Loss and every gradient are bit for bit those of the class's own forward."""
        model = bench.load()
        driven = bench.learn(model, StepContext(checkpointing=checkpointing))
        model.network.trampoline.enabled = False
        own = bench.learn(model, StepContext())
        assert torch.equal(driven[0], own[0])
        for name, gradient in own[1].items():
            assert _equal(driven[1][name], gradient), f"gradient of {name}"

    def test_tokens_can_be_routed(self, bench: FamilyBench) -> None:
        """A route over all tokens changes nothing; one over half of them does, and still trains."""
        model = bench.load()
        whole, _ = bench.learn(model, StepContext())
        kept_all, _ = bench.learn(model, StepContext(router=_router(1.0)))
        halved, gradients = bench.learn(model, StepContext(router=_router(0.5)))
        assert torch.equal(whole, kept_all)
        assert not torch.equal(whole, halved)
        assert all(gradient is not None for gradient in gradients.values())

    def test_sampling(self, bench: FamilyBench) -> None:
        """The same request gives the same clip, of the size asked for; another seed gives another one."""
        model = bench.load()
        model.network.module.eval()
        steps: list[int] = []
        predicted: list[tuple[int, Tensor]] = []
        first, again, other = (_sample(bench, model, seed, steps, predicted) for seed in (1, 1, 2))
        assert tuple(first.shape[1:]) == bench.spec.latents.shape(*self.clip)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert steps[-1] == len(steps) // 3, "on_step counts the steps done"
        assert [step for step, _ in predicted] in ([], steps), "on_prediction counts the steps done"
        assert all(latents.shape == first.shape for _, latents in predicted)
        assert torch.equal(first, _sample(bench, model, 1, steps)), "who watches changes nothing"
        frames = model.decode(first)
        assert tuple(frames.shape) == (*self.clip, 3)
        assert frames.dtype == torch.uint8


def _equal(ours: Tensor | None, theirs: Tensor | None) -> bool:
    return ours is theirs if ours is None or theirs is None else torch.equal(ours, theirs)


def _router(share: float) -> Any:
    """A router that keeps the first ``share`` of the tokens in every block but the outer ones."""

    def route(request: RouteRequest) -> list[TokenRoute]:
        batch, size, _ = request.tokens.shape
        keep = torch.arange(max(1, int(size * share))).expand(batch, -1)
        return [TokenRoute(min(1, request.blocks - 1), request.blocks, keep)]

    return route


def _sample(
    bench: FamilyBench, model: Model, seed: int, steps: list[int], predicted: list[tuple[int, Tensor]] | None = None
) -> Tensor:
    prompt, negative = bench.encode_captions(model, ("a cat walks", ""))
    frames, height, width = bench.clip
    with torch.no_grad():
        return model.sample(
            SampleRequest(
                prompt=prompt,
                negative=negative,
                width=width,
                height=height,
                frames=frames,
                steps=3,
                guidance=2.0,
                seed=seed,
                scheduler="euler",
                flow_shift=3.0,
                images={name: tensor for name, tensor in bench.cached[0][0].items() if name != "latents"},
                on_step=steps.append,
                on_prediction=None if predicted is None else lambda step, latents: predicted.append((step, latents)),
            )
        )
