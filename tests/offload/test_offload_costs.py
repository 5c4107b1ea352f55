"""What streaming costs and needs: which blocks stay, what moves, what the planner is told, room on the host."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuner.config.keys import CoreConfig
from tuner.data.samples import Bucket
from tuner.errors import ConfigError
from tuner.run import Run
from tuner.spec import LatentGeometry, ModelSpec, NetworkSpec
from tuner.workload import Workload
from tuner_offload import OffloadConfig, OffloadPlugin, room
from tuner_offload.schedule import groups, resident_at_any_time, streamed_blocks
from tuner_offload.transfer import InlineCopier, copier_for, has_streams

NETWORK = NetworkSpec("transformer", 30, dim=8, heads=1, ffn_dim=32, text_dim=8, text_tokens=8, in_channels=4, small=10)
LATENTS = LatentGeometry(4, 4, 8)
SPEC = ModelSpec("toy", "toy", "none", (NETWORK,), LATENTS, 16, 16.0, ("to_q",))
WORKLOAD = Workload(NETWORK, LATENTS, (9, 64, 64), samples=1)
MATRICES = 8 * 8 * 8 + 2 * 8 * 32
"""Parameters of the eight projections and the two layers of the feed-forward of one block."""


def plugin(**keys) -> OffloadPlugin:
    return OffloadPlugin("offload", OffloadConfig(enable_group_offload=True, **keys))


def run(**keys) -> Run:
    return Run(CoreConfig(**keys), plugins={})


@given(st.integers(3, 60), st.data())
def test_residents_are_spread_evenly(blocks, data):
    resident = data.draw(st.integers(0, blocks - 1))
    streamed = streamed_blocks(blocks, resident)
    assert len(set(streamed)) == len(streamed) == blocks - resident
    assert streamed == sorted(streamed)
    assert streamed[0] >= 0
    assert streamed[-1] < blocks
    gaps = [after - before for before, after in pairwise(streamed)]
    assert not gaps or max(gaps) - min(gaps) <= 1, "every copy has the same time, to one block"


def test_blocks_that_move_together_are_next_to_each_other_among_those_that_stream():
    assert groups(streamed_blocks(8, 3), 2) == [[0, 2], [4, 5], [7]]


@pytest.mark.parametrize(("resident", "expected"), [(0, 2 * 6 - 4), (1, 2 * 5 - 4), (3, 2 * 3 - 4)])
def test_traffic_of_a_step(toy, resident, expected):
    """Twice what streams, less the two groups that each turn finds in the ring; residents never move."""
    streamed = toy(offload=True, resident=resident)
    ring, group = streamed.residency.ring, streamed.residency.masters[0].nbytes
    streamed.loss(0).backward()
    before = ring.bytes_copied
    streamed.loss(1).backward()
    assert ring.bytes_copied - before == expected * group
    assert len(streamed.residency.masters) == 6 - resident


def test_residents_are_where_they_compute_and_the_ring_is_no_larger(toy):
    streamed = toy(offload=True, resident=2)
    masters = {master.buffer.untyped_storage().data_ptr() for master in streamed.residency.masters}
    stay = {block for block, _, each in streamed.frozen() if each.untyped_storage().data_ptr() not in masters}
    assert stay == set(range(6)) - set(streamed_blocks(6, 2))
    assert streamed.residency.ring.nbytes == 2 * streamed.residency.masters[0].nbytes


@pytest.mark.parametrize(("resident", "size", "fits"), [(27, 1, True), (28, 1, False), (20, 4, True), (20, 5, False)])
def test_residents_must_leave_something_to_stream(resident, size, fits):
    on = plugin(group_offload_resident_blocks=resident, group_offload_blocks_per_group=size)
    if fits:
        on.check_model(run(), SPEC)
        return
    with pytest.raises(ConfigError, match=f"and {resident} resident blocks would keep all 30 blocks"):
        on.check_model(run(), SPEC)


def test_the_planner_is_told_what_is_on_the_device():
    on = plugin(group_offload_resident_blocks=5, group_offload_blocks_per_group=3)
    nothing = frozenset[str]()
    expected = {"resident_blocks": 5 + 2 * 3, "offloaded_to": "host", "waiting": nothing}
    assert on.estimate(run(), SPEC, WORKLOAD) == expected
    assert plugin(group_offload_to_disk_path="/x").estimate(run(), SPEC, WORKLOAD)["offloaded_to"] == "disk"
    assert OffloadPlugin("offload", OffloadConfig()).estimate(run(), SPEC, WORKLOAD) == {"waiting": nothing}
    by_phase = OffloadPlugin("offload", OffloadConfig(enable_model_cpu_offload=True))
    assert by_phase.estimate(run(), SPEC, WORKLOAD) == {"waiting": {"network"}}
    assert resident_at_any_time(30, 29, 2) == 30


def test_its_lever_is_a_config_that_it_accepts():
    (first, *_) = OffloadPlugin.levers
    chosen = OffloadPlugin("offload", OffloadConfig(**first))
    chosen.configure(run())
    assert chosen.is_active(CoreConfig())
    assert chosen.config.group_offload_use_stream


@pytest.mark.parametrize(
    ("workload", "block"),
    [
        (WORKLOAD, 2 * MATRICES + 4 * 10),
        (replace(WORKLOAD, weight_bytes=1.0), MATRICES + 4 * 10),
        (replace(WORKLOAD, trained="network"), 2 * (2 * MATRICES + 4 * 10) + 8 * (MATRICES + 10)),
    ],
    ids=["frozen", "quantised", "trained"],
)
def test_bytes_on_the_host(workload, block):
    """Trained weights bring their gradients and two moments of the optimizer."""
    assert room.hosted_bytes(workload, 20) == 20 * block


def test_what_streams_is_counted_in_the_closed_form_too(toy):
    """... as the masters really are, but for their padding."""
    streamed = toy(offload=True, blocks=5, dtype=torch.bfloat16)
    found = sum(piece.nbytes for master in streamed.residency.masters for e in master.entries for piece in e.pieces)
    spec = streamed.network.spec
    expected = room.hosted_bytes(replace(WORKLOAD, network=spec), 5)
    assert expected == pytest.approx(found, rel=0.25)  # tiny blocks: what is in no matrix weighs much


@pytest.mark.parametrize(("free", "processes", "fits"), [(1.1, 1, True), (0.9, 1, False), (1.1, 2, False)])
def test_too_little_room_is_said_before_weights_are_read(monkeypatch, free, processes, fits):
    on, data = plugin(), SimpleNamespace(samples=[SimpleNamespace(bucket=Bucket(9, 64, 64))])
    here = run()
    here.estimate = lambda network, bucket, samples: replace(WORKLOAD, network=network)
    monkeypatch.setattr(room, "available", lambda: int(free * room.hosted_bytes(WORKLOAD, 30)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if fits:
        on.data_ready(here, SPEC, data, None)
        return
    with pytest.raises(ConfigError, match=r"GiB of host memory, and .* GiB are available") as error:
        on.data_ready(here, SPEC, data, None)
    assert "group_offload_to_disk_path" in str(error.value)
    assert "base_model_precision" in str(error.value)
    plugin(group_offload_to_disk_path="/x").data_ready(here, SPEC, data, None)


def test_memory_that_is_available(tmp_path):
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert room.available(meminfo, cgroup) is None
    meminfo.write_text("MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:   1000 kB\nHugePages_Total:  0\n")
    assert room.available(meminfo, cgroup) == 1000 * 1024
    cgroup.mkdir()
    (cgroup / "memory.current").write_text("700000\n")
    (cgroup / "memory.max").write_text("max\n")
    assert room.available(meminfo, cgroup) == 1000 * 1024
    (cgroup / "memory.max").write_text("1000000\n")
    assert room.available(meminfo, cgroup) == 300_000
    (cgroup / "memory.stat").write_text("anon 500000\ninactive_file 100000\nactive_file 50000\n")
    assert room.available(meminfo, cgroup) == 450_000


def test_this_machine_says_how_much_memory_it_has():
    found = room.available()
    assert found is None or found > 2**20


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_without_cuda_streams_copies_are_in_line(device):
    assert isinstance(copier_for(torch.device(device), use_stream=True), InlineCopier)


def test_streams_of_rocm_are_not_relied_on(monkeypatch):
    assert has_streams(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not has_streams(torch.device("cuda"))
    assert isinstance(copier_for(torch.device("cuda"), use_stream=True), InlineCopier)
