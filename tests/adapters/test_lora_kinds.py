"""Every kind of LoRA: how it starts, what its file says of the original base, and what is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanPipeline

from tuner import rng
from tuner.builtin.lora import LoraConfig, LoraPlugin
from tuner.builtin.lora.count import counted
from tuner.builtin.lora.names import Targets
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.run import Run
from tuner_wan import WanPlugin

KINDS = {
    "orthogonal": {"lora_init_type": "orthogonal"},
    "pissa": {"lora_init_type": "pissa"},
    "pissa_niter_4": {"lora_init_type": "pissa_niter_4"},
    "olora": {"lora_init_type": "olora"},
    "rslora": {"use_rslora": True},
    "pissa, rslora": {"lora_init_type": "pissa", "use_rslora": True},
    "dora": {"use_dora": True, "lora_format": "diffusers"},
    "pattern of ranks": {
        "lora_rank_pattern": {"to_v": 2, r"re:blocks\.1\..*to_q": 6},
        "lora_alpha_pattern": {"to_v": 1},
    },
    "all-linear": {"lora_target_modules": ["all-linear"], "lora_exclude_modules": ["ffn.net.2"]},
    "regex": {"lora_target_modules": [r"re:blocks\.0\..*\.to_[qk]", "ffn.net.0.proj"]},
}


@pytest.fixture
def attached(make_run, make_network, make_model, randomise):
    """A plugin, run and model of these keys, LoRA of rank 4 and alpha 6, trained (random) or as it starts."""

    def make(*, trained=True, **keys):
        run, network = make_run(seed=5), make_network()
        plugin = LoraPlugin("lora", LoraConfig(**{"lora_rank": 4, "lora_alpha": 6, **keys}))
        plugin.configure(run)
        model = make_model(network)
        (transform,) = plugin.model_transforms(run, model)
        rng.seed_global(0, "test")
        network.adapter = transform.apply(network)
        if trained:
            randomise(network.adapter.state())
        return plugin, run, model

    return make


def output(network, inputs):
    with torch.no_grad():
        return network.module(**inputs).sample


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_one_is_the_base(attached, make_network, wan_inputs, kind):
    _, _, model = attached(trained=False, **KINDS[kind])
    expected = output(make_network(), wan_inputs)
    torch.testing.assert_close(output(model.network, wan_inputs), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_its_file_is_the_difference_to_the_original_base(attached, tmp_path, tiny_wan, wan_inputs, kind):
    plugin, run, model = attached(**KINDS[kind])
    (write,) = plugin.save(run, model, tmp_path)
    write()
    (path,) = tmp_path.glob("*.safetensors")
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    with torch.no_grad():
        base = pipeline.transformer(**wan_inputs).sample
        pipeline.load_lora_weights(path.parent)
        loaded = pipeline.transformer(**wan_inputs).sample
    ours = output(model.network, wan_inputs)
    torch.testing.assert_close(loaded, ours, atol=2e-5, rtol=1e-4)
    assert (ours - base).abs().max() > 1e-2


def test_matrices_may_be_bfloat16(attached, wan_inputs):
    _, _, model = attached(lora_dtype="bf16")
    assert {each.dtype for each in model.network.adapter.state().values()} == {torch.bfloat16}
    assert output(model.network, wan_inputs).isfinite().all()


@pytest.mark.parametrize("kind", ["pissa", "olora", "dora", "rslora"])
def test_with_the_adapter_off_it_is_the_base(attached, make_network, wan_inputs, kind):
    _, _, model = attached(**KINDS[kind])
    network = model.network
    trained = {name: each.clone() for name, each in network.adapter.state().items()}
    with network.base():
        base = output(network, wan_inputs)
    torch.testing.assert_close(base, output(make_network(), wan_inputs), atol=2e-5, rtol=1e-4)
    assert all(torch.equal(each, trained[name]) for name, each in network.adapter.state().items())


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "kohya"])
def test_it_starts_from_a_file_of_any_format(attached, tmp_path, wan_inputs, layout):
    plugin, run, model = attached(lora_format=layout)
    (write,) = plugin.save(run, model, tmp_path)
    write()
    (path,) = tmp_path.glob("*.safetensors")
    _, _, again = attached(trained=False, init_lora=path, lora_rank=6, lora_alpha=3, use_rslora=True)
    expected = output(model.network, wan_inputs)
    torch.testing.assert_close(output(again.network, wan_inputs), expected, atol=2e-6, rtol=1e-5)
    _, _, folder = attached(trained=False, init_lora=tmp_path)
    torch.testing.assert_close(output(folder.network, wan_inputs), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora_rank": 2}, "rank 4 at .* and this run 2"),
        ({"lora_target_modules": ["to_q"]}, "12 modules that this run does not"),
    ],
)
def test_a_file_that_would_be_lost_in_part_is_refused(attached, tmp_path, keys, words):
    plugin, run, model = attached()
    (write,) = plugin.save(run, model, tmp_path)
    write()
    (path,) = tmp_path.glob("*.safetensors")
    with pytest.raises(ConfigError, match=words):
        attached(init_lora=path, **keys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora_init_type": "eva"}, "a pass over the data"),
        ({"lora_init_type": "pisa"}, "did you mean 'pissa'"),
        ({"lora_init_type": "pissa", "use_dora": True, "lora_format": "diffusers"}, "do not go together"),
        ({"use_dora": True}, "divide by the norms"),
        ({"lora_init_type": "orthogonal", "lora_rank": 3}, "even ranks"),
        ({"lora_rank_pattern": {"to_w": 2}}, "matches no adapted module"),
        ({"lora_rank_pattern": {"to_q": 0}}, "rank 0"),
        ({"lora_exclude_modules": ["to_w"]}, "did you mean 'to_[a-z]'"),
        ({"lora_exclude_modules": ["to_q", "to_k", "to_v", "to_out.0"]}, "leaves nothing"),
        ({"lora_target_modules": ["re:blocks.(0"]}, "no regular expression"),
        ({"lora_target_modules": ["re:to_q"]}, "matches no module"),
        ({"init_lora": "nowhere.safetensors"}, "does not exist"),
        ({"lora_target_modules": ["patch_embedding"], "lora_init_type": "pissa"}, "is a convolution"),
    ],
)
def test_what_cannot_be_had_is_refused_before_weights_are_read(attached, keys, words):
    with pytest.raises(ConfigError, match=words):
        attached(**keys)


@pytest.mark.parametrize("keys", [{"lora_init_type": "pissa"}, {"use_dora": True, "lora_format": "diffusers"}])
def test_a_base_that_cannot_be_changed_is_refused(attached, make_run, keys):
    plugin = LoraPlugin("lora", LoraConfig(**keys))
    with pytest.raises(ConfigError, match="base_model_precision is 'int8-quanto'"):
        plugin.configure(make_run(base_model_precision="int8-quanto"))


@pytest.mark.parametrize("kind", ["pattern of ranks", "all-linear", "regex", "dora"])
def test_the_plan_counts_what_is_trained(attached, tiny_wan, kind):
    run = Run(CoreConfig(pretrained_model_name_or_path=str(tiny_wan)), {})
    spec = WanPlugin("wan", WanPlugin.Config()).describe_model(run)
    plugin, _, model = attached(**KINDS[kind])
    keys = plugin.config
    wanted = Targets(
        tuple(keys.lora_target_modules or spec.adapter_targets),
        4,
        6,
        tuple(keys.lora_exclude_modules),
        keys.lora_rank_pattern,
        keys.lora_alpha_pattern,
    )
    found = counted(wanted, spec.networks[0], dora=keys.use_dora)
    assert found["adapter_parameters"] == sum(each.numel() for each in model.network.adapter.state().values())
