"""A model is described without torch and without a network; what does not fit is one clear error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError, ModelError
from tuner.run import Run
from tuner.spec import ModelSpec
from tuner_wan import WanPlugin
from tuner_wan.describe import describe, locate
from tuner_wan.flavours import FLAVOURS, ORIGINAL_LAYOUTS
from tuner_wan.names import RENAME, diffusers_name


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-hub-cache"))


def described(base: Path | str | None = None, **keys: Any) -> ModelSpec:
    return describe(CoreConfig(pretrained_model_name_or_path=None if base is None else str(base), **keys))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_local_folder_is_described_by_its_config_files(tiny: Path) -> None:
    spec = described(tiny)
    (network,) = spec.networks
    assert (network.blocks, network.dim, network.heads, network.ffn_dim) == (4, 24, 2, 32)
    assert (network.text_dim, network.text_tokens, network.in_channels) == (16, 512, 16)
    assert network.tokens(*spec.latents.shape(9, 32, 48)[1:]) == 3 * 2 * 3
    assert (spec.family, spec.flavour, spec.base) == ("wan", "t2v-480p-1.3b-2.1", str(tiny))
    assert (spec.size_multiple, spec.fps, spec.defaults["validation_flow_shift"]) == (16, 16.0, 3.0)
    assert [spec.latents.frames_allowed(frames) for frames in (1, 4, 5, 75)] == [1, 1, 5, 73]
    assert spec.encoders == {"text": ("text_encoder",), "video": ("vae",)}


@pytest.mark.parametrize(
    ("keys", "blocks", "dim", "ffn_dim"),
    [
        ({}, 30, 1536, 8960),
        ({"model_flavour": "t2v-480p-14b-2.1"}, 40, 5120, 13824),
        ({"pretrained_model_name_or_path": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}, 40, 5120, 13824),
        ({"pretrained_model_name_or_path": "someone/own-wan"}, 30, 1536, 8960),
    ],
)
def test_a_hub_repository_is_described_without_a_download(
    keys: dict[str, str], blocks: int, dim: int, ffn_dim: int
) -> None:
    spec = describe(CoreConfig(**keys))
    assert (spec.networks[0].blocks, spec.networks[0].dim, spec.networks[0].ffn_dim) == (blocks, dim, ffn_dim)
    assert spec.networks[0].text_dim == 4096
    assert spec.networks[0].tokens(*spec.latents.shape(81, 480, 832)[1:]) == 32760


def test_describing_needs_no_torch(tiny: Path) -> None:
    code = (
        "import sys\n"
        "from tuner.config.keys import CoreConfig\n"
        "from tuner.run import Run\n"
        "from tuner_wan import WanPlugin\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'accelerate'}\n"
        "plugin = WanPlugin('wan', WanPlugin.Config())\n"
        "for base in (sys.argv[1], 'someone/own-wan'):\n"
        "    plugin.describe_model(Run(CoreConfig(pretrained_model_name_or_path=base), {}))\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny)], check=True)


@pytest.mark.parametrize("name", FLAVOURS)
def test_every_flavour_is_described_from_the_table(name: str) -> None:
    spec, flavour = described(model_flavour=name), FLAVOURS[name]
    assert (spec.flavour, spec.base) == (name, flavour.repository)
    assert {network.in_channels for network in spec.networks} == {flavour.in_channels}
    assert spec.latents.channels == flavour.latent_channels
    assert spec.size_multiple == 2 * flavour.stride_space


@pytest.mark.parametrize("name", FLAVOURS)
def test_every_flavour_is_described_from_its_files(name: str, flavours: Callable[[str], Path]) -> None:
    """The tiny model of each flavour's structure is recognised for what it is, and described alike."""
    spec = described(flavours(name), model_flavour=name)
    table = described(model_flavour=name)
    names = [network.name for network in spec.networks]
    assert names == [network.name for network in table.networks]
    for ours, real in zip(spec.networks, table.networks, strict=True):
        assert (ours.in_channels, ours.text_tokens, ours.sigma_range) == (real.in_channels, 512, real.sigma_range)
    for fact in ("latents", "encoders", "conditioning_frames", "condition", "boundary", "switch_steps", "fps"):
        assert getattr(spec, fact) == getattr(table, fact), fact


def test_experts_and_their_noise_levels() -> None:
    high, low, both = (described(model_flavour=f"i2v-14b-2.2-{expert}") for expert in ("high", "low", "both"))
    assert [(each.name, each.sigma_range) for each in high.networks] == [("transformer", (0.9, 1.0))]
    assert [(each.name, each.sigma_range) for each in low.networks] == [("transformer_2", (0.0, 0.9))]
    assert both.networks == (*high.networks, *low.networks)
    assert described(model_flavour="t2v-14b-2.2-high").boundary == 0.875


def test_the_boundary_is_the_models_own(flavours: Callable[[str], Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(flavours("t2v-14b-2.2-low"), tmp_path / "model"))
    edit(base / "model_index.json", boundary_ratio=0.8)
    spec = described(base, model_flavour="t2v-14b-2.2-both")
    assert [each.sigma_range for each in spec.networks] == [(0.8, 1.0), (0.0, 0.8)]


@pytest.mark.parametrize("name", ["i2v-14b-2.1", "flf2v-14b-2.1", "ti2v-5b-2.2"])
def test_a_folder_is_recognised_without_a_flavour(name: str, flavours: Callable[[str], Path]) -> None:
    assert described(flavours(name)).flavour == name


def test_two_experts_need_a_choice(flavours: Callable[[str], Path]) -> None:
    for base in (flavours("i2v-14b-2.2-high"), "Wan-AI/Wan2.2-I2V-A14B-Diffusers"):
        with pytest.raises(ConfigError, match=r"(?s)two experts.*i2v-14b-2.2-high, i2v-14b-2.2-low, i2v-14b-2.2-both"):
            described(base)


def test_the_second_expert_may_lie_elsewhere(flavours: Callable[[str], Path], tmp_path: Path) -> None:
    base = flavours("t2v-14b-2.2-high")
    alone = tmp_path / "alone" / "transformer"
    shutil.copytree(base / "transformer_2", alone)
    config = WanPlugin.Config(pretrained_transformer_2_model_name_or_path=str(alone.parent))
    core = CoreConfig(pretrained_model_name_or_path=str(base), model_flavour="t2v-14b-2.2-both")
    parts = locate(core, config, FLAVOURS["t2v-14b-2.2-both"])
    assert parts["transformer"].folder == base / "transformer"
    assert parts["transformer_2"].folder == alone


def test_a_misspelt_flavour_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 't2v-480p-1\.3b-2\.1'"):
        described(model_flavour="t2v-480p-1.3b")


def test_flavour_and_repository_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"(?s)t2v-480p-1.3b-2.1.*t2v-480p-14b-2.1"):
        described("Wan-AI/Wan2.1-T2V-14B-Diffusers", model_flavour="t2v-480p-1.3b-2.1")


@pytest.mark.parametrize(
    "missing",
    [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_an_incomplete_folder_names_what_is_missing(copied: Path, missing: str) -> None:
    path = copied / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(ModelError) as caught:
        described(copied)
    assert str(path) in str(caught.value)


def test_everything_missing_is_named_at_once(copied: Path) -> None:
    (copied / "vae" / "config.json").unlink()
    shutil.rmtree(copied / "text_encoder")
    with pytest.raises(ModelError) as caught:
        described(copied)
    assert str(copied / "vae" / "config.json") in str(caught.value)
    assert str(copied / "text_encoder") in str(caught.value)


def test_a_missing_shard_is_named(copied: Path) -> None:
    folder = copied / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"proj_out.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="diffusion_pytorch_model-00001-of-00002"):
        described(copied)


def test_a_folder_that_does_not_exist() -> None:
    with pytest.raises(ModelError, match=r"pretrained_model_name_or_path '\./no/such/folder' does not exist"):
        described("./no/such/folder")


def test_pickles_are_never_read(copied: Path) -> None:
    weights = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ModelError, match="never read"):
        described(copied)


def test_a_broken_config_file_is_named(copied: Path) -> None:
    (copied / "vae" / "config.json").write_text("{")
    with pytest.raises(ModelError) as caught:
        described(copied)
    assert str(copied / "vae" / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "looks_like"),
    [
        ({"in_channels": 36, "image_dim": 1280}, "i2v-14b-2.1"),
        ({"in_channels": 36, "image_dim": 1280, "pos_embed_seq_len": 514}, "flf2v-14b-2.1"),
        ({"in_channels": 36}, "i2v-14b-2.2-high"),
        ({"in_channels": 48}, "ti2v-5b-2.2"),
    ],
)
def test_a_denoiser_of_another_flavour_is_named(copied: Path, changes: dict[str, int], looks_like: str) -> None:
    edit(copied / "transformer" / "config.json", **changes)
    with pytest.raises(ConfigError, match=rf"like flavour '{looks_like}'(.|\n)*set model_flavour to '{looks_like}'"):
        described(copied, model_flavour="t2v-480p-1.3b-2.1")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"in_channels": 17}, "17 input channels, which no flavour of Wan has"),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "is a FluxTransformer2DModel"),
        ("vae/config.json", {"z_dim": 4}, "makes 4 channels and the denoiser takes 16"),
        ("text_encoder/config.json", {"d_model": 64}, "64 wide and the denoiser takes 16"),
    ],
)
def test_parts_that_do_not_fit_are_named(copied: Path, file: str, changes: dict[str, Any], message: str) -> None:
    edit(copied / file, **changes)
    with pytest.raises(ConfigError, match=message):
        described(copied)


@pytest.mark.parametrize("name", sorted(ORIGINAL_LAYOUTS))
def test_the_original_layout_is_refused_with_the_repository_to_use(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").touch()
    for base in (folder, f"Wan-AI/{name}"):
        with pytest.raises(ModelError, match=ORIGINAL_LAYOUTS[name]):
            described(base)


def test_each_part_may_come_from_elsewhere(tiny: Path, copied: Path) -> None:
    for name in ("vae", "text_encoder", "tokenizer", "transformer"):
        shutil.rmtree(copied / name)
    edit(copied / "scheduler" / "scheduler_config.json", flow_shift=8.0)
    spec = described(
        copied,
        pretrained_transformer_model_name_or_path=str(tiny / "transformer"),
        pretrained_transformer_subfolder="none",
        pretrained_vae_model_name_or_path=str(tiny),
        pretrained_t5_model_name_or_path=str(tiny),
    )
    assert spec.networks[0].blocks == 4
    assert spec.base == str(tiny / "transformer")
    assert spec.defaults["validation_flow_shift"] == 8.0


def test_rename_table_goes_both_ways(plugin: WanPlugin, new_run: Callable[..., Run], tiny: Path) -> None:
    spec = described(tiny)
    assert spec.rename == RENAME
    pairs = {
        "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
        "blocks.11.attn2.to_out.0": "blocks.11.cross_attn.o",
        "blocks.3.ffn.net.0.proj": "blocks.3.ffn.0",
        "blocks.3.norm2": "blocks.3.norm3",
        "blocks.3.attn2.add_k_proj": "blocks.3.cross_attn.k_img",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
        "condition_embedder.time_proj": "time_projection.1",
        "proj_out": "head.head",
        "patch_embedding": "patch_embedding",
    }
    for ours, theirs in pairs.items():
        assert spec.original_name(ours) == theirs
        assert diffusers_name(f"{theirs}.weight") == f"{ours}.weight"
    assert diffusers_name("model.diffusion_model.blocks.7.modulation") == "blocks.7.scale_shift_table"
    assert diffusers_name("head.modulation") == "scale_shift_table"
