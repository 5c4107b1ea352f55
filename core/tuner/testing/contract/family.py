"""What every model family is held to, beside what every plugin is."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tuner import flow
from tuner.blocks import RouteRequest, StepContext, TokenRoute
from tuner.model import Model, SampleRequest
from tuner.selection import discover
from tuner.testing.contract.plugin import imported_by
from tuner.testing.family import FamilyBench


class FamilyContract:
    """A model family describes, loads, encodes, learns and samples as the core relies on."""

    plugin: ClassVar[str]
    clip: ClassVar[tuple[int, int, int]] = (9, 32, 48)
    """Frames, height and width of the clips it is tried with."""
    _bench: ClassVar[FamilyBench]
    _folder: ClassVar[tempfile.TemporaryDirectory[str]]

    def build(self, folder: Path) -> dict[str, Any]:
        """Write a tiny model into ``folder``; returns the core keys that a run with it needs."""
        raise NotImplementedError

    @property
    def bench(self) -> FamilyBench:
        """The family with a tiny model, ready to be tried; built once for all checks of a class."""
        cls = type(self)
        if "_bench" not in vars(cls):
            cls._folder = tempfile.TemporaryDirectory(prefix=f"{self.plugin}-")  # removed when the program ends
            family = discover()[self.plugin].load()
            made = self.build(Path(cls._folder.name))
            cls._bench = FamilyBench(family(self.plugin, family.Config()), made, self.clip)
        return cls._bench

    def test_description_needs_no_torch(self) -> None:
        """``tuner check`` is quick because of this."""
        heavy = imported_by(
            "import json\n"
            "from tuner.config.keys import CoreConfig\n"
            "from tuner.run import Run\n"
            "from tuner.selection import discover\n"
            f"cls = discover()[{self.plugin!r}].load()\n"
            f"core = CoreConfig(**json.loads({json.dumps(self.bench.settings)!r}))\n"
            f"cls({self.plugin!r}, cls.Config()).describe_model(run=Run(core, {{}}))",
            ("torch", "diffusers", "transformers"),
        )
        assert not heavy, f"describe_model imports {', '.join(heavy)}"

    def test_description_fits_the_model(self) -> None:
        """Names, counts and sizes of the description are the model's."""
        model, spec = self.bench.load(), self.bench.spec
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

    def test_networks_load_without_storage(self) -> None:
        """Nothing is read before the core asks for it; buffers are real, for nobody would fill them."""
        for network in self.bench.hand_over().networks.values():
            assert all(parameter.is_meta for parameter in network.module.parameters())
            assert not any(buffer.is_meta for buffer in network.module.buffers())

    def test_weights_have_their_dtype(self) -> None:
        """Every parameter is filled, in the dtype the family names, and frozen."""
        for network in self.bench.load().networks.values():
            for name, parameter in network.module.named_parameters():
                assert not parameter.is_meta, f"{name} was never filled"
                assert parameter.dtype == network.dtype_of(name), name
                assert not parameter.requires_grad, name

    def test_feed_forwards_are_token_wise(self) -> None:
        """What is offered for chunking may be run on any part of the tokens."""
        for network in self.bench.load().networks.values():
            for name, module in network.feed_forwards.items():
                dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
                tokens = torch.randn(1, 4, network.spec.dim, dtype=dtype)
                with torch.no_grad():
                    whole, part = module(tokens), module(tokens[:, 1:3])
                assert whole.shape == tokens.shape, name
                torch.testing.assert_close(whole[:, 1:3], part, msg=name)

    def test_clips_are_encoded(self) -> None:
        """Latents have the described shape, are finite, and do not depend on the other clips of the batch."""
        model = self.bench.hand_over()
        encoded = self.bench.encode_clips(model, self.bench.pixels)
        assert len(encoded) == len(self.bench.pixels)
        for tensors in encoded:
            assert tuple(tensors["latents"].shape) == self.bench.spec.latents.shape(*self.clip)
            for name, tensor in tensors.items():
                assert torch.isfinite(tensor).all(), name
                assert not tensor.requires_grad, name
        alone = self.bench.encode_clips(model, self.bench.pixels[:1])[0]
        torch.testing.assert_close(alone["latents"], encoded[0]["latents"], rtol=1e-4, atol=1e-5)

    def test_captions_are_encoded(self) -> None:
        """Each caption has its true length, the empty one included, and longer ones are cut to what the model reads."""
        model = self.bench.hand_over()
        limit = self.bench.spec.networks[0].text_tokens
        captions = ("", "a cat walks", "一只猫", "word " * (2 * limit))
        lengths = [len(next(iter(each.values()))) for each in self.bench.encode_captions(model, captions)]
        assert lengths[0] >= 1
        assert lengths[1] > lengths[0]
        assert max(lengths) <= limit
        assert lengths[3] == limit

    def test_loss_reaches_every_weight(self) -> None:
        """One loss per sample, and a finite gradient for every parameter of the network."""
        model = self.bench.load()
        losses, gradients = self.bench.learn(model, StepContext())
        assert losses.shape == (len(self.bench.pixels),)
        assert losses.dtype == torch.float32
        assert torch.isfinite(losses).all()
        missing = [
            name for name, gradient in gradients.items() if gradient is None or not torch.isfinite(gradient).all()
        ]
        assert not missing, f"no finite gradient: {missing}"

    def test_loss_is_that_of_the_prediction(self) -> None:
        """``predict`` gives a velocity for each latent, ``compute_loss`` compares it, and no target is looked at."""
        model, batch = self.bench.load(), self.bench.batch(self.bench.hand_over())
        with torch.no_grad():
            prediction = model.predict(batch)
            compared = self.bench.hook.compute_loss(run=self.bench.run, model=model, batch=batch).per_sample
            blind = model.predict(replace(batch, target=torch.full_like(batch.target, float("nan"))))
        assert prediction.shape == batch.latents.shape
        assert torch.equal(compared, flow.loss(self.bench.run.config, prediction, batch).per_sample)
        assert torch.equal(prediction, blind)

    def test_driver_equals_the_networks_own_forward(self) -> None:
        """Loss and every gradient are bit for bit those of the class's own forward."""
        self._driver_equals_own_forward(checkpointing=False)

    def test_driver_with_checkpointing_equals_the_networks_own_forward(self) -> None:
        """The same, with each block computed again in backward."""
        self._driver_equals_own_forward(checkpointing=True)

    def _driver_equals_own_forward(self, checkpointing: bool) -> None:
        model = self.bench.load()
        driven = self.bench.learn(model, StepContext(checkpointing=checkpointing))
        model.network.trampoline.enabled = False
        own = self.bench.learn(model, StepContext())
        assert torch.equal(driven[0], own[0])
        for name, gradient in own[1].items():
            assert _equal(driven[1][name], gradient), f"gradient of {name}"

    def test_tokens_can_be_routed(self) -> None:
        """A route over all tokens changes nothing; one over half of them does, and still trains."""
        model = self.bench.load()
        whole, _ = self.bench.learn(model, StepContext())
        kept_all, _ = self.bench.learn(model, StepContext(router=_router(1.0)))
        halved, gradients = self.bench.learn(model, StepContext(router=_router(0.5)))
        assert torch.equal(whole, kept_all)
        assert not torch.equal(whole, halved)
        assert all(gradient is not None for gradient in gradients.values())

    def test_sampling(self) -> None:
        """The same request gives the same clip, of the size asked for; another seed gives another one."""
        model = self.bench.load()
        model.network.module.eval()
        steps: list[int] = []
        predicted: list[tuple[int, Tensor]] = []
        first, again, other = (_sample(self.bench, model, seed, steps, predicted) for seed in (1, 1, 2))
        assert tuple(first.shape[1:]) == self.bench.spec.latents.shape(*self.clip)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert steps[-1] == len(steps) // 3, "on_step counts the steps done"
        assert [step for step, _ in predicted] in ([], steps), "on_prediction counts the steps done"
        assert all(latents.shape == first.shape for _, latents in predicted)
        assert torch.equal(first, _sample(self.bench, model, 1, steps)), "who watches changes nothing"
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
