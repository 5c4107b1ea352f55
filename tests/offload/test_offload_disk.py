"""Masters that are files: mapped, written once, found again; the host's memory does not hold them."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest
import torch
from optimum.quanto import freeze, qint8, quantize
from safetensors import safe_open
from torch import nn

from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.model import Stage, Transform
from tuner.run import Run
from tuner.testing.toy import build_toy
from tuner.testing.toy.describe import describe
from tuner.testing.toy.model import load
from tuner.transforms import prepare
from tuner_offload import OffloadConfig, OffloadPlugin
from tuner_offload.disk import DiskStore, _Mapped, _ranges
from tuner_offload.placement import group_offload


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "offload"


def train(trained, steps=2):
    seen = []
    for step in range(steps):
        loss = trained.loss(step)
        loss.backward()
        seen.append({"loss": loss.detach(), **trained.gradients()})
    return seen


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_leaf", [False, True])
def test_training_is_equal_bit_for_bit(toy, folder, dtype, by_leaf):
    streamed = toy(offload=True, disk=DiskStore(folder), dtype=dtype, by_leaf=by_leaf)
    assert_equal(train(streamed), train(toy(offload=False, dtype=dtype)))
    streamed.residency.end(False)
    for block, name, parameter in streamed.frozen():
        assert torch.equal(parameter, streamed.originals[f"blocks.{block}.{name}"]), "between steps too"


def in_a_file(tensor):
    return _Mapped().holds(tensor)


def test_what_the_base_holds_as_needed_is_mapped_where_it_lies(toy, folder):
    """The toy's files are float32: nothing is written for a float32 run."""
    store = DiskStore(folder)
    streamed = toy(offload=True, disk=store)
    assert store.bytes_mapped == sum(each.nbytes for _, _, each in streamed.frozen())
    assert (store.bytes_written, store.bytes_found) == (0, 0)
    assert not folder.exists()
    assert all(in_a_file(each) for _, _, each in streamed.frozen())
    assert "in the base's own files" in store.describe()


def test_what_was_converted_is_written_once_and_found_again(toy, folder):
    """Matrices in bfloat16 are written, norms in float32 stay where they are; a second start writes nothing."""
    first, second = DiskStore(folder), DiskStore(folder)
    streamed = toy(offload=True, disk=first, dtype=torch.bfloat16)
    matrices = sum(each.nbytes for _, _, each in streamed.frozen() if each.dtype == torch.bfloat16)
    norms = sum(each.nbytes for _, _, each in streamed.frozen() if each.dtype == torch.float32)
    assert (first.bytes_written, first.bytes_mapped, first.bytes_found) == (matrices, norms, 0)
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(files) == 6
    toy(offload=True, disk=second, dtype=torch.bfloat16)
    assert (second.bytes_written, second.bytes_mapped, second.bytes_found) == (0, norms, matrices)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    assert all(in_a_file(each) for _, _, each in streamed.frozen())
    with safe_open(min(files), "pt") as file:
        assert all(name.startswith("blocks.") for name in file.keys())  # noqa: SIM118
        assert "torch.bfloat16 [" in file.metadata()["layout"]


def test_which_mappings_are_files():
    lines = [
        "7f00-7f10 rw-p 00000000 fe:00 2163008                    /models/a file.safetensors",
        "7f20-7f30 r--p 00000000 fe:00 2163009                    /hub/blobs/0a1b2c",
        "7f40-7f50 rw-p 00000000 00:00 0 ",
        "7f60-7f70 rw-p 00000000 00:00 0                          [heap]",
        "7f80-7f90 rw-s 00000000 00:06 12                         /dev/nvidia0",
        "7fa0-7fb0 rw-s 00000000 00:01 4                          /memfd:cuda (deleted)",
        "7fc0-7fd0 rw-p 00000000 fe:00 2163010                    /models/b.safetensors (deleted)",
    ]
    assert list(_ranges(lines)) == [(0x7F00, 0x7F10), (0x7F20, 0x7F30)]


def test_two_bases_share_a_folder(toy, folder):
    """Files are named after their content: another base's are others."""
    toy(offload=True, disk=DiskStore(folder), dtype=torch.bfloat16)

    def other(network):
        for block in network.stack.blocks:
            for each in block.modules():
                if isinstance(each, nn.Linear):
                    each.weight.mul_(2)

    edit = Transform(Stage.QUANTIZE, "other", frozenset(), torch.no_grad()(other))
    keys = {"dtype": torch.bfloat16, "extra": (edit,)}
    store = DiskStore(folder)
    streamed = toy(offload=True, disk=store, while_reading=False, **keys)
    assert store.bytes_found == 0 < store.bytes_written
    assert_equal(train(streamed), train(toy(offload=False, **keys)))


def test_quantised_weights_and_their_scales_are_written(toy, folder):
    def quantised(network):
        for block in network.stack.blocks:
            quantize(block, weights=qint8)
            freeze(block)

    edit = Transform(Stage.QUANTIZE, "quantised", frozenset(), quantised)
    store = DiskStore(folder)
    streamed = toy(offload=True, disk=store, while_reading=False, extra=(edit,))
    assert_equal(train(streamed), train(toy(offload=False, extra=(edit,))))
    assert store.bytes_written > 0
    weight = streamed.network.stack.blocks[0].feed_forward[0].weight
    assert in_a_file(weight._data)


def test_a_full_disk_is_said_before_anything_is_written(toy, folder, monkeypatch):
    usage = shutil.disk_usage(folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(ConfigError, match=r"the disk is full(.|\n)*group_offload_to_disk_path(.|\n)*choose another"):
        toy(offload=True, disk=DiskStore(folder), dtype=torch.bfloat16)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said(toy, folder):
    folder.write_text("a file")
    with pytest.raises(ConfigError, match="cannot be offloaded to disk"):
        toy(offload=True, disk=DiskStore(folder / "deeper"), dtype=torch.bfloat16)


def test_a_file_that_was_cut_short_is_named_and_left_alone(toy, folder):
    toy(offload=True, disk=DiskStore(folder), dtype=torch.bfloat16)
    path = min(folder.iterdir())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=rf"{path.name}(.|\n)*remove this file"):
        toy(offload=True, disk=DiskStore(folder), dtype=torch.bfloat16)
    assert path.exists()


def test_where_the_system_says_nothing_everything_is_written(toy, folder, monkeypatch):
    monkeypatch.setattr("tuner_offload.disk.MAPS", Path("/nowhere"))
    store = DiskStore(folder)
    streamed = toy(offload=True, disk=store)
    assert (store.bytes_mapped, store.bytes_written) == (0, sum(each.nbytes for _, _, each in streamed.frozen()))
    assert_equal(train(streamed), train(toy(offload=False)))


def anonymous():
    """Bytes of memory that are this process's own, in no file."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # what is free but not given back is not held
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def grown(base, folder, dtype):
    """By how much this process grows when the network of ``base`` is read and run with group offload."""
    run = Run(CoreConfig(pretrained_model_name_or_path=str(base)), plugins={})
    run.spec = describe(run.config)
    run.place(torch.device("cpu"), dtype)
    network = load(run).network
    before = anonymous()
    disk = None if folder is None else DiskStore(folder)
    prepare(run, network, [group_offload(run, blocks_per_group=1, use_stream=False, disk=disk)])
    with network.inference(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        network.module(torch.zeros(1, 12, 1, 4, 4), torch.tensor([100.0]), torch.zeros(1, 8, 16))
    return anonymous() - before


def in_a_child(compute):
    """The number that ``compute`` gives in a fork of this process, whose memory nobody else has used."""
    receiving, sending = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(sending, str(compute()).encode())
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return int(said)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_process_does_not_hold_what_lies_on_disk(tmp_path, folder, dtype, size):
    """Memory of the process alone, as the system counts it: a ring and a group, not the network."""
    torch.set_num_threads(1)
    base = build_toy(tmp_path / "toy", blocks=16, dim=384)
    weights = sum(path.stat().st_size for path in (base / "transformer").glob("*.safetensors")) * size / 4
    assert in_a_child(lambda: grown(base, None, dtype)) > 0.9 * weights
    assert in_a_child(lambda: grown(base, folder, dtype)) < 0.4 * weights


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("by_leaf", [False, True])
def test_from_disk_to_cuda(toy, folder, use_stream, by_leaf):
    """By way of two pinned buffers that a thread fills, or straight from the mapped files."""
    keys = {"blocks": 12, "device": "cuda", "dtype": torch.bfloat16}
    streamed = toy(offload=True, disk=DiskStore(folder), use_stream=use_stream, by_leaf=by_leaf, **keys)
    assert type(streamed.residency.ring.copier).__name__ == ("StagedCopier" if use_stream else "InlineCopier")
    for ours, theirs in zip(train(streamed, 3), train(toy(offload=False, **keys), 3), strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name])


# The keys


def plugin(**keys) -> OffloadPlugin:
    return OffloadPlugin("offload", OffloadConfig(enable_group_offload=True, **keys))


def test_what_the_key_does_not_go_with(tmp_path):
    plugin(group_offload_to_disk_path=str(tmp_path / "new")).configure(Run(CoreConfig(), {}))
    with pytest.raises(ConfigError, match=r"frozen base, and `model_type: full`(.|\n)*group_offload_to_disk_path"):
        plugin(group_offload_to_disk_path=str(tmp_path)).configure(Run(CoreConfig(model_type="full"), {}))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="this is not a folder"):
        plugin(group_offload_to_disk_path=str(tmp_path / "file")).configure(Run(CoreConfig(), {}))


def test_the_plugin_offloads_to_the_folder(tmp_path):
    run = Run(CoreConfig(), {})
    run.place(torch.device("cpu"), torch.float32)
    (place,) = plugin(group_offload_to_disk_path=str(tmp_path)).model_transforms(run, None)
    assert (place.stage, place.claims) == (Stage.PLACE, frozenset({"placement"}))
