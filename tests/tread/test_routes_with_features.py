"""Routes beside every other feature, in runs opened from a config: each learns what the same route learns without it.

Bit-equal wherever the arithmetic is the same: checkpointing, streaming of blocks, accumulation, two forwards before one
backward, and on every kind of base. What computes otherwise is held to a tolerance that is stated where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

import tuner_chunked_ff
from tuner.model import Batch
from tuner.testing.clips import render_clip
from tuner.testing.opened import opened
from tuner.train import step as training
from tuner.train.session import Session
from tuner.train.step import _loss, make_batch, train_step
from tuner_wan.tiny import build_tiny

WIDTH, HEIGHT, FRAMES, LAYERS = 96, 64, 9, 5
TOKENS = 3 * 4 * 6
MASKED = (TOKENS // 6, TOKENS // 3)
"""Tokens under the masks of the two clips."""
TI2V_TOKENS = 3 * 2 * 3
ROUTES = {
    "routes": [
        {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2},
        {"selection_ratio": 0.9, "start_layer_idx": 3, "end_layer_idx": -2},
    ]
}

FULL = {"gradient_checkpointing": True}
BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"mixed_precision": "bf16"},
    "int8-quanto": {"base_model_precision": "int8-quanto"},
    "ti2v": {"model": "ti2v-5b-2.2"},
}
"""What is trained on. Masks force some tokens, TI2V the first frame of every sample."""
FEATURES: dict[str, dict[str, Any]] = {
    "full": FULL,
    "selective": {"gradient_checkpointing": "selective"},
    "offload": {"gradient_checkpointing": "offload"},
    "every second": FULL | {"gradient_checkpointing_interval": 2},
    "streamed": FULL | {"enable_group_offload": True},
    "streamed, inputs too": {"gradient_checkpointing": "offload", "enable_group_offload": True},
    "streamed by twos": FULL | {"enable_group_offload": True, "group_offload_blocks_per_group": 2},
}
"""What must not change a bit."""
ONCE = {"every second", "streamed", "streamed, inputs too"}
"""Tried on one base alone."""
PAIRS = [(base, feature) for base in BASES for feature in FEATURES if base == "float32" or feature not in ONCE]
QUANTISED = ("int8-quanto", "int8-torchao", "nf4-bnb", "fp8-scaled")
"""Values of ``base_model_precision``, one of each backend."""


@dataclass(frozen=True)
class Learnt:
    """A training forward and backward."""

    losses: Tensor
    gradients: dict[str, Tensor]
    tokens: list[int]
    """that each block saw, in order, recomputation included"""
    widest: int
    """most tokens that a feed-forward computed at a time"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, masks over a third of one and a sixth of the other, and a tiny model of each flavour that is used."""
    folder = tmp_path_factory.mktemp("features")
    for index in range(2):
        path = folder / "clips" / f"{index}.mp4"
        path.parent.mkdir(exist_ok=True)
        render_clip(path, width=WIDTH, height=HEIGHT, frames=FRAMES, fps=16, seed=index)
        path.with_suffix(".txt").write_text(f"shapes number {index}", encoding="utf-8")
    (folder / "masks").mkdir()
    for index, share in enumerate((3, 6)):
        mask = Image.new("L", (WIDTH, HEIGHT))
        mask.paste(255, (0, 0, WIDTH // share, HEIGHT))
        mask.save(folder / "masks" / f"{index}.png")
    for flavour in ("t2v-480p-1.3b-2.1", "ti2v-5b-2.2"):
        build_tiny(folder / flavour, flavour, layers=LAYERS, head_dim=32, ffn_dim=128)
    return folder


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A flat config. ``model`` names the flavour; clips are masked for T2V."""

    def make(*, model: str = "t2v-480p-1.3b-2.1", **keys: Any) -> dict[str, Any]:
        clips = {
            "id": "clips",
            "dataset_type": "video",
            "instance_data_dir": str(folder / "clips"),
            "cache_dir_vae": str(folder / "cache"),
            "resolution": HEIGHT,
            "resolution_type": "pixel",
            "video": {"num_frames": FRAMES},
        }
        masks = {
            "id": "masks",
            "dataset_type": "conditioning",
            "conditioning_type": "mask",
            "instance_data_dir": str(folder / "masks"),
        }
        text = {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": str(folder / "text")}
        masked = model.startswith("t2v")
        data = [clips | {"conditioning_data": "masks"}, masks, text] if masked else [clips, text]
        return {
            "model_family": "wan",
            "model_flavour": model,
            "pretrained_model_name_or_path": str(folder / model),
            "output_dir": str(tmp_path / "output"),
            "mixed_precision": "no",
            "gradient_checkpointing": False,
            "max_train_steps": 4,
            "train_batch_size": 2,
            "lora_rank": 4,
            "tread_config": ROUTES,
            "data_backend_config": data,
            **keys,
        }

    return make


def adapted(session: Session) -> dict[str, nn.Parameter]:
    """The LoRA's parameters, with values: a fresh one is zero, and so would be half of its gradients."""
    adapter = session.model.network.adapter
    assert adapter is not None
    parameters = dict(adapter.groups[0].parameters)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in parameters.values():
            each.copy_(torch.randn(each.shape, generator=generator) / 10)
    return parameters


def first_batch(session: Session, slot: int = 0) -> Batch:
    return make_batch(session, session.loader.load(session.run.step, slot))


def take(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients, taken away."""
    gradients = {name: each.grad for name, each in parameters.items() if each.grad is not None}
    for each in parameters.values():
        each.grad = None
    assert len(gradients) == len(parameters) > 0
    return gradients


def learn(keys: dict[str, Any]) -> Learnt:
    """Open the run and learn from its first batch."""
    with opened(keys) as session:
        parameters = adapted(session)
        tokens: list[int] = []
        chunks: list[int] = []
        for block in session.model.network.stack.blocks:
            block.register_forward_pre_hook(
                lambda _, arguments: tokens.append(arguments[0].shape[1]) if torch.is_grad_enabled() else None
            )
            feed_forward: Any = block.ffn
            feed_forward.net[0].register_forward_pre_hook(lambda _, arguments: chunks.append(arguments[0].shape[1]))
        losses = _loss(session, first_batch(session), 0).per_sample
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return Learnt(losses.detach(), take(parameters), tokens, max(chunks))


def assert_bit_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name, each in ours.items() if not torch.equal(each, theirs[name])]


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """|ours - theirs| / |theirs| of all gradients together."""
    assert ours.keys() == theirs.keys()
    difference, size = (
        torch.stack([each.float().norm() for each in tensors]).norm()
        for tensors in ([ours[name] - each for name, each in theirs.items()], theirs.values())
    )
    return float(difference / size)


@pytest.fixture(scope="module")
def known() -> dict[str, Learnt]:
    return {}


@pytest.fixture
def plain(settings: Callable[..., dict[str, Any]], known: dict[str, Learnt]) -> Callable[[str], Learnt]:
    """What a base learns with routes and nothing else."""

    def learnt(base: str) -> Learnt:
        if base not in known:
            known[base] = learn(settings(**BASES[base]))
        return known[base]

    return learnt


@pytest.mark.parametrize(("base", "feature"), PAIRS)
def test_a_feature_changes_nothing_of_a_route(
    settings: Callable[..., dict[str, Any]], plain: Callable[[str], Learnt], base: str, feature: str
) -> None:
    alone, together = plain(base), learn(settings(**BASES[base], **FEATURES[feature]))
    whole, half, few = (TI2V_TOKENS, TI2V_TOKENS // 2, 6) if base == "ti2v" else (TOKENS, TOKENS // 2, MASKED[1])
    assert alone.tokens == [whole, half, half, few, whole], "the second route keeps no fewer than are forced"
    assert together.tokens[:LAYERS] == alone.tokens
    assert len(together.tokens) > LAYERS, "the feature computes blocks again"
    assert torch.equal(together.losses, alone.losses)
    assert_bit_equal(together.gradients, alone.gradients)


@pytest.mark.parametrize("base", BASES)
def test_chunked_feed_forward_changes_the_order_of_sums_alone(
    settings: Callable[..., dict[str, Any]],
    plain: Callable[[str], Learnt],
    monkeypatch: pytest.MonkeyPatch,
    base: str,
) -> None:
    """Chunks of 8 tokens. A layer's rows are the same products, but matrix kernels sum by the number of rows."""
    monkeypatch.setattr(tuner_chunked_ff, "TOKENS_PER_UNIT", 8)
    chunked = {"enable_chunked_feed_forward": True, "feed_forward_chunk_size": 1}
    alone, together = plain(base), learn(settings(**BASES[base], **chunked))
    assert alone.widest == alone.tokens[0]
    assert together.widest <= 8
    tolerance = 2**-7 if base == "bf16" else 1e-5
    torch.testing.assert_close(together.losses, alone.losses, rtol=tolerance, atol=0)
    assert distance(together.gradients, alone.gradients) < tolerance


def test_bf16_is_as_near_to_float32_as_its_8_bits_allow(plain: Callable[[str], Learnt]) -> None:
    exact, rounded = plain("float32"), plain("bf16")
    assert rounded.tokens == exact.tokens
    torch.testing.assert_close(rounded.losses, exact.losses, rtol=2**-7, atol=0)
    assert distance(rounded.gradients, exact.gradients) < 2**-6


@pytest.mark.parametrize("precision", QUANTISED)
def test_on_a_quantised_base_routes_do_what_they_do_on_the_same_weights(
    settings: Callable[..., dict[str, Any]], precision: str
) -> None:
    """Against the quantised weights written out in float32, as each layer shows them when it is given unit vectors.

    Only the layers' own arithmetic differs (scales before or after the sum): 1e-5.
    """
    written: dict[str, Tensor] = {}
    with opened(settings(base_model_precision=precision)) as session:
        parameters = adapted(session)
        for name, layer in base_layers(session).items():
            with torch.no_grad():
                shown = layer(torch.eye(layer.in_features))
                written[name] = (shown - layer(torch.zeros(1, layer.in_features))).T.clone()
        losses = _loss(session, first_batch(session), 0).per_sample
        losses.sum().backward()  # type: ignore[no-untyped-call]
        quantised = take(parameters)
    with opened(settings()) as session:
        parameters = adapted(session)
        layers = base_layers(session)
        assert layers.keys() == written.keys()
        differing = 0
        with torch.no_grad():
            for name, layer in layers.items():
                differing += not torch.equal(layer.weight, written[name])
                layer.weight.copy_(written[name])
        assert differing == len(layers), "the weights were quantised"
        expected = _loss(session, first_batch(session), 0).per_sample
        expected.sum().backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
        assert distance(quantised, take(parameters)) < 1e-5


def base_layers(session: Session) -> dict[str, Any]:
    """The matrices of the blocks, below LoRA."""
    found: dict[str, Any] = {}
    for name, module in session.model.network.stack.module.named_modules():
        if name.startswith("blocks.") and hasattr(module, "in_features") and "lora" not in name:
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            found.setdefault(name.removesuffix(".base_layer"), base)
    return found


def test_lora_is_what_it_is_merged(settings: Callable[..., dict[str, Any]]) -> None:
    """Beside the base or added to its weights: the routed loss is the same to rounding."""
    with opened(settings()) as session:
        fresh = _loss(session, first_batch(session), 0).per_sample
        adapted(session)
        beside = _loss(session, first_batch(session), 0).per_sample
        for module in session.model.network.module.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        merged = _loss(session, first_batch(session), 0).per_sample
    assert (beside - fresh).abs().min() > 1e-3
    torch.testing.assert_close(merged, beside, rtol=1e-5, atol=0)


CHECKPOINTING = (False, True, "selective", "offload")


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_accumulated_gradients_are_the_sum_of_each_micro_batch(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, checkpointing: bool | str
) -> None:
    """In the real step: two micro-batches, each with its own routes and its own number of kept tokens."""
    accumulated: dict[str, Tensor] = {}
    keys = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing}
    with opened(settings(**keys)) as session:
        parameters = adapted(session)
        apart, kept = [], []
        for slot in range(2):
            batch = first_batch(session, slot)
            kept.append(batch.keep_at_least)
            (_loss(session, batch, slot).per_sample.sum() / 2).backward()  # type: ignore[no-untyped-call]
            apart.append(take(parameters))

        def clip(session: Session) -> Tensor:
            accumulated.update({name: each.grad.clone() for name, each in parameters.items() if each.grad is not None})
            return torch.zeros(())

        monkeypatch.setattr(training, "clip_gradients", clip)
        train_step(session)
    assert sorted(kept) == [*MASKED]
    assert_bit_equal(accumulated, {name: apart[0][name] + apart[1][name] for name in parameters})


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_two_forwards_before_one_backward_keep_their_own_routes(
    settings: Callable[..., dict[str, Any]], checkpointing: bool | str
) -> None:
    with opened(settings(gradient_checkpointing=checkpointing)) as session:
        parameters = adapted(session)
        batch = first_batch(session)
        apart = []
        for session.run.step in (0, 1):
            _loss(session, batch, 0).per_sample.sum().backward()  # type: ignore[no-untyped-call]
            apart.append(take(parameters))
        total = torch.zeros(())
        for session.run.step in (0, 1):
            total = total + _loss(session, batch, 0).per_sample.sum()
        session.run.step = 2
        total.backward()  # type: ignore[no-untyped-call]
        together = take(parameters)
    assert distance(apart[1], apart[0]) > 0.01, "another step keeps other tokens"
    assert_bit_equal(together, {name: apart[0][name] + apart[1][name] for name in parameters})


@pytest.mark.parametrize("base", BASES)
def test_all_features_together(
    settings: Callable[..., dict[str, Any]],
    plain: Callable[[str], Learnt],
    monkeypatch: pytest.MonkeyPatch,
    base: str,
) -> None:
    """Against the route with none of them; the tolerance is that of chunked feed-forward."""
    monkeypatch.setattr(tuner_chunked_ff, "TOKENS_PER_UNIT", 8)
    features = {"enable_chunked_feed_forward": True, "feed_forward_chunk_size": 1, "enable_group_offload": True}
    together, alone = learn(settings(**BASES[base], **FULL, **features)), plain(base)
    assert together.tokens[:LAYERS] == alone.tokens
    assert alone.widest == alone.tokens[0]
    assert together.widest <= 8
    tolerance = 2**-7 if base == "bf16" else 1e-5
    torch.testing.assert_close(together.losses, alone.losses, rtol=tolerance, atol=0)
    assert distance(together.gradients, alone.gradients) < tolerance
