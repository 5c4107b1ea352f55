"""How fast a run is, in every line of its log."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tuner.builtin.metrics import MetricsPlugin
from tuner.builtin.planner import PlannerConfig, PlannerPlugin
from tuner.builtin.planner.account import Account
from tuner.builtin.planner.cards import named
from tuner.builtin.planner.speed import step_seconds
from tuner.flops import step_flops
from tuner.plugin import PluginConfig
from tuner.testing.opened import opened


def test_throughput_is_what_was_trained_by_the_seconds_of_its_steps(run, tmp_path):
    output = run(tmp_path / "out", logging_steps=2)
    one, two = (json.loads(line) for line in (output / "train.jsonl").read_text().splitlines())
    assert [one["step"], two["step"]] == [2, 4]
    for line in (one, two):
        # Clips of 9 frames of 80x48 are 45 tokens of the toy model.
        assert line["metrics/tokens_per_second"] == pytest.approx(45 * line["metrics/samples_per_second"])
        assert line["metrics/samples_per_second"] > 0


def test_throughput_counts_the_steps_since_the_last_line_in_all_processes():
    plugin = MetricsPlugin("metrics", PluginConfig())
    batch = SimpleNamespace(bucket=SimpleNamespace(frames=9, height=16, width=16), samples=["a", "b"])
    plan = SimpleNamespace(micro_batches=lambda step: [batch, batch])
    latents = SimpleNamespace(shape=lambda frames, height, width: (4, frames, height // 8, width // 8))
    network = SimpleNamespace(spec=SimpleNamespace(tokens=lambda frames, height, width: frames * height * width))
    model = SimpleNamespace(network=network, spec=SimpleNamespace(latents=latents))
    run = SimpleNamespace(is_main=True, step=1)
    plugin.data_ready(run=run, spec=None, data=None, plan=plan)
    assert plugin.log_metrics(run=run, line={}) == {}
    for seconds in (0.5, 1.5):
        plugin.on_step_end(run=run, model=model, metrics={"seconds": seconds})
    expected = {"metrics/samples_per_second": 4.0, "metrics/tokens_per_second": 4 * 36.0}
    assert plugin.log_metrics(run=run, line={}) == expected
    assert plugin.log_metrics(run=run, line={}) == {}  # it begins anew


def test_mfu_is_the_model_s_work_over_what_the_card_reaches(workplace, tmp_path):
    settings = {
        "model_family": "toy",
        "pretrained_model_name_or_path": str(workplace / "model"),
        "output_dir": str(tmp_path),
        "cache_dir": str(workplace / "cache"),
        "max_train_steps": 1,
        "data_backend_config": [
            {
                "id": "clips",
                "dataset_type": "video",
                "instance_data_dir": str(workplace / "clips"),
                "resolution": 64,
                "caption_strategy": "filename",
                "resolution_type": "pixel_area",
                "video": {"num_frames": 9},
            },
            {"id": "text", "dataset_type": "text_embeds", "default": True},
        ],
    }
    card = named("H100")
    with opened(settings) as session:
        plugin = PlannerPlugin("planner", PlannerConfig())
        plugin.data_ready(run=session.run, spec=session.model.spec, data=None, plan=session.plan)
        session.run.step = 1
        plugin._account = Account(None)
        plugin.on_step_end(run=session.run, model=session.model, metrics={"seconds": 0.5})
        unknown = plugin.log_metrics(run=session.run, line={"seconds": 0.5})
        assert unknown.keys() == {"planner/tokens", "planner/tflop"}  # no card is known on a CPU
        plugin._account = Account(card, planned=2**30)
        line = {"seconds": 0.5, "peak_memory_bytes": 3 * 2**29, "tread/dropped": 0.25}
        told = plugin.log_metrics(run=session.run, line=line)
        found = told["planner/mfu"]
        [batch] = session.plan.micro_batches(0)
        work = session.run.estimate(session.model.network.spec, batch.bucket, len(batch.samples))
    assert found == pytest.approx(step_flops(work).model / 0.5 / 798e12)
    assert told["planner/tokens"] == work.tokens
    assert told["planner/tflop"] == pytest.approx(step_flops(work).hardware / 1e12)
    assert told["planner/times_floor"] == pytest.approx(0.5 / step_seconds(work, card))
    summary = plugin._account.told()
    assert summary is not None
    for part in (f"{work.tokens} tokens", "0.5 s a step", "times the floor of H100", "peak 1.50 GiB (1.00 planned)"):
        assert part in summary, part
    assert "25% of the tokens' passes through blocks left out by routes" in summary
