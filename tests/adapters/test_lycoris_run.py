"""LyCORIS in real runs of the tiny Wan: with every way to save memory, resumed, of two experts, as users have it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tuner_chunked_ff
from tuner import pipeline
from tuner.assembly import assemble
from tuner.cli.flags import read_settings
from tuner.config.keys import CoreConfig
from tuner.data.samples import Bucket
from tuner.errors import ConfigError
from tuner.testing.compatibility import BY_LAYER, FEATURES, PRECISIONS, TOGETHER, Bench
from tuner.testing.opened import opened
from tuner.train.step import train_step
from tuner_wan.tiny import build_tiny

pytest.importorskip("lycoris")
from tuner_lycoris import LycorisConfig, LycorisPlugin

SEED = Path(__file__).parents[1] / "config" / "seed"
EXAMPLE = Path(__file__).parents[2] / "config" / "lycoris_config.json.example"
SETTINGS = {
    "lokr": {"algo": "lokr", "linear_dim": 10000, "factor": 8},
    "loha": {"algo": "loha", "linear_dim": 4, "linear_alpha": 2},
    "locon": {"algo": "locon", "linear_dim": 4, "linear_alpha": 8},
    "full": {"algo": "full"},
}
DROPPED = {"dropout": 0.1, "rank_dropout": 0.2, "rank_dropout_scale": True, "module_dropout": 0.4}
TARGETS = {"target_module": ["Attention", "FeedForward"]}
BY_BITS = {"8": 0.01, "4": 0.06}
"""Share of the loss that quantised weights may change it by, at most."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lycoris")
    build_tiny(folder / "model", layers=3, heads=2, head_dim=64, ffn_dim=256)
    base = {
        "model_family": "wan",
        "pretrained_model_name_or_path": str(folder / "model"),
        "mixed_precision": "no",
        "learning_rate": 1e-2,
        "lora_type": "lycoris",
        "max_grad_norm": 0,
        "seed": 3,
    }
    bench = Bench(folder, base=base)
    bench.render()
    return bench


def keys(algo: str, **others: Any) -> dict[str, Any]:
    name, *dropped = algo.split()
    settings = SETTINGS[name] | (DROPPED if dropped else {})
    return {"lycoris_config": settings | {"apply_preset": TARGETS}, **others}


@pytest.fixture(scope="module")
def train(bench: Bench):
    """Two steps with some features: losses, gradient norms, and whether every tensor changed."""

    @cache
    def steps(algo: str, names: frozenset[str]) -> tuple[list[float], list[float], bool]:
        settings = bench.settings([FEATURES[name] for name in sorted(names)]) | keys(algo)
        with opened(settings) as session:
            [network] = session.trained
            before = {name: each.clone() for name, each in network.adapter.state().items()}
            losses, norms = [], []
            for session.run.step in range(2):
                result = train_step(session)
                losses.append(result.loss)
                norms.append(result.grad_norm)
            after = network.adapter.state()
            folder = bench.folder / "saved" / str(steps.cache_info().misses)
            folder.mkdir(parents=True)
            for write in session.export_into(folder):
                write()
            tensors = load_file(folder / "pytorch_lora_weights.safetensors")
            assert all(each.isfinite().all() for each in tensors.values())
            assert len({name.split(".")[2] for name in tensors}) == 3
            return losses, norms, all(not torch.equal(before[name], after[name]) for name in before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner_chunked_ff, "TOKENS_PER_UNIT", 3)  # of 8 tokens
        yield lambda algo, names=(): steps(algo, frozenset(names))


@pytest.mark.parametrize("together", [TOGETHER, BY_LAYER, ("group offload to disk",)], ids=" + ".join)
@pytest.mark.parametrize("algo", SETTINGS)
def test_what_only_moves_or_recomputes_changes_nothing(train, algo: str, together: Iterable[str]) -> None:
    found, plain = train(algo, together), train(algo, {"TREAD"} & set(together))
    assert found[0] == pytest.approx(plain[0], rel=1e-5)
    assert found[1] == pytest.approx(plain[1], rel=1e-5)
    assert found[2]


@pytest.mark.parametrize("algo", ["loha dropped", "full dropped"])
def test_what_is_dropped_is_dropped_again_where_a_block_is_recomputed(train, algo: str) -> None:
    found, plain = train(algo, {"checkpoints on the host"}), train(algo, {"no checkpointing"})
    assert found[0] == pytest.approx(plain[0], rel=1e-5)
    assert found[1] == pytest.approx(plain[1], rel=1e-5)
    assert found[1] != train(algo.split()[0], {"no checkpointing"})[1]


@pytest.mark.parametrize("algo", ["lokr", "full"])
@pytest.mark.parametrize("precision", [each.name for each in PRECISIONS if not each.cuda])
def test_a_quantised_base_changes_the_loss_by_its_own_error(train, algo: str, precision: str) -> None:
    found, plain = train(algo, {precision}), train(algo)
    [bits] = [each for each in "84" if each in precision.partition("-")[0]]
    assert found[0][0] != plain[0][0]
    assert found[0] == pytest.approx(plain[0], rel=BY_BITS[bits])
    assert found[2]


def test_a_quantised_base_streams(train) -> None:
    for name in ("int8-quanto", "fp8-scaled"):
        assert train("lokr", {name, *BY_LAYER})[0] == pytest.approx(train("lokr", {name, "TREAD"})[0], rel=1e-5)


@pytest.mark.parametrize("algo", SETTINGS)
def test_the_plan_counts_what_is_trained(bench: Bench, algo: str) -> None:
    with opened(bench.settings([]) | keys(algo)) as session:
        [network] = session.trained
        workload = session.run.estimate(network.spec, Bucket(5, 32, 32), 1)
        parameters = network.adapter.groups[0].parameters
        on_text = [each for name, each in parameters.items() if "attn2.to_k" in name or "attn2.to_v" in name]
        assert workload.adapter_parameters == sum(each.numel() for each in parameters.values())
        assert workload.adapter_parameters_on_text == sum(each.numel() for each in on_text)
        assert workload.adapted_width == (4 + 2 + 1) * 128 + 256


def test_prior_preservation_has_its_base(train) -> None:
    assert train("loha", {"prior preservation"})[2]


def tensors_of(folder: Path) -> dict[str, dict[str, bytes]]:
    files = sorted(folder.glob("*.safetensors"))
    return {path.name: {key: each.numpy().tobytes() for key, each in load_file(path).items()} for path in files}


@pytest.mark.parametrize("algo", ["lokr", "full"])
def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(bench: Bench, algo: str) -> None:
    def run(name: str, steps: int, **others: Any) -> Path:
        output = bench.folder / name
        settings = bench.settings([]) | keys(algo, output_dir=str(output), max_train_steps=steps, **others)
        settings |= {"validation_prompt": None, "lr_scheduler": "constant"}
        pipeline.run(assemble(settings))
        return output / f"checkpoint-{steps}"

    whole = tensors_of(run(f"{algo}-whole", 4))
    run(f"{algo}-resumed", 2)
    found = tensors_of(run(f"{algo}-resumed", 4, resume_from_checkpoint="latest"))
    assert len(whole) >= 3
    assert found == whole


def test_both_experts_have_their_own(bench: Bench, tmp_path: Path) -> None:
    build_tiny(tmp_path / "pair", "t2v-14b-2.2-both", heads=2, head_dim=64, ffn_dim=256)
    settings = bench.settings([]) | keys("lokr", output_dir=str(tmp_path / "out"), validation_prompt=None)
    settings |= {"pretrained_model_name_or_path": str(tmp_path / "pair"), "model_flavour": "t2v-14b-2.2-both"}
    pipeline.run(assemble(settings | {"max_train_steps": 4, "wan_expert_switch_steps": 2}))
    files = {path.name: load_file(path) for path in (tmp_path / "out" / "checkpoint-4").glob("pytorch_lora_weights.*")}
    assert sorted(files) == [f"pytorch_lora_weights.{each}_noise.safetensors" for each in ("high", "low")]
    high, low = files.values()
    assert high.keys() == low.keys()
    trained = [name for name in high if name.endswith("lokr_w2")]
    assert trained
    assert all(each[name].any() for each in (high, low) for name in trained)


@pytest.fixture
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the users' config names."""
    (tmp_path / "config" / "wan").mkdir(parents=True)
    shutil.copy(SEED / "user_prompt_library.json", tmp_path / "config")
    shutil.copy(EXAMPLE, tmp_path / "config" / "wan" / "lycoris_config.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def users_config(folder: Path, **others: Any) -> Path:
    config = json.loads((SEED / "config.json").read_text()) | others
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def test_the_users_config_passes_with_lycoris(users_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assembly = assemble(read_settings(users_config(users_folder, lora_type="lycoris"), [], {}))
    assert assembly.plugins["lycoris"].settings.factor == 16
    assert not any("lycoris" in warning for warning in assembly.warnings)


def test_a_lora_does_not_read_the_settings_and_says_so(users_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (users_folder / "config" / "wan" / "lycoris_config.json").write_text("{ not read")
    assembly = assemble(read_settings(users_config(users_folder), [], {}))
    assert "lycoris_config is not used: lora_type is 'standard'" in "\n".join(assembly.warnings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["there is no lycoris_config"]),
        ({"lycoris_config": "nowhere.json"}, ["does not exist", "nowhere.json"]),
        ({"lycoris_config": {"algo": "lokr", "apply_preset": {"target_module": ["Atention"]}}}, ["WanAttention"]),
    ],
)
def test_bad_settings_are_one_error_before_weights_are_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], words: list[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("tuner.transforms.materialise", refuse)
    with pytest.raises(ConfigError) as refusal, opened(bench.settings([]) | settings):
        pass
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_without_the_library_there_is_one_error(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner_lycoris.find_spec", lambda name: None)
    plugin = LycorisPlugin("lycoris", LycorisConfig(lycoris_config={"algo": "lokr"}))
    with pytest.raises(ConfigError, match=r"lycoris-lora is not installed[\s\S]*pip install difftuner\[lycoris\]"):
        plugin.configure(make_run(lora_type="lycoris"))
    plugin.configure(make_run())  # a LoRA does not need it


def test_keys_of_lora_without_effect_are_said(make_run, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(lora_type="lycoris")
    run.explicit |= {"lora_rank", "lora_alpha", "lora_format", "learning_rate"}
    with caplog.at_level(logging.WARNING, logger="tuner"):
        LycorisPlugin("lycoris", LycorisConfig(lycoris_config={"algo": "lokr"})).configure(run)
    assert "without effect, as lora_type is lycoris: lora_alpha, lora_rank" in caplog.text


def test_settings_that_changed_since_the_checkpoint_are_said(make_run, caplog: pytest.LogCaptureFixture) -> None:
    plugins = [
        LycorisPlugin("lycoris", LycorisConfig(lycoris_config={"algo": "lokr", "linear_alpha": alpha}))
        for alpha in (1, 2)
    ]
    for plugin in plugins:
        plugin.configure(make_run(lora_type="lycoris"))
    with caplog.at_level(logging.WARNING, logger="tuner"):
        plugins[0].load_state_dict(plugins[0].state_dict())
        assert "changed" not in caplog.text
        plugins[1].load_state_dict(plugins[0].state_dict())
    assert "the LyCORIS settings changed since that checkpoint" in caplog.text


def test_it_is_active_for_its_own_type_alone() -> None:
    plugin = LycorisPlugin("lycoris", LycorisConfig(lycoris_config={}))
    assert plugin.is_active(CoreConfig(lora_type="lycoris"))
    assert not plugin.is_active(CoreConfig())
    assert not plugin.is_active(CoreConfig(model_type="full", lora_type="lycoris"))
