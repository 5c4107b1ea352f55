"""What decides an entry's name: everything that decides its content, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tuner.builtin.encoding.encodings import text_key, video_key
from tuner.builtin.encoding.fingerprint import fingerprint
from tuner.config.keys import CoreConfig
from tuner.data.samples import Bucket, Framing, Sample, View
from tuner.model import Model
from tuner.run import Run
from tuner_wan import WanPlugin
from tuner_wan.tiny import build_tiny_t2v

NUMBERS = st.integers(0, 3000)
FRAMINGS = st.builds(Framing, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
VIEWS = st.builds(View, FRAMINGS, NUMBERS, st.none() | st.sampled_from((8.0, 12.5, 15.0, 16.0, 24.0, 24000 / 1001)))
BUCKETS = st.builds(Bucket, NUMBERS, NUMBERS, NUMBERS)
HASHES = st.text("0123456789abcdef", min_size=4, max_size=4)
CONTENTS = st.tuples(HASHES, BUCKETS, VIEWS, HASHES)


def key_of(content: tuple[str, Bucket, View, str], **beside: Any) -> str:
    """The key of a clip with this hash, bucket, view and encoder; ``beside`` are fields that do not count."""
    digest, bucket, view, encoder = content
    fields: dict[str, Any] = {
        "sample_id": "clips/a.mp4",
        "dataset_id": "clips",
        "path": Path("a.mp4"),
        "captions": ("a",),
        "width": 10,
        "height": 10,
        "frames": 9,
        "fps": 16.0,
        "cache": Path("cache"),
    } | beside
    return video_key(Sample(content_hash=digest, bucket=bucket, views=(view,), **fields), view, encoder)


@given(CONTENTS, CONTENTS)
def test_keys_are_equal_exactly_where_content_is(one: Any, other: Any) -> None:
    assert (key_of(one) == key_of(other)) == (one == other)


@given(CONTENTS, st.sampled_from(("start", "fps", "left", "frames", "height", "encoder", "content")))
def test_each_part_alone_counts(content: Any, part: str) -> None:
    digest, bucket, view, encoder = content
    changed = {
        "start": lambda: (digest, bucket, replace(view, start=view.start + 1), encoder),
        "fps": lambda: (digest, bucket, replace(view, fps=(view.fps or 0) + 1), encoder),
        "left": lambda: (digest, bucket, replace(view, framing=replace(view.framing, left=view.framing.left + 1)), ""),
        "frames": lambda: (digest, replace(bucket, frames=bucket.frames + 4), view, encoder),
        "height": lambda: (digest, replace(bucket, height=bucket.height + 16), view, encoder),
        "encoder": lambda: (digest, bucket, view, encoder + "0"),
        "content": lambda: (digest + "0", bucket, view, encoder),
    }[part]()
    assert key_of(changed) != key_of(content)


@given(CONTENTS)
def test_where_a_clip_lies_and_what_it_is_called_do_not_count(content: Any) -> None:
    moved = {"sample_id": "other/b.mov", "dataset_id": "other", "path": Path("b.mov"), "cache": Path("elsewhere")}
    assert key_of(content, **moved, captions=("b", "c")) == key_of(content)


@given(st.text(), st.text(), HASHES, HASHES)
def test_captions_are_known_by_their_words_and_the_encoder(one: str, other: str, first: str, second: str) -> None:
    assert (text_key(one, first) == text_key(other, second)) == ((one, first) == (other, second))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_t2v(tmp_path_factory.mktemp("base") / "tiny-wan")


LoadWan = Callable[..., Model]


@pytest.fixture
def load_wan() -> LoadWan:
    """The model of a folder, with these core keys."""

    def load(folder: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> Model:
        plugin = WanPlugin("wan", WanPlugin.Config())
        run = Run(CoreConfig(pretrained_model_name_or_path=str(folder), **keys), {})
        run.spec = plugin.describe_model(run)
        run.place(torch.device("cpu"), dtype)
        return plugin.load_model(run)

    return load


def known_by(model: Model, name: str = "vae") -> str:
    """What the cache knows a component of ``model`` by."""
    return fingerprint(name, model.components[name])


def test_tiling_is_another_vae_to_the_cache_and_slicing_the_same(tiny: Path, load_wan: LoadWan) -> None:
    plain = known_by(load_wan(tiny))
    assert known_by(load_wan(tiny)) == plain
    assert known_by(load_wan(tiny, vae_enable_tiling=True)) != plain
    assert known_by(load_wan(tiny, vae_enable_slicing=True)) == plain
    assert known_by(load_wan(tiny, vae_enable_tiling=True), "text_encoder") == known_by(load_wan(tiny), "text_encoder")


def test_tiles_and_slices_are_what_the_vae_works_in(tiny: Path, load_wan: LoadWan) -> None:
    """Beyond one tile the latents differ a little; slices of a batch are those of the batch."""
    torch.manual_seed(0)
    long = torch.rand(1, 3, 5, 48, 320) * 2 - 1
    pair = torch.rand(2, 3, 5, 48, 64) * 2 - 1

    def latents(pixels: torch.Tensor, **keys: Any) -> torch.Tensor:
        with torch.no_grad(), load_wan(tiny, **keys).use("vae") as (vae,):
            mode: torch.Tensor = vae.encode(pixels).latent_dist.mode()
            return mode

    whole, tiled = latents(long), latents(long, vae_enable_tiling=True)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert torch.equal(latents(pair, vae_enable_tiling=True), latents(pair)), "one tile is no tiling"
    torch.testing.assert_close(latents(pair, vae_enable_slicing=True), latents(pair), rtol=1e-4, atol=1e-5)
    torch.set_num_threads(1)
    alone = torch.cat([latents(each[None]) for each in pair])
    assert torch.equal(latents(pair, vae_enable_slicing=True), alone)


def test_another_vae_file_and_another_precision_are_another_encoder(
    tiny: Path, load_wan: LoadWan, tmp_path: Path
) -> None:
    model = load_wan(tiny)
    changed = tmp_path / "changed"
    shutil.copytree(tiny, changed)
    (weights,) = (changed / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, weights, {"format": "pt"})
    assert known_by(load_wan(changed)) != known_by(model)
    assert known_by(load_wan(changed), "text_encoder") == known_by(model, "text_encoder")
    for component in ("vae", "text_encoder"):
        whole = model.components[component]
        assert json.loads(json.dumps(dict(whole.settings)))["dtype"] == "torch.float32"
        half = replace(whole, settings={**whole.settings, "dtype": "torch.bfloat16"})
        assert fingerprint(component, half) != known_by(model, component)
