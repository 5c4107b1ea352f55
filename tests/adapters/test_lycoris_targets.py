"""LyCORIS settings: read strictly, and meaning what they mean to the library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from tuner.errors import ConfigError
from tuner.spec import Linear, NetworkSpec
from tuner_lycoris.settings import LycorisSettings, read
from tuner_lycoris.size import counts, factorization, parameters
from tuner_lycoris.targets import choose

wrapper = pytest.importorskip("lycoris.wrapper")
from tuner_lycoris.adapter import tree  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "config" / "lycoris_config.json.example"
ATTENTION = {"target_module": ["WanAttention"]}
WHOLE = {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 4}
SETTINGS = {
    "without targets": {"algo": "loha", "linear_dim": 2},
    "classes": WHOLE | {"apply_preset": ATTENTION},
    "an algorithm by class": WHOLE
    | {
        "apply_preset": {
            "target_module": ["WanTransformerBlock"],
            "module_algo_map": {
                "WanAttention": {"factor": 2, "dim": 2, "alpha": 0.5},
                "FeedForward": {"algo": "locon", "dim": 3},
            },
        }
    },
    "shell patterns": WHOLE
    | {
        "apply_preset": {
            "target_module": [],
            "target_name": ["blocks.0.attn?.to_*"],
            "name_algo_map": {"blocks.1.ffn.*": {"algo": "full"}},
            "exclude_name": ["*attn2.to_k"],
            "use_fnmatch": True,
        }
    },
    "a map alone": WHOLE | {"apply_preset": {"module_algo_map": {"FeedForward": {"algo": "loha", "dim": 2}}}},
    "regular expressions": {
        "algo": "lora",
        "linear_dim": 4,
        "apply_preset": ATTENTION | {"target_name": [r"blocks\.\d+\.ffn", "proj_out"], "exclude_name": [r".*\.to_v"]},
    },
    "every shape of LoKr": {
        "algo": "lokr",
        "linear_dim": 2,
        "decompose_both": True,
        "unbalanced_factorization": True,
        "apply_preset": {"target_module": ["WanTransformerBlock"]},
    },
    "a convolution": {
        "algo": "lokr",
        "linear_dim": 2,
        "use_tucker": True,
        "apply_preset": {"target_module": ["Conv3d"]},
    },
}


@pytest.fixture
def library() -> Iterator[type]:
    """The library's network class, whose state belongs to the class."""
    cls = wrapper.LycorisNetwork
    before = {name: value for name, value in vars(cls).items() if name.isupper()}
    yield cls
    for name, value in before.items():
        setattr(cls, name, value)


def theirs(cls, module: nn.Module, settings: dict) -> dict[str, nn.Module]:
    """The modules that the library makes of the same settings."""
    settings = dict(settings)
    cls.apply_preset(settings.pop("apply_preset", {}))
    return {each.lora_name: each for each in wrapper.create_lycoris(module, warn_on_unmatched=False, **settings).loras}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_modules_are_adapted_in_the_same_way_as_by_the_library(make_network, library, name):
    from tuner_lycoris.factors import KINDS

    module, settings = make_network().module, SETTINGS[name]
    chosen = choose(tree(module), read(settings), "transformer")
    wanted = theirs(library, module, settings)
    assert {f"lycoris_{name.replace('.', '_')}" for name in chosen} == set(wanted)
    for path, options in chosen.items():
        ours, expected = (
            KINDS[options.algo](module.get_submodule(path), options),
            wanted[f"lycoris_{path}".replace(".", "_")],
        )
        shapes = {key: tuple(each.shape) for key, each in expected.named_parameters()}
        if options.algo == "full":
            shapes = {key.replace("weight", "diff").replace("bias", "diff_b"): each for key, each in shapes.items()}
        else:
            assert ours.scale == pytest.approx(expected.scale)
        assert {key: tuple(each.shape) for key, each in ours.trained().items()} == shapes


def test_the_example_means_attention_by_the_networks_own_name(make_network):
    """The file that users have says ``Attention``; the library would find no such class and pass it over."""
    chosen = choose(tree(make_network().module), read(EXAMPLE), "transformer")
    assert len(chosen) == 2 * 10
    assert {each.factor for name, each in chosen.items() if "attn" in name} == {16}
    assert {each.factor for name, each in chosen.items() if "ffn" in name} == {8}


def test_the_librarys_own_state_is_never_touched(make_network, library):
    before = {name: value for name, value in vars(library).items() if name.isupper()}
    choose(tree(make_network().module), read(SETTINGS["shell patterns"]), "transformer")
    after = choose(tree(make_network().module), read({"algo": "lora"}), "transformer")
    assert {name: value for name, value in vars(library).items() if name.isupper()} == before
    assert len(after) == 27  # everything, whatever the settings before it said


@pytest.mark.parametrize(("preset", "count"), [("full", 27), ("full-lin", 26), ("attn-mlp", 20), ("attn-only", 16)])
def test_presets_are_parts_of_this_network(make_network, preset, count):
    assert len(choose(tree(make_network().module), read({"preset": preset}), "transformer")) == count


def test_numbers_stay_what_they_are(tmp_path):
    path = tmp_path / "lycoris.json"
    path.write_text(json.dumps({"algo": "LoKr", "linear_alpha": 0.5, "multiplier": 0.75, "linear_dim": 1e4}))
    settings = read(path)
    assert (settings.algo, settings.linear_alpha, settings.multiplier) == ("lokr", 0.5, 0.75)
    assert (settings.linear_dim, type(settings.linear_dim)) == (10000, int)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"linear_dims": 4}, ["linear_dims", "did you mean 'linear_dim'?"]),
        ({"apply_preset": {"target_modules": []}}, ["target_modules", "did you mean 'target_module'?"]),
        ({"apply_preset": {"module_algo_map": {"FeedForward": {"linear_dim": 4}}}}, ["FeedForward", "'dim'"]),
        ({"apply_preset": {"unet_target_module": []}}, ["image models", "use target_module"]),
        ({"algo": "lokrr"}, ["lokrr", "did you mean 'lokr'?"]),
        ({"algo": "dylora"}, ["dylora", "not offered", "reload"]),
        ({"algo": "lora", "dora_wd": True}, ["dora_wd", "not offered", "weight decomposition"]),
        ({"train_norm": True}, ["train_norm", "not offered"]),
        ({"linear_dim": 0}, ["linear_dim", "greater than or equal to 1"]),
        ({"linear_dim": 2.5}, ["linear_dim", "2.5"]),
        ({"factor": 0}, ["factor", "-1"]),
        ({"preset": "unet-only"}, ["unet-only", "attn-mlp"]),
        ({"preset": "full", "apply_preset": ATTENTION}, ["both preset and apply_preset"]),
        ({"apply_preset": ["WanAttention"]}, ["must be one object"]),
        ({"apply_preset": {"module_algo_map": {"FeedForward": 8}}}, ["must be an object of objects"]),
    ],
)
def test_what_the_library_would_ignore_is_an_error(settings, words):
    with pytest.raises(ConfigError) as refusal:
        read(settings)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            {"target_module": ["WanAtention"]},
            ["'WanAtention' is the class of no module", "did you mean 'WanAttention'?"],
        ),
        ({"target_module": ["Embedding"]}, ["could be", "TimestepEmbedding", "WanTimeTextImageEmbedding"]),
        ({"target_name": ["blocks.0.attn1"], "use_fnmatch": True}, ["'blocks.0.attn1' matches no matrix"]),
        (ATTENTION | {"exclude_name": ["block.0"]}, ["'block.0' matches no matrix"]),
        (ATTENTION | {"exclude_name": ["blocks"]}, ["adapt nothing"]),
    ],
)
def test_targets_that_match_nothing_are_errors(make_network, targets, words):
    with pytest.raises(ConfigError) as refusal:
        choose(tree(make_network().module), read({"apply_preset": targets}), "transformer")
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_factorization_is_the_librarys():
    from lycoris.functional.general import factorization as expected

    for size in (*range(1, 130), 1536, 5120, 8960, 13824):
        for factor in (-1, 1, 2, 3, 4, 8, 16, 100):
            assert factorization(size, factor) == expected(size, factor), (size, factor)


@pytest.mark.parametrize("name", [each for each in SETTINGS if each not in ("a convolution", "without targets")])
def test_estimated_parameters_are_those_that_are_trained(make_network, name):
    from tuner_lycoris.factors import KINDS
    from tuner_wan.dimensions import linears

    module, settings = make_network().module, read(SETTINGS[name])
    chosen = choose(tree(module), settings, "transformer")
    trained = {
        path: sum(each.numel() for each in KINDS[options.algo](module.get_submodule(path), options).parameters())
        for path, options in chosen.items()
        if path.startswith("blocks.")
    }
    network = NetworkSpec("transformer", 2, 24, 2, 32, 16, 512, 16, linears=linears(24, 32))
    counted = counts(network, settings)
    assert sum(count for _, _, count in counted) == sum(trained.values()) > 0
    assert {linear.name: blocks for linear, blocks, _ in counted if blocks} == {
        suffix: sum(path.endswith(suffix) for path in trained) for suffix in {path.split(".", 2)[2] for path in trained}
    }


def test_estimates_at_wans_size():
    """Whole LoKr of factor 16 on 5120 x 5120: 16 * 16 + 320 * 320; of factor 8 on the feed-forward likewise."""
    network = NetworkSpec(
        "transformer",
        40,
        5120,
        40,
        13824,
        4096,
        512,
        16,
        linears=(
            Linear("attn1.to_q", 5120, 5120, within=("WanTransformerBlock", "WanAttention")),
            Linear("ffn.net.2", 13824, 5120, within=("WanTransformerBlock", "FeedForward")),
        ),
    )
    counted = {linear.name: count for linear, _, count in counts(network, read(EXAMPLE))}
    assert counted == {"attn1.to_q": 40 * (256 + 320 * 320), "ffn.net.2": 40 * (64 + 640 * 1728)}


def test_a_family_that_names_no_classes_is_counted_whole():
    network = NetworkSpec("transformer", 2, 8, 2, 16, 16, 512, 16)
    settings = LycorisSettings(algo="lora", linear_dim=2, apply_preset={"target_module": ["Attention"]})
    assert sum(count for _, _, count in counts(network, settings)) == 2 * 2 * sum(
        each.inputs + each.outputs for each in network.matrices
    )


def test_a_scalar_counts():
    chosen = choose(tree(nn.Sequential(nn.Linear(6, 4))), read({"algo": "lokr", "use_scalar": True}), "x")["0"]
    assert parameters(chosen, 4, 6) == 1 + 2 * 2 + 2 * 3


def test_settings_are_read_without_torch_and_without_lycoris():
    code = (
        "import sys; from pathlib import Path; import tuner_lycoris; from tuner_lycoris import settings, size, targets;"
        f"settings.read(Path({str(EXAMPLE)!r})); assert not {{'torch', 'lycoris'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
