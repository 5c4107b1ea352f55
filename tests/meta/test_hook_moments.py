"""When the core calls which hook: a plugin that writes down its calls goes through a whole run and a resumed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.hookspecs import REQUIRED, hook_names
from tuner.testing.clips import render_clip
from tuner.testing.plugin_env import importable, toy_distribution, write_distribution
from tuner.testing.toy import build_toy

SCRIBE = '''
"""Writes down which hooks were called, at which step."""

from tuner import Plugin, PluginConfig, hookimpl

CALLS = []

class Scribe(Plugin[PluginConfig]):
    """Writes down the calls of hooks."""

    def note(self, hook, run, **facts):
        CALLS.append((hook, run.step, facts))

    @hookimpl
    def configure(self, run):
        self.note("configure", run, spec=run.spec)

    @hookimpl
    def propose_settings(self, run):
        self.note("propose_settings", run, spec=run.spec)
        return {}

    @hookimpl
    def optimizers(self, run):
        self.note("optimizers", run, described=run.spec is not None)
        return {}

    @hookimpl
    def lr_curves(self, run):
        self.note("lr_curves", run, described=run.spec is not None)
        return {}

    @hookimpl
    def on_resume(self, run, checkpoint, saved, now, passed):
        self.note("on_resume", run, checkpoint=checkpoint.name, saved=saved["step"], passed=passed)

    @hookimpl
    def token_selectors(self, run):
        self.note("token_selectors", run, described=run.spec is not None)
        return {}

    @hookimpl
    def data_sources(self, run):
        self.note("data_sources", run, described=run.spec is not None)
        return {}

    @hookimpl
    def extra_samples(self, run, spec, data):
        self.note("extra_samples", run, samples=len(data.samples))
        return []

    @hookimpl
    def data_ready(self, run, spec, data):
        self.note("data_ready", run, samples=len(data.samples))

    @hookimpl
    def check_model(self, run, spec):
        self.note("check_model", run, blocks=spec.networks[0].blocks)

    @hookimpl
    def extra_captions(self, run):
        self.note("extra_captions", run)
        return ["a caption of the scribe"]

    @hookimpl
    def model_transforms(self, run, model):
        self.note("model_transforms", run, meta=all(each.is_meta for each in model.network.module.parameters()))
        return []

    @hookimpl
    def on_train_start(self, run, model):
        words = len(run.text_cache("a caption of the scribe")["states"])
        self.note("on_train_start", run, adapter=model.network.adapter.kind, words=words)

    @hookimpl(wrapper=True)
    def compute_loss(self, run, model, batch):
        loss = yield
        self.note("compute_loss", run, losses=len(loss.per_sample))
        return loss

    @hookimpl
    def route_tokens(self, run, request):
        self.note("route_tokens", run, blocks=request.blocks)
        return []

    @hookimpl
    def on_step_end(self, run, model, metrics):
        self.note("on_step_end", run, loss=float(metrics["loss"]))
        raise RuntimeError("a listener that fails must not end the run")

    @hookimpl
    def validate(self, run, model):
        import torch
        from tuner.validate.results import Validation
        self.note("validate", run, training=model.network.module.training, gradients=torch.is_grad_enabled())
        return Validation(metrics={"answer": 42.0})

    @hookimpl
    def on_validation(self, run, plugin, validation):
        if plugin == self.name:
            self.note("on_validation", run, variant=run.variant, answer=validation.metrics["answer"])

    @hookimpl
    def log_metrics(self, run, line):
        self.note("log_metrics", run, step=line["step"])
        return {"scribe/lines": 1.0}

    @hookimpl
    def on_log(self, run, line):
        self.note("on_log", run, step=line["step"], lines=line["scribe/lines"])

    @hookimpl
    def on_checkpoint(self, run, checkpoint):
        self.note("on_checkpoint", run, whole=(checkpoint / "manifest.json").exists())
        raise RuntimeError("a listener that fails must not end the run")

    @hookimpl
    def weight_variants(self, run, model, purpose):
        from contextlib import nullcontext
        self.note("weight_variants", run, purpose=purpose)
        return {"": nullcontext, "twin": nullcontext}

    @hookimpl
    def save(self, run, model, directory):
        self.note("save", run, variant=run.variant)
        path = directory / "scribe.txt"
        path.write_text(f"step {run.step}")
        return [path]

    @hookimpl
    def on_train_end(self, run, model):
        self.note("on_train_end", run)

    @hookimpl
    def on_run_end(self, run, checkpoint, error):
        self.note("on_run_end", run, checkpoint=checkpoint and checkpoint.name, error=error)

    def state_dict(self):
        return {"calls": len(CALLS)}

    def load_state_dict(self, state):
        CALLS.append(("load_state_dict", None, state))
'''


def config(folder: Path, **keys: Any) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / "output"),
        "mixed_precision": "no",
        "max_train_steps": 4,
        "gradient_accumulation_steps": 2,
        "checkpoint_step_interval": 2,
        "validation_step_interval": 2,
        "lora_rank": 2,
        "data_backend_config": [
            {
                "id": "clips",
                "type": "local",
                "dataset_type": "video",
                "instance_data_dir": str(folder / "clips"),
                "cache_dir_vae": str(folder / "cache" / "vae"),
                "caption_strategy": "filename",
                "resolution": 64,
                "resolution_type": "pixel_area",
                "video": {"num_frames": 9, "min_frames": 9},
            },
            {
                "id": "text",
                "type": "local",
                "dataset_type": "text_embeds",
                "default": True,
                "cache_dir": str(folder / "cache" / "text"),
            },
        ],
        **keys,
    }


def run(folder: Path, **keys: Any) -> list[tuple[str, Any, dict[str, Any]]]:
    """Run the config; the scribe's calls."""
    from tuner import pipeline
    from tuner.assembly import assemble

    with importable(folder / "toy", folder / "scribe"):
        pipeline.run(assemble(config(folder, **keys), plugins=["toy", "scribe"]))
        from scribe_module import CALLS  # type: ignore[import-not-found]

        calls = list(CALLS)
        CALLS.clear()
    return calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("moments")
    toy_distribution(home / "toy")
    write_distribution(home / "scribe", "scribe", {"scribe": "scribe_module:Scribe"}, modules={"scribe_module": SCRIBE})
    build_toy(home / "model")
    (home / "clips").mkdir()
    for index in range(2):
        render_clip(home / "clips" / f"clip {index}.mp4", width=96, height=64, frames=9, fps=16, seed=index)
    return home


@pytest.fixture(scope="module")
def calls(folder: Path) -> list[tuple[str, Any, dict[str, Any]]]:
    return run(folder)


def facts(calls: list[tuple[str, Any, dict[str, Any]]], hook: str) -> list[dict[str, Any]]:
    return [found for name, _, found in calls if name == hook]


def test_the_scribe_knows_every_hook_but_the_familys(calls: list[tuple[str, Any, dict[str, Any]]]) -> None:
    called = {name for name, _, _ in calls}
    on_demand = {
        "adapter_formats",
        "quantizers",
        "attention_backends",
        "estimate",
        "fetch_checkpoint",
        "known_models",
        "memory_advice",
        "on_preview",
        "on_resume",
        "on_sampling_step",
    }  # only where someone asks
    built_in = {"gradient_release"}  # takes one answer, which a built-in plugin gives
    assert set(hook_names()) - called == REQUIRED - {"compute_loss"} | on_demand | built_in


def test_hooks_come_in_their_order(calls: list[tuple[str, Any, dict[str, Any]]]) -> None:
    before = [name for name, _, _ in calls]
    start = before.index("on_train_start")
    assert before[: start + 1] == [
        "configure",
        "propose_settings",
        "optimizers",
        "lr_curves",
        "token_selectors",
        "data_sources",
        "check_model",
        "extra_samples",
        "data_ready",
        "model_transforms",
        "extra_captions",
        "on_train_start",
    ]
    step = ["route_tokens", "compute_loss"] * 2
    moments = [(name, at) for name, at, _ in calls[start + 1 :]]
    expected: list[tuple[str, int]] = []
    for done in range(1, 5):
        expected += [(name, done - 1) for name in step]
        looking = [("weight_variants", done), *[("validate", done), ("on_validation", done)] * 2]
        expected += [("on_step_end", done), *(looking if done % 2 == 0 else [])]
        expected += [("log_metrics", done), ("on_log", done)]
        expected += [("weight_variants", done), ("save", done), ("save", done)] if done % 2 == 0 else []
    moments = [each for each in moments if each[0] != "on_checkpoint"]  # when it is on the disk, a step later or two
    assert moments == [*expected, ("on_train_end", 4), ("on_run_end", 4)]


def test_hooks_may_rely_on_what_the_page_says(calls: list[tuple[str, Any, dict[str, Any]]]) -> None:
    assert facts(calls, "configure") == [{"spec": None}]
    assert facts(calls, "optimizers") == [{"described": False}]
    assert facts(calls, "token_selectors") == [{"described": True}]
    assert facts(calls, "data_sources") == [{"described": True}]
    assert facts(calls, "check_model") == [{"blocks": 4}]
    assert facts(calls, "extra_samples") == [{"samples": 2}]
    assert facts(calls, "data_ready") == [{"samples": 2}]
    assert facts(calls, "model_transforms") == [{"meta": True}]
    assert facts(calls, "on_train_start") == [{"adapter": "lora", "words": 6}]
    assert facts(calls, "on_run_end") == [{"checkpoint": "checkpoint-4", "error": None}]
    assert all(each == {"training": False, "gradients": False} for each in facts(calls, "validate"))
    assert facts(calls, "on_checkpoint") == [{"whole": True}] * 2
    assert [each["variant"] for each in facts(calls, "save")] == ["", "twin"] * 2
    assert [each["purpose"] for each in facts(calls, "weight_variants")] == ["validate", "save"] * 2
    assert [each["lines"] for each in facts(calls, "on_log")] == [1.0] * 4


def test_answers_are_used(folder: Path, calls: list[tuple[str, Any, dict[str, Any]]]) -> None:
    output = folder / "output"
    log = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    assert [line.get("scribe/answer") for line in log] == [None, 42.0, None, 42.0]
    manifest = json.loads((output / "checkpoint-2" / "manifest.json").read_text())
    assert "scribe.txt" in manifest["files"]
    assert (output / "checkpoint-2" / "scribe.txt").read_text() == "step 2"
    assert (output / "checkpoint-2" / "twin" / "scribe.txt").exists()
    assert log[1]["scribe/answer@twin"] == 42.0


def test_state_comes_back_before_training_goes_on(folder: Path, calls: list[tuple[str, Any, dict[str, Any]]]) -> None:
    resumed = run(folder, max_train_steps=5, resume_from_checkpoint="latest")
    names = [name for name, _, _ in resumed]
    assert names.index("load_state_dict") < names.index("on_train_start")
    assert facts(resumed, "load_state_dict")[0]["calls"] < len(calls)
    assert facts(resumed, "on_resume") == [{"checkpoint": "checkpoint-4", "saved": 4, "passed": []}]
    assert [at for name, at, _ in resumed if name == "on_step_end"] == [5]
