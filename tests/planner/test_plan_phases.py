"""Memory of caching and validation, held against counts of the VAE and against figures by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from tuner import pipeline
from tuner.assembly import assemble, new_run
from tuner.builtin.planner.memory_phases import decoding, encoding, phases
from tuner.data.samples import Bucket
from tuner.run import Run
from tuner.spec import ModelSpec
from tuner.testing.peak import StepBytes, fakes, without_storage
from tuner.workload import Workload
from tuner_wan.encode import encode_clip

SMALL, LARGE, TI2V = "t2v-480p-1.3b-2.1", "t2v-480p-14b-2.1", "ti2v-5b-2.2"
CLIP, PICTURE = (81, 480, 832), (1, 480, 832)
VAES: dict[str, dict[str, Any]] = {
    SMALL: {"base_dim": 96, "z_dim": 16},
    TI2V: {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
    },
}
"""Of the repositories' config.json files, beside the class's defaults."""


@dataclass
class Case:
    """A config and the shape of its clips."""

    flavour: str
    shape: tuple[int, int, int]
    keys: Mapping[str, Any] = field(default_factory=dict)


def described(case: Case, folder: Path) -> tuple[Run, ModelSpec, Workload]:
    """The workload as the loaded plugins estimate it."""
    settings = {"model_family": "wan", "model_flavour": case.flavour, "output_dir": str(folder), "max_train_steps": 1}
    assembly = assemble({**settings, **case.keys})
    run = new_run(assembly)
    spec = pipeline.describe(run, assembly.manager)
    assert run.estimate is not None
    return run, spec, run.estimate(spec.networks[0], Bucket(*case.shape), 1)


@pytest.mark.parametrize("flavour", [SMALL, TI2V])
@pytest.mark.parametrize("shape", [(9, 480, 832), (1, 704, 1280)])
def test_encoding_and_decoding_hold_what_the_vae_does(
    flavour: str, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    """A VAE of the real dimensions; the clip itself is on the host."""
    _, spec, workload = described(Case(flavour, shape), tmp_path)
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan(**VAES[flavour]).eval().requires_grad_(False)
    with fakes():
        without_storage(vae)
        pixels = torch.empty(3, *shape)
        latents = torch.empty(1, *spec.latents.shape(*shape))
        with torch.no_grad(), StepBytes(vae, on_host=[pixels]) as encoded:
            encode_clip(vae, pixels)
        with torch.no_grad(), StepBytes(vae) as decoded:
            vae.decode(latents)
    assert spec.components["vae"]["weights"] == sum(each.nbytes for each in vae.parameters())
    at_work = {
        "encoding": encoding(spec, "vae", workload).device["vae at work"],
        "decoding": decoding(spec, "vae", workload).device["vae at work"],
    }
    assert at_work["encoding"] == pytest.approx(encoded.peak, rel=0.05)
    assert at_work["decoding"] == pytest.approx(decoded.peak, rel=0.05)


def test_phases_hold_what_is_loaded_in_them(tmp_path: Path) -> None:
    """By hand: UMT5 in bfloat16 or eight bits, or two of its 24 blocks; a second expert waits on the host."""
    both = Case("t2v-14b-2.2-both", CLIP)
    _, spec, workload = described(both, tmp_path)
    whole = {str(each): each.memory for each in phases(spec, replace(workload, rendered=PICTURE))}
    assert whole["caching (text encoder)"].device["weights of text encoder"] == 2 * 5_680_910_336
    quantised = phases(spec, workload, precisions={"text_encoder": "int8-quanto"}, tiled=True)
    eight = {str(each): each.memory.device for each in quantised}
    assert eight["caching (text encoder)"]["weights of text encoder"] == 5_680_910_336 + 256384 * 4096
    _, _, streaming = described(replace(both, keys={"text_encoder_offload": True}), tmp_path)
    streamed = encoding(spec, "text_encoder", streaming)
    assert streamed.device["weights of text encoder"] == pytest.approx(2 * 2 * (5_680_910_336 - 256384 * 4096) / 24)
    assert sum(streamed.host.values()) + streamed.device["weights of text encoder"] == 2 * 5_680_910_336
    assert whole["training"].host["networks that wait"] == pytest.approx(28.6e9, rel=0.01)
    coding = {"caching (text encoder)", "caching (vae)"}
    assert set(whole) == coding | {"training", "validation (rendering)", "validation (vae)"}
    assert set(eight) == coding | {"training"}, "nothing is rendered"


def test_a_denoiser_that_leaves_while_a_clip_is_decoded_is_on_the_host(tmp_path: Path) -> None:
    _, spec, staying = described(Case(LARGE, CLIP), tmp_path)
    _, _, leaving = described(Case(LARGE, CLIP, keys={"enable_model_cpu_offload": True}), tmp_path)
    stays, leaves = decoding(spec, "vae", staying), decoding(spec, "vae", leaving)
    moved = stays.device["base weights"]
    assert leaves.on_device == pytest.approx(stays.on_device - moved)
    assert leaves.host["base weights"] == moved


def test_tiles_bound_what_the_vae_works_in(tmp_path: Path) -> None:
    _, spec, workload = described(Case(SMALL, CLIP), tmp_path)
    large = replace(workload, shape=(81, 720, 1280))
    tiled = [encoding(spec, "vae", each, tiled=True).device["vae at work"] for each in (workload, large)]
    assert tiled[0] == tiled[1] < encoding(spec, "vae", workload).device["vae at work"] / 5
