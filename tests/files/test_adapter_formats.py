"""Formats of adapter files: what is read is what was meant, whatever program wrote it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuner.builtin.adapter_file import AdapterFile, Update, load, low_rank, read, recognise
from tuner.builtin.adapter_formats import models
from tuner.builtin.adapter_formats.convert import convert
from tuner.builtin.adapter_names import FORMATS
from tuner.errors import CheckpointError

ATTENTION = [f"attn{index}.{each}" for index in (1, 2) for each in ("to_q", "to_k", "to_v", "to_out.0")]
FORMS = ("comfyui", "diffusers", "kohya", "lycoris")
Q = "blocks.0.attn1.to_q"


def read_back(tensors, aim, metadata=None):
    """A file of these tensors as it is read for a target, whatever does not fit included."""
    form = next(each for each in reversed(FORMATS.values()) if each.claims(tensors))
    return form.read(tensors, metadata or {}, aim.spec, aim.shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_way_through_all_formats_and_back_changes_nothing(i2v, matrices, written, dtype, lora, deltas):
    file = lora(matrices(i2v), dtype=dtype)
    first = written(file, i2v)
    wanted = deltas(first, i2v)
    assert {module.rpartition(".")[2] for module in wanted} >= {"add_k_proj", "add_v_proj"}
    path = first
    for index, form in enumerate(("kohya", "diffusers", "lycoris", "comfyui")):
        path = convert(path, form, path.with_name(f"{index}.safetensors"), model=i2v).path
        found = deltas(path, i2v)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[module], wanted[module]) for module in wanted)
    ours, theirs = load_file(first), load_file(path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


@pytest.mark.parametrize(("source", "form"), list(permutations(FORMS, 2)))
def test_a_part_of_the_matrices_with_ranks_and_alphas_of_their_own(t2v, matrices, written, source, form, lora, deltas):
    shapes = matrices(t2v, ["attn1.to_q", "ffn.net.2"])
    files = [
        lora({module: shape}, rank, alpha).updates
        for (module, shape), rank, alpha in zip(shapes.items(), (1, 2, 4, 8), (1.0, 7.5, 4.0, 1.0), strict=True)
    ]
    file = AdapterFile({module: update for each in files for module, update in each.items()})
    path = written(file, t2v, source)
    found = deltas(convert(path, form, model=t2v).path, t2v)
    for module, update in file.updates.items():
        exact = update.tensors["lora_up"].double() @ update.tensors["lora_down"].double()
        exact *= update.alpha / update.rank
        torch.testing.assert_close(found[module], exact, atol=1e-6, rtol=0)


def original_names(image: bool) -> set[str]:
    """Modules with a weight in Wan's own code (wan/modules/model.py), of a model with two blocks."""
    block = [
        f"{each}.{name}" for each in ("self_attn", "cross_attn") for name in ("q", "k", "v", "o", "norm_q", "norm_k")
    ]
    block += ["ffn.0", "ffn.2", "norm3", *(("cross_attn.k_img", "cross_attn.v_img", "cross_attn.norm_k_img") * image)]
    outside = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    outside += ["time_projection.1", "head.head", *(f"img_emb.proj.{index}" for index in (0, 1, 3, 4) if image)]
    return {f"blocks.{index}.{name}" for index in range(2) for name in block} | set(outside)


@pytest.mark.parametrize(("model", "image"), [("t2v", False), ("i2v", True)])
@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_names_are_those_that_comfyui_looks_for(request, target, model, image, form):
    base = request.getfixturevalue(model)
    aim = target(base)
    file = AdapterFile({module: Update({"diff": torch.zeros(shape)}) for module, shape in aim.shapes.items()})
    tensors, _ = FORMATS[form].write(file, aim.spec)
    # comfy/lora.py, model_lora_keys_unet: both spellings of every weight of the network.
    keys = {
        "comfyui": {f"diffusion_model.{name}.diff" for name in original_names(image)},
        "kohya": {f"lora_unet_{name.replace('.', '_')}.diff" for name in original_names(image)},
    }
    assert set(tensors) == keys[form]


def test_comfyui_reads_a_core_only_beside_the_names_down_and_up(t2v, target):
    """comfy/weight_adapter/lora.py: with lora_A and lora_B it looks for no lora_mid."""
    aim = target(t2v)
    shape = aim.shapes["patch_embedding"]
    update = Update(
        {
            "lora_down": torch.randn(2, shape[1], 1, 1, 1),
            "lora_up": torch.randn(shape[0], 2),
            "lora_mid": torch.randn(2, 2, 1, 2, 2),
        }
    )
    tensors, _ = FORMATS["comfyui"].write(AdapterFile({"patch_embedding": update}), aim.spec)
    assert {key.removeprefix("diffusion_model.patch_embedding.") for key in tensors} == {
        *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha")
    }
    assert torch.equal(read_back(tensors, aim).updates["patch_embedding"].delta(shape), update.delta(shape))


class TestKinds:
    """What is added, against formulas written out."""

    def test_kronecker_products(self):
        w1, a, b = torch.randn(3, 2), torch.randn(8, 2), torch.randn(2, 6)
        exact = torch.kron(w1.double(), a.double() @ b.double()) * (3 / 2)
        found = Update({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, 3.0).delta((24, 12), dtype=torch.float64)
        torch.testing.assert_close(found, exact)

    def test_elementwise_products(self):
        a, b, c, d = torch.randn(6, 2), torch.randn(2, 5), torch.randn(6, 2), torch.randn(2, 5)
        exact = (a.double() @ b.double()) * (c.double() @ d.double()) * (5 / 2)
        update = Update({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, 5.0)
        torch.testing.assert_close(update.delta((6, 5), dtype=torch.float64), exact)

    def test_convolutions_with_a_core_are_those_of_lycoris(self):
        functional = pytest.importorskip("lycoris.functional")
        up, down, mid = torch.randn(6, 2, 1, 1), torch.randn(2, 4, 1, 1), torch.randn(2, 2, 3, 3)
        update = Update({"lora_down": down, "lora_up": up, "lora_mid": mid}, 3.0)
        exact = functional.locon.diff_weight(down, up, mid, gamma=1.5)
        torch.testing.assert_close(update.delta((6, 4, 3, 3)), exact.reshape(6, 4, 3, 3))
        names = ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")
        parts = [
            torch.randn(2, 4),
            torch.randn(2, 6),
            torch.randn(2, 4),
            torch.randn(2, 6),
            *torch.randn(2, 2, 2, 3, 3),
        ]
        exact = functional.loha.diff_weight(*parts, gamma=torch.tensor(1.5))
        update = Update({f"hada_{name}": part for name, part in zip(names, parts, strict=True)}, 3.0)
        torch.testing.assert_close(update.delta((6, 4, 3, 3)), exact.reshape(6, 4, 3, 3))

    def test_dora_is_what_peft_computes(self):
        from peft import LoraConfig, get_peft_model
        from torch import nn

        network = get_peft_model(
            nn.Sequential(nn.Linear(12, 8, bias=False)),
            LoraConfig(r=2, lora_alpha=5, target_modules=["0"], use_dora=True, init_lora_weights=False),
        )
        layer = network.base_model.model[0]
        nn.init.uniform_(layer.lora_magnitude_vector["default"].weight, 0.5, 1.5)
        base, rows = layer.base_layer.weight.detach().clone(), torch.randn(3, 12)
        scale = layer.lora_magnitude_vector["default"].weight.detach().reshape(-1, 1)
        update = low_rank(layer.lora_A["default"].weight, layer.lora_B["default"].weight, 5.0, scale)
        added = update.delta((8, 12), base)
        torch.testing.assert_close(rows @ (base + added).mT, network(rows), atol=1e-5, rtol=1e-5)
        with pytest.raises(CheckpointError, match="depends on the weights of the base"):
            update.delta((8, 12))


class TestAlpha:
    """Alpha is applied once, wherever it is written."""

    def one(self, aim, metadata=None, **parts):
        tensors = {f"transformer.{Q}.{end.replace('__', '.')}": tensor for end, tensor in parts.items()}
        return read_back(tensors, aim, metadata).updates[Q]

    def test_in_the_metadata_only(self, t2v, target):
        pair = {"lora_A__weight": torch.randn(4, 24), "lora_B__weight": torch.randn(24, 4)}

        def scale(**config):
            packed = json.dumps({f"transformer.{key}": value for key, value in config.items()})
            return self.one(target(t2v), {"lora_adapter_metadata": packed}, **pair).scale

        assert scale(r=4, lora_alpha=6) == 1.5
        assert scale(r=4, lora_alpha=6, use_rslora=True) == pytest.approx(3.0)
        assert scale(r=8, lora_alpha=6, rank_pattern={"to_q": 4}, alpha_pattern={"attn1.to_q": 2}) == 0.5
        assert self.one(target(t2v), {}, **pair).scale == 1.0

    def test_a_lost_alpha_is_the_rank_and_said(self, t2v, matrices, written, target, lora):
        path = written(lora(matrices(t2v, ["attn1.to_q"])), t2v)
        tensors, metadata = load(path)
        assert metadata["ss_network_alpha"] == "6"
        kept = {key: tensor for key, tensor in tensors.items() if not key.endswith("alpha")}
        file = read_back(kept, target(t2v), metadata)
        assert {update.scale for update in file.updates.values()} == {1.0}  # as ComfyUI and diffusers take it
        assert "2 modules have no alpha" in file.notes[0]
        assert "ss_network_alpha 6" in file.notes[0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_a_huge_one_of_a_whole_lokr_scales_nothing(self, t2v, matrices, written, tmp_path, dtype, lokr, deltas):
        file = lokr(matrices(t2v), whole=True, alpha=9999999999.0)
        path = written(file, t2v)
        halved = {key: tensor.to(dtype) for key, tensor in load_file(path).items()}
        halved |= {key: torch.tensor(9999999999.0).to(dtype) for key in halved if key.endswith("alpha")}
        save_file(halved, tmp_path / "half.safetensors")
        found = deltas(convert(tmp_path / "half.safetensors", "kohya", model=t2v).path, t2v)
        for module, update in file.updates.items():
            exact = torch.kron(
                update.tensors["lokr_w1"].to(dtype).double(), update.tensors["lokr_w2"].to(dtype).double()
            )
            torch.testing.assert_close(found[module], exact, atol=1e-6, rtol=0)
        alphas = [
            tensor for key, tensor in load_file(tmp_path / "half.kohya.safetensors").items() if key.endswith("alpha")
        ]
        assert torch.stack(alphas).isfinite().all()

    def test_biases_that_peft_scales(self, t2v, target, matrices, lora):
        """PEFT's lora_bias goes through the scale; a difference of a bias does not."""
        file = replace(lora(matrices(t2v, ["attn1.to_q"])), biases={Q: torch.randn(24)})
        aim = target(t2v)
        for form in FORMS:
            tensors, metadata = FORMATS[form].write(file, aim.spec)
            torch.testing.assert_close(read_back(tensors, aim, metadata).biases[Q], file.biases[Q])


class TestForeignNames:
    """Files as other programs write them."""

    @pytest.mark.parametrize(
        ("key", "noted"),
        [
            ("base_model.model.blocks.0.attn1.to_q.lora_{}.weight", False),  # PEFT
            ("blocks.0.attn1.to_q.lora_{}.default.weight", False),
            ("blocks.0.self_attn.q.lora_{}.default.weight", False),  # DiffSynth
            ("pipe.dit.blocks.0.self_attn.q.lora_{}.default.weight", False),
            ("model.diffusion_model.blocks.0.self_attn.q.lora_{}.weight", True),
            ("diffusion_model.blocks.0.attn1.to_q.lora_{}.weight", True),  # the prefix alone was changed
        ],
    )
    def test_of_a_pair(self, t2v, target, key, noted):
        tensors = {key.format("A"): torch.randn(4, 24), key.format("B"): torch.randn(24, 4)}
        file = read_back(tensors, target(t2v))
        assert file.unread == {}
        torch.testing.assert_close(file.updates[Q].delta((24, 24)), tensors[key.format("B")] @ tensors[key.format("A")])
        assert any("not named as readers of comfyui files expect" in note for note in file.notes) == noted

    def test_of_two_underscores(self, t2v, target):
        tensors = {"lora_unet__blocks_0_self_attn_q.lora_down.weight": torch.randn(4, 24)}
        tensors["lora_unet__blocks_0_self_attn_q.lora_up.weight"] = torch.randn(24, 4)
        assert set(read_back(tensors, target(t2v)).updates) == {Q}

    def test_names_that_are_each_others_beginning(self, i2v, target, lora):
        """cross_attn_k and cross_attn_k_img: the underscores cannot simply become dots."""
        aim = target(i2v)
        updates = lora({f"blocks.0.attn2.{each}": (24, 24) for each in ("to_k", "add_k_proj", "to_v", "add_v_proj")})
        tensors, _ = FORMATS["kohya"].write(updates, aim.spec)
        assert "lora_unet_blocks_0_cross_attn_k_img.lora_up.weight" in tensors
        assert set(read_back(tensors, aim).updates) == set(updates.updates)


class TestRefusals:
    """What does not fit is refused, with the keys that do not."""

    def test_another_model_with_the_first_keys_that_differ(self, t2v, i2v, matrices, written, lora):
        path = written(lora(matrices(i2v)), i2v)
        aim = models.targets(t2v)[0]
        with pytest.raises(CheckpointError, match=r"8 of 72|12 of 72") as caught:
            read(path, aim.spec, aim.shapes, FORMATS)
        assert "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight: names no weight of the model" in str(
            caught.value
        )

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"lora_B.weight": None}, "only one of the two matrices"),
            ({"lora_A.weight": torch.zeros(4, 32)}, "the weight has shape"),
            ({"hada_w1_a": torch.zeros(24, 4)}, "two kinds"),
            ({"oft_blocks": torch.zeros(4, 4)}, "no reader knows"),
            ({"diff_b": torch.zeros(3)}, "the bias has shape"),
            ({"lora_B.weight": None, "lora_A.weight": None}, "belongs to no update"),
        ],
    )
    def test_a_broken_module(self, t2v, target, written, matrices, change, why, lora):
        tensors = load_file(written(lora(matrices(t2v)), t2v))
        for end, tensor in change.items():
            tensors.pop(key := f"diffusion_model.blocks.0.self_attn.q.{end}", None)
            tensors |= {} if tensor is None else {key: tensor}
        unread = read_back(tensors, target(t2v)).unread
        assert unread
        assert all(
            why in reason and key.startswith("diffusion_model.blocks.0.self_attn.q.") for key, reason in unread.items()
        )

    def test_what_is_no_adapter(self, t2v, tmp_path):
        (tmp_path / "lora.pt").write_bytes(b"\x80\x04K*.")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load(tmp_path / "lora.pt")
        with pytest.raises(CheckpointError, match="no known format of adapters has such keys"):
            convert(t2v / "transformer" / "diffusion_pytorch_model.safetensors", "kohya", tmp_path / "x.safetensors")

    def test_what_a_format_cannot_hold(self, t2v, target, matrices, lora, lokr):
        aim = target(t2v)
        with pytest.raises(CheckpointError, match=r"nothing that diffusers loads, such as .*LoKr"):
            FORMATS["diffusers"].write(lokr(matrices(t2v), whole=True, alpha=1.0), aim.spec)
        dora = lora(matrices(t2v, ATTENTION))
        dora = replace(
            dora, updates={name: replace(each, dora_scale=torch.ones(24, 1)) for name, each in dora.updates.items()}
        )
        for form in ("comfyui", "kohya"):
            with pytest.raises(CheckpointError, match="divides by the norms of the base's rows"):
                FORMATS[form].write(dora, aim.spec)


def test_a_plugins_format_comes_before_those_of_the_core():
    class Mine:
        def claims(self, keys):
            return any(key.startswith("mine/") for key in keys)

    formats = {**FORMATS, "mine": Mine()}
    assert recognise({"mine/x.lora_A.weight": torch.zeros(1)}, formats, "here") == "mine"
    assert recognise({"x.lora_A.weight": torch.zeros(1)}, formats, "here") == "peft"
