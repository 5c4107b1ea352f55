"""The cache: complete, resumable, never stale, and calm about what cannot be encoded."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.builtin.datasets.decode import decode
from tuner.builtin.datasets.prepare import Prepared, prepare
from tuner.builtin.encoding import encodings as encode
from tuner.builtin.encoding.encodings import Encodings, video_key
from tuner.builtin.encoding.fill import build_cache
from tuner.builtin.encoding.fingerprint import fingerprint
from tuner.builtin.encoding.store import Store
from tuner.config.keys import CoreConfig
from tuner.errors import DataError, ModelError
from tuner.model import Component, EncodeBatch, Encoded, Model
from tuner.run import Run
from tuner.spec import ModelSpec

MakeCore = Callable[..., CoreConfig]
EVERYTHING = 10
"""Entries of three clips with two captions each and the empty one."""


@pytest.fixture
def core(clips: Path, make_core: MakeCore) -> CoreConfig:
    return make_core(clips)


@pytest.fixture
def prepared(core: CoreConfig, spec: ModelSpec) -> Prepared:
    return prepare(core, spec)


def build(core: CoreConfig, model: Any, hooks: Any, prepared: Prepared, extra: tuple[str, ...] = ()) -> Encodings:
    return build_cache(Run(core, {}), model, hooks, prepared, extra, show_progress=False)


def test_the_cache_holds_what_the_encoder_gives(core: CoreConfig, model: Any, hooks: Any, prepared: Prepared) -> None:
    cached = build(core, model, hooks, prepared, ("a prompt",))
    assert cached.samples == prepared.samples
    assert cached.encoded == EVERYTHING + 1
    with torch.no_grad(), model.use("vae", "text_encoder"):
        for sample in cached.samples:
            (expected,) = hooks.encode_batch(
                run=None, model=model, batch=EncodeBatch("video", pixels=decode(sample, sample.views[0])[None])
            )
            stored = cached.video(sample)
            assert stored.keys() == expected.keys()
            assert all(torch.equal(stored[name], expected[name]) for name in expected)
        for caption in ["wide, first", "", "a prompt"]:
            (expected,) = hooks.encode_batch(run=None, model=model, batch=EncodeBatch("text", captions=(caption,)))
            assert torch.equal(cached.text(caption)["states"], expected["states"])
    with pytest.raises(KeyError):
        cached.text("never asked for")


def test_text_comes_first_and_a_component_is_loaded_once_for_its_phase(
    core: CoreConfig, model: Any, hooks: Any, prepared: Prepared
) -> None:
    build(core, model, hooks, prepared)
    assert model.loads == ["text_encoder", "vae"]
    kinds = [batch.kind for batch in hooks.batches]
    assert kinds == sorted(kinds), "text, then video"


def test_a_second_start_loads_and_encodes_nothing(
    core: CoreConfig, model: Any, hooks: Any, prepared: Prepared, make_model: Callable[[], Any], make_hooks: Any
) -> None:
    first = build(core, model, hooks, prepared)
    again, idle = make_model(), make_hooks()
    second = build(core, again, idle, prepared)
    assert (again.loads, idle.batches, second.encoded, second.rebuilt) == ([], [], 0, 0)
    for sample in first.samples:
        assert torch.equal(first.video(sample)["latents"], second.video(sample)["latents"])


def test_batches_are_as_large_as_asked_and_never_mix_buckets(
    clips: Path, make_core: MakeCore, spec: ModelSpec, model: Any, hooks: Any
) -> None:
    core = make_core(clips, core={"vae_batch_size": 2, "text_embed_batch_size": 3})
    build(core, model, hooks, prepare(core, spec))
    videos = sorted(tuple(batch.pixels.shape) for batch in hooks.batches if batch.kind == "video")
    assert videos == [(1, 3, 9, 80, 48), (2, 3, 9, 48, 80)]
    assert [len(batch.captions) for batch in hooks.batches if batch.kind == "text"] == [3, 3, 1]


@pytest.mark.parametrize(
    "change",
    [{"video": {"num_frames": 5}}, {"resolution": 80}, {"crop": True}],
    ids=["frames", "size", "crop"],
)
def test_other_settings_never_read_old_entries(
    clips: Path, make_core: MakeCore, spec: ModelSpec, model: Any, hooks: Any, change: dict[str, Any]
) -> None:
    before, after = (prepare(make_core(clips, **entry), spec).samples for entry in ({}, change))
    old, new = ({video_key(each, each.views[0], "e") for each in samples} for samples in (before, after))
    assert not old & new


def test_other_weights_encode_anew_and_other_captions_only_themselves(
    core: CoreConfig, model: Any, hooks: Any, prepared: Prepared, make_model: Callable[[], Any]
) -> None:
    build(core, model, hooks, prepared)
    other = make_model()
    component = other.components["vae"]
    other.components["vae"] = Component(component.load, component.files, {"precision": "bfloat16"})
    cached = build(core, other, hooks, prepared, ("one more",))
    assert other.loads == ["text_encoder", "vae"]
    assert cached.encoded == 3 + 1


def test_the_same_clip_elsewhere_is_not_encoded_again(
    core: CoreConfig, clips: Path, tmp_path: Path, make_core: MakeCore, spec: ModelSpec, model: Any, hooks: Any
) -> None:
    build(core, model, hooks, prepare(core, spec))
    moved = tmp_path / "moved"
    shutil.copytree(clips, moved)
    (moved / "tall.mp4").rename(moved / "renamed.mp4")
    (moved / "tall.txt").rename(moved / "renamed.txt")
    assert build(core, model, hooks, prepare(make_core(moved), spec)).encoded == 0


def test_a_killed_build_goes_on_where_it_stopped(
    core: CoreConfig, model: Any, prepared: Prepared, make_hooks: Any, make_model: Callable[[], Any]
) -> None:
    cache = prepared.samples[0].cache

    class Killed(make_hooks):  # type: ignore[misc]
        def encode_batch(self, *, run: Run, model: Model, batch: EncodeBatch) -> Encoded:
            if sum(each.kind == "video" for each in self.batches) == 2:
                while len(list(cache.rglob("*.safetensors"))) < 2:  # what waits to be written is lost
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            encoded: Encoded = super().encode_batch(run=run, model=model, batch=batch)
            return encoded

    child = multiprocessing.get_context("fork").Process(target=build, args=(core, make_model(), Killed(), prepared))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    hooks = make_hooks()
    cached = build(core, model, hooks, prepared)
    assert [batch.kind for batch in hooks.batches] == ["video"], "the third clip is all that was missing"
    assert all(cached.video(sample)["latents"].isfinite().all() for sample in cached.samples)


def test_damaged_entries_are_found_rebuilt_and_counted(
    core: CoreConfig, model: Any, hooks: Any, prepared: Prepared
) -> None:
    first = build(core, model, hooks, prepared)
    sample = first.samples[0]
    whole = first.video(sample)
    path = Store(core.output_dir.parent / "cache" / "vae").path(first.video_keys[sample.sample_id, 0])
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="damaged"):
        first.video(sample)
    second = build(core, model, hooks, prepared)
    assert (second.rebuilt, second.encoded) == (1, 1)
    assert torch.equal(second.video(sample)["latents"], whole["latents"])


def test_foreign_files_in_the_cache_folder_stay(core: CoreConfig, model: Any, hooks: Any, prepared: Prepared) -> None:
    root = core.output_dir.parent / "cache" / "vae"
    root.mkdir(parents=True, exist_ok=True)
    (root / "someone-elses.pt").write_bytes(b"not ours")
    build(core, model, hooks, prepared)
    assert (root / "someone-elses.pt").read_bytes() == b"not ours"


def test_clips_that_fail_are_named_counted_and_left_out(
    clips: Path, tmp_path: Path, make_core: MakeCore, spec: ModelSpec, model: Any, make_hooks: Any
) -> None:
    """One clip is gone by the time it is decoded; the encoder gives NaN for another, inside a batch of two."""
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    core = make_core(folder, core={"vae_batch_size": 2})
    prepared = prepare(core, spec)
    (folder / "tall.mp4").write_bytes(b"overwritten")
    wide = next(each for each in prepared.samples if each.path.name == "wide.mp4")
    poisoned = decode(wide, wide.views[0])
    hooks = make_hooks(lambda pixels: any(torch.equal(each, poisoned) for each in pixels))
    cached = build(core, model, hooks, prepared)
    assert [each.sample_id for each in cached.samples] == ["clips/wide two.mp4"]
    (report,) = cached.prepared.report.datasets
    assert {each.path.name: each.reason for each in report.dropped} == {
        "tall.mp4": "cannot be encoded",
        "wide.mp4": "cannot be encoded",
    }
    details = {each.path.name: each.detail for each in report.dropped}
    assert "cannot be decoded" in details["tall.mp4"]
    assert "non-finite" in details["wide.mp4"]
    assert report.kept == 1
    assert [count for _, count in report.buckets] == [1]


def test_nothing_left_is_one_error(core: CoreConfig, model: Any, make_hooks: Any, prepared: Prepared) -> None:
    with pytest.raises(DataError, match=r"not one of 3 clips could be encoded.*non-finite"):
        build(core, model, make_hooks(lambda _: True), prepared)


def test_a_full_disk_is_one_error_and_what_was_written_counts(
    core: CoreConfig, model: Any, hooks: Any, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    whole = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if len(written) == 5:
            whole(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        written.append(path)
        return whole(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match=r"the disk is full(.|\n)*free some space"):
            build(core, model, hooks, prepared)
    assert build(core, model, hooks, prepared).encoded == EVERYTHING - 5, "the five whole ones are kept"


def test_wrong_answers_of_a_family_are_its_error_not_the_clips(
    core: CoreConfig, model: Any, make_hooks: Any, prepared: Prepared
) -> None:
    class Wrong(make_hooks):  # type: ignore[misc]
        def encode_batch(self, *, run: Run, model: Model, batch: EncodeBatch) -> Encoded:
            encoded: Encoded = super().encode_batch(run=run, model=model, batch=batch)
            return [{"latents": each["latents"][:, :1]} for each in encoded] if batch.kind == "video" else encoded

    with pytest.raises(ModelError, match="latents of shape"):
        build(core, model, Wrong(), prepared)


def test_too_little_memory_is_an_error_not_a_bad_clip(
    core: CoreConfig, model: Any, make_hooks: Any, prepared: Prepared
) -> None:
    class Full(make_hooks):  # type: ignore[misc]
        def encode_batch(self, *, run: Run, model: Model, batch: EncodeBatch) -> Encoded:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DataError, match="not enough memory to encode 4 items of kind text"):
        build(core, model, Full(), prepared)


def _rank(index: int, address: str, core: CoreConfig, model: Any, hooks: Any, prepared: Prepared, out: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=index, world_size=2)
    run = Run(core, {}, process_index=index, process_count=2)
    cached = build_cache(run, model, hooks, prepared, show_progress=False)
    out.put((index, sum(len(each.captions) or len(each.pixels) for each in hooks.batches), cached.encoded))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_work_and_see_the_same(
    core: CoreConfig, tmp_path: Path, model: Any, prepared: Prepared, make_hooks: Any, make_model: Callable[[], Any]
) -> None:
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    address = str(tmp_path / "rendezvous")
    ranks = [
        context.Process(target=_rank, args=(i, address, core, make_model(), make_hooks(), prepared, out))
        for i in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    (_, first, total), (_, second, also) = sorted(out.get() for _ in ranks)
    assert first + second == total == also == EVERYTHING, "each entry is encoded by one process"
    assert abs(first - second) <= 2
    assert build(core, model, make_hooks(), prepared).encoded == 0


def test_a_fingerprint_follows_the_weights_and_not_their_folder(tmp_path: Path, model: Any) -> None:
    from safetensors.torch import load_file, save_file

    component = model.components["vae"]
    original = fingerprint("vae", component)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = Path(shutil.copy(component.files[0], elsewhere))
    assert fingerprint("vae", Component(component.load, (copy,), component.settings)) == original
    tensors = load_file(copy)
    tensors["bias"][-1] += 1e-3
    save_file(tensors, copy)
    changed = Component(component.load, (copy,), component.settings)
    assert fingerprint("vae", changed) != original
    config = elsewhere / "config.json"
    config.write_text("{}")
    with_config = fingerprint("vae", Component(component.load, (component.files[0], config), component.settings))
    config.write_text('{"z_dim": 4}')
    assert fingerprint("vae", Component(component.load, (component.files[0], config), component.settings)) != (
        with_config
    )
    assert fingerprint("vae", Component(component.load, component.files, component.settings, version=2)) != original


def test_a_fingerprint_reads_little_of_large_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "large.safetensors"
    save_file({"weight": torch.zeros(1 << 20)}, path)
    before = fingerprint("vae", Component(object, (path,)))
    with path.open("r+b") as file:
        file.seek(1 << 20)  # far from either end of the tensor: not sampled
        file.write(b"\x01")
    assert fingerprint("vae", Component(object, (path,))) == before


def test_a_missing_or_broken_weight_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"file of the vae is missing(.|\n)*gone\.safetensors"):
        fingerprint("vae", Component(object, (tmp_path / "gone.safetensors",)))
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 no header")
    with pytest.raises(ModelError, match="not a safetensors file"):
        fingerprint("vae", Component(object, (tmp_path / "broken.safetensors",)))


def test_the_version_of_the_encoding_is_bumped_with_its_keys(prepared: Prepared) -> None:
    """Golden: when this fails, entries of older versions would be read as new ones, or needlessly lost."""
    from dataclasses import replace

    sample = replace(prepared.samples[0], content_hash="0" * 64)
    assert encode.ENCODING == 2
    assert video_key(sample, sample.views[0], "encoder")[:16] == "39f93c0fd52af432"
    assert encode.text_key("a caption", "encoder")[:16] == "a3bee74b6f6e80aa"
