"""convert, merge, extract and inspect: what they write is loaded by others, and what they say is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tuner.builtin.adapter_file import AdapterFile, low_rank, save
from tuner.builtin.adapter_formats import combine, convert, extract, inspection, into_base
from tuner.builtin.adapter_formats.compress import as_low_rank, recompressed
from tuner.errors import CheckpointError, ConfigError, ModelError, TunerError

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def inputs(network: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    found = {
        "hidden_states": torch.randn(1, network.config.in_channels, 3, 4, 4, generator=draw),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": torch.randn(1, 512, network.config.text_dim, generator=draw),
    }
    if network.config.image_dim is not None:
        found["encoder_hidden_states_image"] = torch.randn(1, 257, network.config.image_dim, generator=draw)
    return found


@torch.no_grad()
def denoised(network: WanTransformer3DModel) -> torch.Tensor:
    result: torch.Tensor = network(**inputs(network)).sample
    return result


class TestReaders:
    """Programs that were not written here."""

    @pytest.mark.parametrize(("model", "pipeline"), [("t2v", WanPipeline), ("i2v", WanImageToVideoPipeline)])
    @pytest.mark.parametrize("form", ["comfyui", "diffusers", "kohya"])
    def test_diffusers_computes_what_a_merge_computes(
        self, request, tmp_path, matrices, written, lora, model, pipeline, form
    ):
        base = request.getfixturevalue(model)
        ends = [""] if form == "kohya" else ["attn1.to_q", "attn2.to_k", "add_k_proj", "add_v_proj", "ffn.net.2"]
        source = written(lora(matrices(base, ends)), base, "lycoris")
        file = convert.convert(source, form, model=base).path
        into_base.merge([file], None, base, tmp_path / "merged")
        theirs, ours = pipeline.from_pretrained(base), pipeline.from_pretrained(tmp_path / "merged")
        plain = denoised(theirs.transformer)
        theirs.load_lora_weights(str(file))
        torch.testing.assert_close(denoised(theirs.transformer), denoised(ours.transformer), atol=1e-5, rtol=1e-5)
        assert (denoised(ours.transformer) - plain).abs().max() > 1e-2

    def test_diffusers_keeps_doras_scale_in_its_own_names(self, t2v, tmp_path, matrices, written, lora, target):
        aim, plain = target(t2v), load_file(t2v / WEIGHTS)
        updates = {}
        for module, update in lora(matrices(t2v, ["attn1.to_q"])).updates.items():
            norms = torch.linalg.vector_norm(plain[f"{module}.weight"], dim=1, keepdim=True)
            updates[module] = low_rank(*(update.tensors[each] for each in ("lora_down", "lora_up")), 6.0, norms * 1.3)
        file = written(AdapterFile(updates), t2v, "diffusers")
        assert "transformer.blocks.0.attn1.to_q.lora_magnitude_vector" in load_file(file)
        into_base.merge([file], None, t2v, tmp_path / "merged")
        pipeline = WanPipeline.from_pretrained(t2v)
        pipeline.load_lora_weights(str(file))
        merged = WanTransformer3DModel.from_pretrained(tmp_path / "merged" / "transformer")
        torch.testing.assert_close(denoised(pipeline.transformer), denoised(merged), atol=1e-5, rtol=1e-5)
        assert aim.network == "transformer"

    @pytest.mark.parametrize(
        ("form", "ends", "kind"),
        [
            ("comfyui", ["attn1.to_q"], "lora"),
            ("comfyui", [""], "lokr"),
            ("comfyui", ["add_k_proj"], "lora"),
            ("comfyui", ["add_k_proj", "add_v_proj"], "lora"),
            ("comfyui", ["patch"], "lora"),
            ("diffusers", ["attn1.to_q"], "lora"),
            ("kohya", ["attn1.to_q"], "lora"),
            ("kohya", [""], "lora"),
            ("kohya", ["attn1", "attn2", "ffn.net.0.proj", "ffn.net.2"], "lokr"),
            ("lycoris", [""], "lora"),
        ],
    )
    def test_inspect_knows_what_diffusers_refuses(self, i2v, target, matrices, written, lora, lokr, form, ends, kind):
        shapes = matrices(i2v, ends) or {"patch_embedding": target(i2v).shapes["patch_embedding"]}
        file = written(lora(shapes) if kind == "lora" else lokr(shapes, whole=True, alpha=1.0), i2v, form)
        said = inspection.inspect(file, i2v).refused.get("diffusers", {})
        try:
            WanImageToVideoPipeline.from_pretrained(i2v, **LIGHT).load_lora_weights(str(file))
        except (ValueError, KeyError, IndexError):
            assert said
        else:
            assert not said


LIGHT = {"text_encoder": None, "tokenizer": None, "vae": None, "image_encoder": None, "image_processor": None}


class TestConvert:
    """Another format of the same."""

    def test_lokr_becomes_lora_with_the_error_said(self, t2v, matrices, written, lokr, deltas, run):
        source = written(lokr(matrices(t2v), whole=True, alpha=1.0), t2v, "lycoris")
        with pytest.raises(CheckpointError, match="--rank"):
            run("convert", source, "--to", "diffusers", "--model", t2v)
        output = run("convert", source, "--to", "diffusers", "--model", t2v, "--rank", 8)
        exact, found = deltas(source, t2v), deltas(source.with_name("lora.diffusers.safetensors"), t2v)
        lost = sum(float((found[each] - exact[each]).norm() ** 2) for each in exact) ** 0.5
        whole = sum(float(each.norm() ** 2) for each in exact.values()) ** 0.5
        optimal = sum(float(torch.linalg.svdvals(each)[8:].square().sum()) for each in exact.values()) ** 0.5
        assert lost == pytest.approx(optimal, rel=1e-4)
        line = next(line for line in output.splitlines() if line.startswith("│ all"))
        assert float(line.split("│")[3]) == pytest.approx(lost / whole, rel=1e-2)

    def test_lokr_and_its_alpha_keep_their_kind_and_values(self, t2v, matrices, written, lokr):
        source = written(lokr(matrices(t2v), whole=False, alpha=1.5), t2v, "lycoris")
        tensors = load_file(convert.convert(source, "comfyui", model=t2v).path)
        old = load_file(source)
        key = "blocks.0.self_attn.q"
        for part in ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"):
            assert torch.equal(tensors[f"diffusion_model.{key}.{part}"], old[f"lycoris_blocks_0_attn1_to_q.{part}"])

    def test_published_models_are_known_by_their_shapes(self, tmp_path):
        for dim, ends in ((1536, ["t2v-480p-1.3b-2.1"]), (3072, ["ti2v-5b-2.2"]), (5120, ["i2v-14b-2.2-high"])):
            name = "diffusion_model.blocks.29.self_attn.q"
            tensors = {f"{name}.lora_A.weight": torch.ones(1, dim), f"{name}.lora_B.weight": torch.ones(dim, 1)}
            save(tensors, {}, tmp_path / f"{dim}.safetensors")
            done = convert.convert(tmp_path / f"{dim}.safetensors", "kohya")
            assert set(load_file(done.path)) >= {"lora_unet_blocks_29_self_attn_q.lora_down.weight"}
            assert set(ends) <= set(inspection.inspect(done.path).fits)
        assert "t2v-480p-1.3b-2.1" not in inspection.inspect(tmp_path / "5120.safetensors").fits

    def test_a_file_of_no_known_model_is_refused(self, t2v, matrices, written, lora, tmp_path):
        source = written(lora(matrices(t2v)), t2v)
        with pytest.raises(CheckpointError, match="the weight has shape") as caught:
            convert.convert(source, "kohya", tmp_path / "out.safetensors")
        assert "60 of 60 keys" in str(caught.value)
        assert "diffusion_model.blocks.0.cross_attn.k." in str(caught.value)
        assert "--model" in "".join(caught.value.__notes__)
        assert not (tmp_path / "out.safetensors").exists()

    def test_nothing_is_overwritten_unasked(self, t2v, matrices, written, lora, tmp_path, run):
        source, out = written(lora(matrices(t2v)), t2v), tmp_path / "mine.safetensors"
        out.write_bytes(b"mine")
        with pytest.raises(ConfigError, match="exists"):
            run("convert", source, "--to", "kohya", "-o", out, "--model", t2v)
        assert out.read_bytes() == b"mine"
        run("convert", source, "--to", "kohya", "-o", out, "--model", t2v, "--force")
        assert load_file(out)
        with pytest.raises(ConfigError, match="is what is read"):
            run("convert", source, "--to", "kohya", "-o", source, "--model", t2v, "--force")
        with pytest.raises(ConfigError, match="did you mean 'kohya'"):
            run("convert", source, "--to", "koya", "--model", t2v)


class TestCombine:
    """Several adapters as one."""

    def test_the_sum_is_exact(self, t2v, matrices, written, lora, deltas, tmp_path, run):
        first = written(lora(matrices(t2v), 4, 6.0), t2v, "kohya", "first")
        second = written(lora(matrices(t2v, ["attn1.to_q"]), 2, 1.0, seed=1), t2v, "comfyui", "second")
        run("merge", first, second, "--weights", "0.5,-2", "-o", tmp_path / "sum.safetensors", "--model", t2v)
        found, one, two = (deltas(path, t2v) for path in (tmp_path / "sum.safetensors", first, second))
        for module, each in one.items():
            exact = 0.5 * each + (-2 * two[module] if module in two else 0)
            torch.testing.assert_close(found[module], exact, atol=1e-6, rtol=0)

    def test_a_rank_keeps_the_most(self, t2v, matrices, written, lora, deltas, tmp_path):
        paths = [written(lora(matrices(t2v), 4, seed=seed), t2v, name=f"{seed}") for seed in (0, 1)]
        done = combine.combine(paths, None, tmp_path / "sum.safetensors", rank=3, model=t2v)
        found, one, two = (deltas(path, t2v) for path in (done.path, *paths))
        for module, each in found.items():
            values = torch.linalg.svdvals(exact := one[module] + two[module])
            assert float((each - exact).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-4)
            assert done.errors[module][0] == pytest.approx(float(values[3:].norm()), rel=1e-4)

    def test_other_kinds_need_a_rank(self, t2v, matrices, written, lora, lokr, deltas, tmp_path):
        shapes = matrices(t2v, ["attn1.to_q"])
        paths = [written(lora(shapes), t2v, name="a"), written(lokr(shapes, whole=True, alpha=1.0), t2v, name="b")]
        with pytest.raises(CheckpointError, match="is not LoRA in all files"):
            combine.combine(paths, None, tmp_path / "sum.safetensors", model=t2v)
        done = combine.combine(paths, None, tmp_path / "sum.safetensors", rank=24, model=t2v)
        found, one, two = (deltas(path, t2v) for path in (done.path, *paths))
        assert all(torch.allclose(found[each], one[each] + two[each], atol=1e-5) for each in found)

    def test_files_for_different_models_are_refused(self, t2v, i2v, matrices, written, lora, tmp_path):
        paths = [written(lora(matrices(base)), base, name=base.parent.name) for base in (t2v, i2v)]
        with pytest.raises(CheckpointError, match="names no weight of the model"):
            combine.combine(paths, None, tmp_path / "sum.safetensors", model=t2v)
        with pytest.raises(ConfigError, match="2 files and 1 weights"):
            combine.combine(paths, [1.0], tmp_path / "sum.safetensors", model=t2v)


class TestExtract:
    """A LoRA of a difference."""

    def test_what_was_merged_comes_out_again(self, t2v, matrices, written, lora, deltas, tmp_path, run):
        source = written(lora(matrices(t2v), rank=4), t2v)
        into_base.merge([source], None, t2v, tmp_path / "tuned")
        out = tmp_path / "extracted.safetensors"
        output = run("extract", t2v, tmp_path / "tuned", "-o", out, "--rank", 4, "--to", "kohya")
        found, exact = deltas(out, t2v), deltas(source, t2v)
        assert found.keys() == exact.keys()
        assert all(torch.allclose(found[each], exact[each], atol=1e-5) for each in exact)
        assert "20 modules of rank 4" in output

    def test_what_a_lora_cannot_hold_is_said(self, t2v, tmp_path):
        tensors = load_file(t2v / WEIGHTS)
        for name in ("blocks.0.attn1.to_q.weight", "blocks.0.attn1.to_q.bias", "blocks.1.scale_shift_table"):
            tensors[name] = tensors[name] + torch.randn(tensors[name].shape)
        save_file(tensors, tmp_path / "tuned.safetensors")
        done = extract.extract(t2v / WEIGHTS, tmp_path / "tuned.safetensors", tmp_path / "out.safetensors", rank=2)
        assert set(done.left_out) == {"blocks.0.attn1.to_q.bias", "blocks.1.scale_shift_table"}
        assert set(done.errors) == {"blocks.0.attn1.to_q"}
        lost, whole = done.errors["blocks.0.attn1.to_q"]
        assert 0.5 < lost / whole < 1  # noise of full rank, of which two of 24 directions are kept

    def test_other_models_and_equal_ones_are_refused(self, t2v, i2v, tmp_path):
        with pytest.raises(ModelError, match=r"tensors are not alike: blocks\.0\.attn2\.add_k_proj"):
            extract.extract(t2v, i2v, tmp_path / "out.safetensors", rank=2)
        with pytest.raises(CheckpointError, match="no matrix differs"):
            extract.extract(t2v, t2v, tmp_path / "out.safetensors", rank=2)
        assert not list(tmp_path.iterdir())

    def test_large_matrices_are_decomposed_nearly_as_well(self):
        draw = torch.Generator().manual_seed(0)
        signal = torch.randn(640, 8, generator=draw) @ torch.randn(8, 900, generator=draw)
        matrix = signal + torch.randn(640, 900, generator=draw)
        before = torch.random.get_rng_state()
        update, (lost, whole) = as_low_rank(matrix, 8)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert lost <= 1.001 * float(torch.linalg.svdvals(matrix)[8:].norm())
        torch.testing.assert_close(float((update.delta(matrix.shape) - matrix).norm()), lost, rtol=1e-4, atol=0)
        assert whole == pytest.approx(float(matrix.norm()))
        exact, _ = recompressed(torch.randn(12, 30), torch.randn(20, 12), 12)
        assert exact.rank == 12


class TestInspect:
    """What a file is."""

    def test_everything_for_programs(self, t2v, matrices, written, lora, deltas, run):
        file = written(lora(matrices(t2v)), t2v, **{"tuner.expert": "high_noise", "tuner.base_model": "Wan-AI/Wan"})
        said = json.loads(run("inspect", file, "--model", t2v, "--json"))
        assert said["layout"] == "comfyui"
        assert (said["kinds"], said["ranks"], said["alphas"]) == ({"LoRA": 20}, {"4": 20}, {"6": 20})
        assert (said["base"], said["stage"]) == ("Wan-AI/Wan", "high_noise")
        assert said["fits"] == [str(t2v)]
        assert said["unread"] == {}
        exact = deltas(file, t2v)
        assert list(said["norms"]) == sorted(exact, key=lambda each: -float(exact[each].norm()))
        for module, each in exact.items():
            assert said["norms"][module]["norm"] == pytest.approx(float(each.norm()), rel=1e-5)

    def test_keys_that_would_not_load_and_where(self, t2v, matrices, written, lora, tmp_path, run):
        tensors = load_file(written(lora(matrices(t2v)), t2v, "diffusers"))
        tensors["transformer.blocks.7.attn1.to_q.lora_A.weight"] = torch.zeros(4, 24)
        save_file(tensors, tmp_path / "odd.safetensors")
        output = " ".join(run("inspect", tmp_path / "odd.safetensors", "--model", t2v).split())
        assert "names no weight of the model: transformer.blocks.7.attn1.to_q.lora_A.weight" in output
        assert "40 keys would not load in ComfyUI" in output
        assert "would not load in diffusers" not in output
        assert "no 'lora_adapter_metadata' in the metadata" in output

    def test_a_lokr(self, t2v, matrices, written, lokr, deltas):
        file = written(lokr(matrices(t2v), whole=False, alpha=1.0), t2v)
        said = inspection.inspect(file, t2v)
        assert dict(said.kinds) == {"LoKr": 20}
        assert "ComfyUI" not in said.refused
        assert len(said.refused["diffusers"]) == said.keys
        for module, each in deltas(file, t2v).items():
            assert said.norms[module][0] == pytest.approx(float(each.norm()), rel=1e-5)

    def test_what_is_no_adapter(self, t2v, run):
        with pytest.raises(TunerError, match="no known format of adapters"):
            run("inspect", t2v / WEIGHTS)


def test_a_folder_in_place_of_a_file_is_said_with_the_files_in_it(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"this is a folder(.|\n)*one\.safetensors"):
        inspection.inspect(tmp_path)
