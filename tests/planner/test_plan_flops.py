"""The FLOP model against torch's own counter on real networks, and against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from tuner.blocks import StepContext, install
from tuner.builtin.checkpointing.selective import Selective
from tuner.builtin.planner.cards import CARDS, of_device
from tuner.builtin.planner.speed import speed_up, step_seconds
from tuner.checkpointing import Checkpointing
from tuner.config.keys import CoreConfig
from tuner.flops import StepFlops, step_flops
from tuner.spec import LatentGeometry, NetworkSpec
from tuner.workload import Workload
from tuner_chunked_ff.chunk import install as install_chunks
from tuner_kernels import block as fused
from tuner_kernels import costs
from tuner_wan.describe import describe
from tuner_wan.dimensions import linears
from tuner_wan.flavours import FLAVOURS
from tuner_wan.stack import WanStack

TERA = 1e12
SMALL, LARGE, TI2V = "t2v-480p-1.3b-2.1", "t2v-480p-14b-2.1", "ti2v-5b-2.2"
FULL_CLIP, SHORT_CLIP, PICTURE = (81, 480, 832), (33, 480, 832), (1, 480, 832)
LORA = LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def workload(flavour: str, shape: tuple[int, int, int], **changes: Any) -> Workload:
    """A LoRA of rank 16 on the attention of a model of real dimensions, one clip, every block checkpointed."""
    spec = describe(CoreConfig(model_flavour=flavour))
    network = spec.networks[0]
    adapters = 8 * 16 * 2 * network.dim * network.blocks
    plain = Workload(
        network, spec.latents, shape, 1, adapter_parameters=adapters, adapter_parameters_on_text=adapters // 4
    )
    return replace(plain, **changes)


def of_network(found: StepFlops) -> float:
    return found.forward.linear + found.forward.attention


@pytest.mark.parametrize(
    ("flavour", "shape", "tokens", "share", "none", "full", "trained", "model"),
    [
        (SMALL, FULL_CLIP, 32760, 0.70, 869, 1153, 1232, 767),
        (SMALL, SHORT_CLIP, 14040, 0.50, 203, 276, 311, 184),
        (SMALL, PICTURE, 1560, 0.10, 10, 15, 19, 10),
        (LARGE, FULL_CLIP, 32760, 0.52, 4702, 6383, 7160, 4250),
        (LARGE, (49, 480, 832), 20280, 0.40, 2186, 3020, 3503, 2010),
        (LARGE, (81, 720, 1280), 75600, 0.72, 20133, 26662, 28450, 17760),
    ],
)
def test_steps_of_wan_in_tflop(
    flavour: str, shape: tuple[int, int, int], tokens: int, share: float, none: int, full: int, trained: int, model: int
) -> None:
    """Figures of an independent model of Wan alone, which was held to counts and to published speeds."""
    checkpointed = workload(flavour, shape)
    whole = replace(checkpointed, trained="network", adapter_parameters=0, adapter_parameters_on_text=0)
    assert checkpointed.tokens == tokens
    found = step_flops(checkpointed)
    assert round(found.hardware / TERA) == full
    assert round(found.model / TERA) == model
    assert found.self_attention_share == pytest.approx(share, abs=0.006)
    assert round(step_flops(replace(checkpointed, checkpointing="none")).hardware / TERA) == none
    assert round(step_flops(whole).hardware / TERA) == trained


@pytest.mark.parametrize("flavour", [SMALL, "i2v-14b-2.1", "flf2v-14b-2.1", "i2v-14b-2.2-high", TI2V])
def test_every_kind_of_wan_is_counted_as_torch_counts_it(flavour: str) -> None:
    """Parameters exactly, the forward to a thousandth: two blocks of the real class and width, without storage."""
    facts, spec = FLAVOURS[flavour], describe(CoreConfig(model_flavour=flavour))
    network = replace(spec.networks[0], blocks=2)
    image: dict[str, int] = {"image_dim": 1280, "added_kv_proj_dim": facts.dim} if facts.image_context else {}
    if facts.condition == "first_and_last_frame":
        image["pos_embed_seq_len"] = 514
    with torch.device("meta"):
        module = WanTransformer3DModel(
            num_attention_heads=facts.heads,
            in_channels=facts.in_channels,
            out_channels=facts.latent_channels,
            ffn_dim=facts.ffn_dim,
            num_layers=network.blocks,
            **image,
        )
        work = Workload(network, spec.latents, (17, 480, 832), 1)
        latents = spec.latents.shape(17, 480, 832)
        times = torch.zeros(1, work.tokens) if network.per_token_times else torch.zeros(1)
        frames = torch.randn(network.image_tokens // 257, 257, 1280) if image else None
        inputs = torch.randn(1, facts.in_channels, *latents[1:]), times, torch.randn(1, 512, 4096), frames
    block = sum(linear.inputs * linear.outputs for linear in network.matrices) + network.small
    assert block == sum(each.numel() for each in module.blocks[0].parameters())
    assert network.blocks * block + network.other == sum(each.numel() for each in module.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    assert of_network(step_flops(work)) == pytest.approx(counter.get_total_flops(), rel=1e-3)


BLOCKS, DIM, WIDE, TEXT, TOKENS = 4, 384, 1024, 256, 1280
GRID, SHORT_GRID = (5, 32, 32), (5, 16, 16)
NETWORK = NetworkSpec("net", BLOCKS, DIM, 3, WIDE, TEXT, 512, 16)
OF_WAN = replace(NETWORK, linears=linears(DIM, WIDE))
IN_FEW = partial(costs.activations, kernels=False)


def counted(mode: str, checkpointing: Checkpointing | None, chunk: int | None, *, few: bool = False) -> dict[str, int]:
    """FLOP by operator that torch counts in a forward and a backward under the block driver, without storage.

    Fused blocks (``few``) are computed, on a quarter of the tokens: they switch autocast off, which meta has not.
    """
    with torch.device("cpu" if few else "meta"):
        module = WanTransformer3DModel(num_attention_heads=3, text_dim=TEXT, ffn_dim=WIDE, num_layers=BLOCKS)
        grid = SHORT_GRID if few else GRID
        inputs = torch.randn(1, 16, *grid), torch.zeros(1), torch.randn(1, 512, TEXT)
    if mode == "lora":
        module.requires_grad_(False)
        module.add_adapter(LORA)
    install(module.train(), WanStack(module)).context = StepContext(checkpointing=checkpointing)
    if chunk is not None:
        for block in module.blocks:
            install_chunks(block.ffn, chunk)
    for block in module.blocks if few else ():
        fused.install(block)
    # Which torch does not count by itself.
    in_place = {torch.ops.aten.addmm_: lambda _, one, other, **__: 2 * prod(one) * other[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        (output,) = module(*inputs, return_dict=False)
        output.square().mean().backward()
    return {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}


FIRST = 2.0 * TOKENS * 3 * (DIM * DIM + DIM * 16)
"""Torch finds that the first block's input needs no gradient: three matrices and their adapters less."""


def policy(name: str, interval: int) -> Checkpointing | None:
    """Checkpointing by its name."""
    return {"none": None, "full": Checkpointing(interval), "selective": Selective(interval)}[name]


def small(mode: str, name: str, interval: int, chunk: int | None) -> Workload:
    """What :func:`counted` runs."""
    adapters = BLOCKS * 8 * 16 * 2 * DIM if mode == "lora" else 0
    return Workload(
        NETWORK,
        LatentGeometry(16, 4, 8),
        (17, 256, 256),
        1,
        trained="adapter" if mode == "lora" else "network",
        adapter_parameters=adapters,
        adapter_parameters_on_text=adapters // 4,
        checkpointing=name,
        checkpointing_interval=interval,
        feed_forward_tokens=chunk,
    )


@pytest.mark.parametrize(
    ("mode", "name", "interval", "chunk"),
    [
        ("lora", "none", 1, None),
        ("lora", "full", 1, None),
        ("lora", "full", 2, None),
        ("lora", "selective", 1, None),
        ("lora", "none", 1, 400),
        ("lora", "full", 1, 400),
        ("network", "none", 1, None),
        ("network", "full", 1, None),
        ("network", "full", 1, 400),
    ],
)
def test_a_whole_step_is_counted_as_torch_counts_it(mode: str, name: str, interval: int, chunk: int | None) -> None:
    """Forward, recomputation and backward, the product's own code."""
    operators = counted(mode, policy(name, interval), chunk)
    found = step_flops(small(mode, name, interval, chunk))
    first = FIRST if mode == "lora" else 0.0
    attention = operators.pop("aten.bmm")
    assert sum(operators.values()) == pytest.approx(found.linear - first, rel=5e-3)
    if name != "selective":  # without storage torch takes its plain kernel, which cannot be kept, and whose
        # backward is four products for two
        assert attention == pytest.approx(found.attention_forward + found.backward.attention * 2 / 2.5, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "interval", "chunk", "times"),
    [("none", 1, None, 0), ("full", 2, None, 2), ("selective", 1, None, 4), ("full", 1, 100, 0)],
)
def test_a_fused_block_computes_its_last_product_once(name: str, interval: int, chunk: int | None, times: int) -> None:
    """In so many of four blocks: those that are checkpointed, and whose feed-forward is not chunked."""
    operators = counted("lora", policy(name, interval), chunk, few=True)
    plain = replace(small("lora", name, interval, chunk), network=OF_WAN, shape=(17, 128, 128))
    found = step_flops(replace(plain, activations=IN_FEW))
    del operators["aten.bmm"]  # sums over rows, written as products
    assert sum(operators.values()) == pytest.approx(found.linear - FIRST / 4, rel=5e-3)
    assert step_flops(plain).hardware - found.hardware == times * 2 * plain.tokens * DIM * WIDE
    assert found.model == step_flops(plain).model


def test_selective_checkpointing_computes_self_attention_once() -> None:
    full = workload(SMALL, FULL_CLIP)
    all_of_it, kept = step_flops(full), step_flops(replace(full, checkpointing="selective"))
    assert all_of_it.hardware - kept.hardware == pytest.approx(all_of_it.self_attention)
    assert step_flops(replace(full, checkpointing="offload")) == all_of_it


def test_more_clips_and_more_micro_batches_are_more_of_the_same() -> None:
    one = workload(SMALL, PICTURE)
    six = replace(one, samples=2, micro_batches=3)
    assert step_flops(six).hardware == pytest.approx(6 * step_flops(one).hardware)
    assert step_seconds(six, CARDS["H100"]) == pytest.approx(6 * step_seconds(one, CARDS["H100"]))


@pytest.mark.parametrize(
    ("flavour", "shape", "seconds"),
    [
        (SMALL, (81, 480, 480), 1.152),
        (SMALL, FULL_CLIP, 2.684),
        (LARGE, (81, 480, 480), 5.973),
        (LARGE, FULL_CLIP, 13.402),
    ],
)
def test_seconds_on_an_h100(flavour: str, shape: tuple[int, int, int], seconds: float) -> None:
    """Figures of the same independent model, with measured rates and counted bytes of diffusers' block."""
    assert step_seconds(workload(flavour, shape), CARDS["H100"]) == pytest.approx(seconds, rel=2e-3)


def test_what_comes_over_the_bus_is_hidden_behind_long_blocks_and_shows_behind_short_ones() -> None:
    card = CARDS["H100"]
    clip, picture = workload(LARGE, FULL_CLIP), workload(LARGE, PICTURE)
    assert step_seconds(replace(clip, resident_blocks=2), card) == step_seconds(clip, card)
    assert step_seconds(replace(clip, checkpointing="offload"), card) == step_seconds(clip, card)
    streamed = replace(picture, resident_blocks=2)
    moved = 2 * 38 * 351.39e6 * 2  # forward and backward, 38 blocks of bf16
    assert step_seconds(streamed, card) == pytest.approx(moved / (card.pcie * 1e9), rel=0.01)
    assert step_seconds(replace(streamed, weight_bytes=1.0), card) < 0.55 * step_seconds(streamed, card)


@pytest.mark.parametrize(("dropped", "gain"), [(0.1, 1.18), (0.25, 1.55), (0.5, 2.66)])
def test_routes_speed_a_step_up_by_its_own_arithmetic(dropped: float, gain: float) -> None:
    shares = (0.0, 0.0, *(dropped,) * 27, 0.0)
    routed = workload(SMALL, FULL_CLIP, dropped=shares)
    assert speed_up(routed) == pytest.approx(gain, abs=0.005)
    # By hand: blocks that see a share k of the tokens do k of the work for each token, and k squared of self-attention.
    plain, whole = step_flops(replace(routed, dropped=())), step_flops(routed)
    assert whole.self_attention / plain.self_attention == pytest.approx((3 + 27 * (1 - dropped) ** 2) / 30, rel=1e-4)
    # Traffic follows the tokens, not their square.
    assert 1 < speed_up(routed, CARDS["H100"]) < speed_up(routed)
    assert speed_up(replace(routed, dropped=())) == 1


@pytest.mark.parametrize(
    ("device", "gibibytes", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA H100 PCIe", 79.1, None),
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100-80"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "A100-40"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA GeForce RTX 3060 Ti", 8, None),
        ("NVIDIA L40S", 44.4, "L40S"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95, "RTX PRO 6000"),
        ("Tesla T4", 15, None),
    ],
)
def test_cards_are_told_by_what_drivers_call_them(device: str, gibibytes: float, card: str | None) -> None:
    found = of_device(device, gibibytes)
    assert (found and found.name) == card
