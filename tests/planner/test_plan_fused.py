"""What `tuner plan` says of fused blocks, beside what is counted in ``test_plan_memory`` and ``test_plan_flops``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuner import pipeline
from tuner.assembly import assemble, new_run
from tuner.builtin.planner.memory import predict
from tuner.data.samples import Bucket
from tuner.flops import step_flops
from tuner.spec import NetworkSpec
from tuner.workload import Workload

CLIP = Bucket(81, 480, 832)
LAYER_BY_LAYER = {"enable_group_offload": True, "group_offload_use_stream": True, "group_offload_type": "leaf_level"}
FEED_FORWARD = ["to_q", "to_v", "ffn.net.0.proj", "ffn.net.2"]


def planned(folder: Path, network: NetworkSpec | None = None, **keys: Any) -> Workload:
    """A step of 14B on a clip of five seconds."""
    settings = {"model_family": "wan", "model_flavour": "t2v-480p-14b-2.1", "output_dir": str(folder)}
    assembly = assemble({**settings, "max_train_steps": 1, "fused_blocks": True, **keys})
    run = new_run(assembly)
    spec = pipeline.describe(run, assembly.manager)
    assert run.estimate is not None
    return run.estimate(network or spec.networks[0], CLIP, 1)


def at_work(workload: Workload) -> float:
    """Bytes of the block at work, in units of all its tokens in bfloat16."""
    return predict(workload).device["block at work"] / (workload.tokens * workload.network.dim * 2)


def feed_forward_again(workload: Workload) -> float:
    """How often the last product of the feed-forward is computed again, in forwards of it."""
    network = workload.network
    one = 2.0 * workload.tokens * network.dim * network.ffn_dim * network.blocks
    plain = step_flops(replace(workload, activations=None)).recompute.linear
    return 1 - (plain - step_flops(workload).recompute.linear) / one


def test_a_fused_block_at_work_holds_less_than_half_of_a_plain_one(tmp_path: Path) -> None:
    fused, plain = planned(tmp_path), planned(tmp_path, fused_blocks=False)
    assert at_work(fused) < 0.5 * at_work(plain)
    assert feed_forward_again(fused) == pytest.approx(0)
    assert step_flops(fused).hardware < step_flops(plain).hardware


@pytest.mark.parametrize(
    "keys",
    [
        LAYER_BY_LAYER,
        {"base_model_precision": "int8-quanto"},
        {"lora_dropout": 0.1, "lora_target_modules": FEED_FORWARD},
        {"use_dora": True, "lora_format": "diffusers", "lora_target_modules": FEED_FORWARD},
    ],
)
def test_a_feed_forward_left_to_its_own_modules_is_kept_and_computed_again(
    keys: Mapping[str, Any], tmp_path: Path
) -> None:
    targets = {name: value for name, value in keys.items() if name == "lora_target_modules"}
    fused, apart = planned(tmp_path, **targets), planned(tmp_path, **keys)
    assert at_work(apart) - at_work(fused) > 2
    assert feed_forward_again(fused) == pytest.approx(0)
    assert feed_forward_again(apart) == 1


def test_lora_by_itself_keeps_what_it_is_given_and_the_feed_forward_is_none_of_it(tmp_path: Path) -> None:
    plain, apart = planned(tmp_path), planned(tmp_path, lora_dropout=0.1)
    assert at_work(apart) - at_work(plain) == pytest.approx(2, abs=0.1)  # two normed tensors
    assert feed_forward_again(apart) == pytest.approx(0)


def test_without_checkpointing_nothing_is_made_again(tmp_path: Path) -> None:
    workload = planned(tmp_path, gradient_checkpointing=False)
    assert step_flops(workload).recompute.linear == 0
    held = workload.activations and workload.activations(workload, workload.tokens, False)
    assert held is not None
    assert held.kept.wide == 1


def test_of_other_blocks_nothing_is_said(tmp_path: Path) -> None:
    usual = NetworkSpec("other", 4, 256, 2, 1024, 128, 77, 16)
    assert planned(tmp_path, usual).activations is None
    assert planned(tmp_path, model_type="full").activations is None
