"""Loading: nothing has storage until its weights are read, dtypes are diffusers' own, components come and go."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tuner.errors import ModelError
from tuner.materialise import materialise
from tuner.model import Model
from tuner.run import Run
from tuner_wan import WanPlugin
from tuner_wan.describe import describe
from tuner_wan.text_encoder import text_encoder_dtype

NewRun = Callable[..., Run]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def load(plugin: WanPlugin, run: Run) -> Model:
    model = plugin.load_model(run)
    materialise(model.network, device=run.device)
    return model


def check_equal(model: Model, reference: WanTransformer3DModel) -> None:
    found, expected = model.network.module.state_dict(), reference.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_dtypes_equal_from_pretrained(
    dtype: torch.dtype, tiny: Path, plugin: WanPlugin, new_run: NewRun
) -> None:
    model = load(plugin, new_run(plugin, dtype, pretrained_model_name_or_path=str(tiny)))
    reference = WanTransformer3DModel.from_pretrained(tiny, subfolder="transformer", torch_dtype=dtype)
    check_equal(model, reference)
    module = model.network.module
    assert torch.equal(module.rope.freqs_cos, reference.rope.freqs_cos)
    assert module.rope.freqs_cos.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_base_may_have_a_dtype_of_its_own(tiny: Path, plugin: WanPlugin, new_run: NewRun) -> None:
    run = new_run(plugin, torch.float32, pretrained_model_name_or_path=str(tiny), base_model_default_dtype="bf16")
    module = load(plugin, run).network.module
    assert module.patch_embedding.weight.dtype == torch.bfloat16
    assert module.scale_shift_table.dtype == torch.float32


def test_nothing_has_storage_before_it_is_materialised(tiny: Path, plugin: WanPlugin, new_run: NewRun) -> None:
    model = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(tiny)))
    assert all(parameter.is_meta for parameter in model.network.module.parameters())
    assert not any(buffer.is_meta for buffer in model.network.module.buffers())
    assert set(model.network.feed_forwards) == {f"blocks.{index}.ffn" for index in range(4)}
    assert len(list(model.network.attention_processors())) == 8
    assert all(hasattr(each, "_attention_backend") for each in model.network.attention_processors())


def test_weights_are_read_lazily_and_again(tiny: Path, plugin: WanPlugin, new_run: NewRun) -> None:
    network = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(tiny))).network
    first = next(network.weights())
    assert isinstance(first[0], str)
    assert {name for name, _ in network.weights()} == {name for name, _ in network.module.named_parameters()}


def test_sharded_weights_load(copied: Path, plugin: WanPlugin, new_run: NewRun) -> None:
    reference = WanTransformer3DModel.from_pretrained(copied, subfolder="transformer")
    (copied / WEIGHTS).unlink()
    reference.save_pretrained(copied / "transformer", max_shard_size="60kB")
    assert len(list((copied / "transformer").glob("*.safetensors"))) > 1
    check_equal(load(plugin, new_run(plugin, pretrained_model_name_or_path=str(copied))), reference)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_in_the_original_names_loads(
    prefix: str, tiny: Path, tmp_path: Path, plugin: WanPlugin, new_run: NewRun
) -> None:
    reference = WanTransformer3DModel.from_pretrained(tiny, subfolder="transformer")
    run = new_run(plugin, pretrained_model_name_or_path=str(tiny))
    original = {}
    for name, tensor in reference.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if leaf == "scale_shift_table":
            theirs = f"{module}.modulation" if module else "head.modulation"
        else:
            theirs = f"{run.spec.original_name(module)}.{leaf}"
        original[prefix + theirs] = tensor
    save_file(original, tmp_path / "wan.safetensors")
    converted = WanTransformer3DModel.from_single_file(
        str(tmp_path / "wan.safetensors"), config=str(tiny), subfolder="transformer", local_files_only=True
    )
    single = new_run(
        plugin,
        pretrained_model_name_or_path=str(tiny),
        pretrained_transformer_model_name_or_path=str(tmp_path / "wan.safetensors"),
    )
    check_equal(load(plugin, single), converted)
    check_equal(load(plugin, single), reference)


def test_missing_unexpected_and_misshapen_tensors_are_named(copied: Path, plugin: WanPlugin, new_run: NewRun) -> None:
    state = load_file(copied / WEIGHTS)
    name = "blocks.1.attn1.to_q.weight"
    for broken, message in (
        ({key: value for key, value in state.items() if key != name}, name),
        ({**state, "blocks.1.attn1.to_q.extra": state[name].clone()}, "blocks.1.attn1.to_q.extra"),
        ({**state, name: torch.zeros(3, 3)}, name),
    ):
        save_file(broken, copied / WEIGHTS)
        with pytest.raises(ModelError, match=message):
            load(plugin, new_run(plugin, pretrained_model_name_or_path=str(copied)))


def test_a_truncated_weight_file_is_named(copied: Path, plugin: WanPlugin, new_run: NewRun) -> None:
    data = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError) as caught:
        load(plugin, new_run(plugin, pretrained_model_name_or_path=str(copied)))
    assert str(copied / WEIGHTS) in str(caught.value)


@pytest.mark.parametrize(
    ("component", "file", "tensor"),
    [
        ("text_encoder", "text_encoder/model.safetensors", "encoder.final_layer_norm.weight"),
        ("vae", "vae/diffusion_pytorch_model.safetensors", "post_quant_conv.weight"),
    ],
)
def test_an_encoder_is_never_filled_with_random_weights(
    component: str, file: str, tensor: str, copied: Path, plugin: WanPlugin, new_run: NewRun
) -> None:
    model = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(copied)))
    state = load_file(copied / file)
    del state[tensor]
    save_file(state, copied / file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=tensor), model.use(component):
        pass
    (copied / file).write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot read"), model.use(component):
        pass


def test_the_text_encoder_reads_its_own_embedding(tiny: Path, plugin: WanPlugin, new_run: NewRun) -> None:
    model = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(tiny)))
    with model.use("text_encoder") as (encoder,):
        embedding = load_file(tiny / "text_encoder" / "model.safetensors")["shared.weight"]
        assert torch.equal(encoder.model.encoder.embed_tokens.weight, embedding)
        assert not encoder.model.training
        assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_components_say_what_decides_their_output(tiny: Path, plugin: WanPlugin, new_run: NewRun) -> None:
    components = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(tiny))).components
    text, vae = components["text_encoder"], components["vae"]
    names = {path.relative_to(tiny).as_posix() for path in text.files}
    assert names == {
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    assert {path.name for path in vae.files} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert text.settings["dtype"] == vae.settings["dtype"] == "torch.float32"
    assert text_encoder_dtype(torch.device("cuda"), torch.float16) == torch.bfloat16
    assert text_encoder_dtype(torch.device("cuda"), torch.float32) == torch.float32


def test_a_repository_that_cannot_be_fetched_is_one_error(
    plugin: WanPlugin, new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot fetch 'someone/own-wan' from the hub"):
        plugin.load_model(new_run(plugin, pretrained_model_name_or_path="someone/own-wan"))


def test_only_the_files_that_are_read_are_fetched(
    tiny: Path, plugin: WanPlugin, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, list[str]]] = []

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    run = new_run(
        plugin,
        pretrained_model_name_or_path="someone/own-wan",
        pretrained_t5_model_name_or_path="someone/text",
        revision="v2",
    )
    run.spec = describe(run.config.model_copy(update={"pretrained_model_name_or_path": str(tiny)}))
    with pytest.raises(ModelError, match="start again"):
        plugin.load_model(run)  # the table's dimensions are not the tiny model's
    assert [(repository, revision) for repository, revision, _ in asked] == [
        ("someone/own-wan", "v2"),
        ("someone/text", None),
    ]
    assert "text_encoder/config.json" in asked[1][2]
    assert not any(pattern.startswith("text_encoder") for pattern in asked[0][2])
    assert "transformer/diffusion_pytorch_model*.safetensors" in asked[0][2]


def test_a_training_step_imports_no_pipeline_encoder_or_vae(tiny: Path) -> None:
    code = (
        "import sys, torch\n"
        "from tuner.config.keys import CoreConfig\n"
        "from tuner.model import Batch\n"
        "from tuner.materialise import materialise\n"
        "from tuner.run import Run\n"
        "from tuner_wan import WanPlugin\n"
        "plugin = WanPlugin('wan', WanPlugin.Config())\n"
        "run = Run(CoreConfig(pretrained_model_name_or_path=sys.argv[1]), {})\n"
        "run.spec = plugin.describe_model(run)\n"
        "run.place(torch.device('cpu'), torch.float32)\n"
        "model = plugin.load_model(run)\n"
        "materialise(model.network, device=run.device)\n"
        "x = torch.randn(1, 16, 1, 4, 4)\n"
        "batch = Batch(x, {'states': torch.randn(1, 3, 16)}, {}, ('a',), (0,), torch.rand(1), x, x, x)\n"
        "plugin.compute_loss(run, model, batch)\n"
        "late = ('diffusers.pipelines.', 'diffusers.models.autoencoders.autoencoder_kl_wan',\n"
        "        'transformers.models.umt5.modeling_umt5')\n"
        "found = [name for name in sys.modules if name.startswith(late)]\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny)], check=True)
