"""Adapters in the weights of a base: what changes, what does not, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tuner.builtin.adapter_formats import into_base, models
from tuner.errors import ConfigError, ModelError

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class TestIntoBase:
    """A base with adapters in its weights."""

    def test_only_what_the_file_names_changes_and_the_base_does_not(
        self, t2v, matrices, written, lora, deltas, tmp_path, run
    ):
        source = written(lora(matrices(t2v, ["attn1.to_q"])), t2v)
        before, plain = bytes_of(t2v), load_file(t2v / WEIGHTS)
        output = run("merge", source, "--into", t2v, "-o", tmp_path / "merged", "--weights", 0.5)
        assert bytes_of(t2v) == before
        assert "2 tensors of transformer changed" in output
        after = bytes_of(tmp_path / "merged")
        assert {name for name in before if after[name] != before[name]} == {WEIGHTS.as_posix()}
        merged, added = load_file(tmp_path / "merged" / WEIGHTS), deltas(source, t2v)
        for name, tensor in plain.items():
            exact = tensor.double() + 0.5 * added.get(name.removesuffix(".weight"), 0)
            torch.testing.assert_close(merged[name].double(), exact, atol=1e-6, rtol=0)

    def test_shards_and_bf16(self, t2v, matrices, written, lora, deltas, tmp_path):
        network = WanTransformer3DModel.from_pretrained(t2v / "transformer", torch_dtype=torch.bfloat16)
        network.save_pretrained(tmp_path / "base" / "transformer", max_shard_size="30KB")
        plain = {name: each.clone() for name, each in network.state_dict().items()}
        source = written(lora(matrices(t2v)), t2v)
        done = into_base.merge([source], None, tmp_path / "base", tmp_path / "merged")
        merged = WanTransformer3DModel.from_pretrained(tmp_path / "merged" / "transformer", torch_dtype=torch.bfloat16)
        for module, added in deltas(source, t2v).items():
            name = f"{module}.weight"
            found = merged.state_dict()[name].double()
            torch.testing.assert_close(found, plain[name].double() + added, rtol=2**-8, atol=1e-9)
            lost = float((found - plain[name].double() - added).norm())
            assert done.rounding[name][0] == pytest.approx(lost, rel=1e-3)

    def test_a_variant_beside_the_weights_is_left_alone(self, t2v, matrices, written, lora, tmp_path):
        base = tmp_path / "base"
        base.mkdir()
        for name in ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16"):
            save_file(load_file(t2v / WEIGHTS), base / f"{name}.safetensors")
        source = written(lora(matrices(t2v)), t2v)
        into_base.merge([source], None, base, tmp_path / "merged")
        before, after = bytes_of(base), bytes_of(tmp_path / "merged")
        assert {name for name in before if before[name] != after[name]} == {"diffusion_pytorch_model.safetensors"}

    def test_files_of_different_experts_are_said_to_be(self, t2v, matrices, written, lora, tmp_path, run):
        shapes = matrices(t2v, ["attn1.to_q"])
        files = []
        for name in ("transformer", "transformer_2"):
            file = written(lora(shapes), t2v, **{"tuner.network": name})
            files.append(file.rename(tmp_path / f"{name}.safetensors"))
        line = "note: these are for different networks: transformer_2.safetensors for transformer_2; merged into transf"
        assert line in run("merge", files[1], "--into", t2v, "-o", tmp_path / "merged").replace("\n", " ")
        assert "different networks" not in run("merge", files[0], "--into", t2v, "-o", tmp_path / "other")
        both = run("merge", *files, "--model", t2v, "-o", tmp_path / "both.safetensors").replace("\n", " ")
        assert "transformer.safetensors for transformer, transformer_2.safetensors for transformer_2" in both
        alike = run("merge", files[0], files[0], "--model", t2v, "-o", tmp_path / "alike.safetensors")
        assert "different networks" not in alike

    def test_the_expert_that_the_file_is_for(self, experts, written, lora, tmp_path, run):
        shapes = {
            module: shape for module, shape in models.targets(experts)[1].shapes.items() if "attn1.to_q" in module
        }
        before = bytes_of(experts)
        file = written(lora(shapes), experts, **{"tuner.network": "transformer_2"})
        run("merge", file, "--into", experts, "-o", tmp_path / "merged")
        changed = {name for name, each in bytes_of(tmp_path / "merged").items() if each != before[name]}
        assert changed == {f"transformer_2/{WEIGHTS.name}"}
        silent = written(lora(shapes), experts, name="silent")
        with pytest.raises(ConfigError, match="do not say which one they are for"):
            run("merge", silent, "--into", experts, "-o", tmp_path / "other")
        run("merge", silent, "--into", experts, "-o", tmp_path / "other", "--network", "transformer")
        changed = {name for name, each in bytes_of(tmp_path / "other").items() if each != before[name]}
        assert changed == {WEIGHTS.as_posix()}

    def test_a_single_file_with_original_names(self, t2v, target, matrices, written, lora, deltas, tmp_path, run):
        aim, base = target(t2v), tmp_path / "wan.safetensors"
        plain = load_file(t2v / WEIGHTS)
        renamed = {
            f"model.diffusion_model.{aim.spec.original_name(name.rpartition('.')[0])}.{name.rpartition('.')[2]}": tensor
            for name, tensor in plain.items()
            if "scale_shift_table" not in name
        }
        save_file(renamed, base)
        source = written(lora(matrices(t2v)), t2v)
        run("merge", source, "--into", base, "-o", tmp_path / "merged.safetensors")
        found = load_file(tmp_path / "merged.safetensors")["model.diffusion_model.blocks.0.self_attn.q.weight"]
        exact = plain["blocks.0.attn1.to_q.weight"].double() + deltas(source, t2v)["blocks.0.attn1.to_q"]
        torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=0)

    def test_quantised_bases_are_refused(self, t2v, matrices, written, lora, tmp_path):
        source, quantised = written(lora(matrices(t2v)), t2v), tmp_path / "q"
        tensors = load_file(t2v / WEIGHTS)
        tensors["blocks.1.attn1.to_q.weight"] = tensors["blocks.1.attn1.to_q.weight"].to(torch.float8_e4m3fn)
        quantised.mkdir()
        save_file(tensors, quantised / "diffusion_pytorch_model.safetensors")
        with pytest.raises(ModelError, match=r"the base is quantised: blocks\.1\.attn1\.to_q\.weight is F8_E4M3"):
            into_base.merge([source], None, quantised, tmp_path / "merged")
        save_file(load_file(t2v / WEIGHTS), quantised / "diffusion_pytorch_model.safetensors")
        (quantised / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
        with pytest.raises(ModelError, match="has a quantization_config"):
            into_base.merge([source], None, quantised, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    def test_places_that_are_taken_or_wrong(self, t2v, matrices, written, lora, tmp_path):
        source = written(lora(matrices(t2v)), t2v)
        for out, words in (
            (tmp_path, "exists"),
            (t2v / "inside", "is inside the base"),
            (tmp_path / "x.safetensors", "folder"),
        ):
            with pytest.raises(ConfigError, match=words):
                into_base.merge([source], None, t2v, out)
        with pytest.raises(ModelError, match="does not exist"):
            into_base.merge([source], None, tmp_path / "nothing", tmp_path / "merged")

    def test_a_failure_in_the_middle_leaves_nothing(self, t2v, matrices, written, lora, tmp_path, monkeypatch):
        source = written(lora(matrices(t2v)), t2v)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(into_base, "_overwrite", full)
        (tmp_path / "new").mkdir()
        with pytest.raises(OSError, match="No space left"):
            into_base.merge([source], None, t2v, tmp_path / "new" / "merged")
        assert list((tmp_path / "new").iterdir()) == []
