"""Shapes of a Wan's weights, which adapter files are held against, are those of diffusers' own class."""

from __future__ import annotations

import pytest
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from tuner.config.keys import CoreConfig
from tuner_wan.describe import describe, known
from tuner_wan.flavours import FLAVOURS
from tuner_wan.tiny import build_tiny


@pytest.mark.parametrize("flavour", ["t2v-480p-1.3b-2.1", "i2v-14b-2.1", "i2v-14b-2.2-both", "flf2v-14b-2.1"])
def test_they_are_those_of_the_network(tmp_path, flavour):
    folder = build_tiny(tmp_path / "tiny", flavour)
    spec = describe(CoreConfig(pretrained_model_name_or_path=str(folder), model_flavour=flavour))
    for network in spec.networks:
        with init_empty_weights():
            module = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder / network.name))
        held = {
            name.removesuffix(".weight"): tuple(each.shape)
            for name, each in module.named_parameters()
            if name.endswith(".weight")
        }
        assert dict(network.weights) == held


def test_every_flavour_is_known_without_files():
    specs = known(CoreConfig())
    assert [spec.flavour for spec in specs] == list(FLAVOURS)
    large = next(spec for spec in specs if spec.flavour == "i2v-14b-2.1").networks[0].weights
    assert large["blocks.39.attn2.add_k_proj"] == (5120, 5120)
    assert large["blocks.0.ffn.net.0.proj"] == (13824, 5120)
    assert large["patch_embedding"] == (5120, 36, 1, 2, 2)
