"""What changed since a checkpoint: the run goes on and says so, or is refused with the reason."""

from __future__ import annotations

import json
import re

import pytest

from tuner.errors import CheckpointError, TrainingError
from tuner.testing.plugin_env import importable, write_distribution
from tuner.train import checkpoint
from tuner.train.step import SKIPPED_IN_A_ROW

ROUTES = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}
ALWAYS = '''
"""Makes every loss a NaN."""
from tuner import Plugin, PluginConfig, hookimpl
from tuner.model import Loss

class Poison(Plugin[PluginConfig]):
    """Makes every loss a NaN."""

    @hookimpl(wrapper=True)
    def compute_loss(self, run, model, batch):
        loss = yield
        return Loss(loss.per_sample * float("nan"))
'''


@pytest.fixture
def begun(job, request):
    """The name of an output folder with a run of two steps, and the keys it was started with."""

    def start(name, **keys):
        job.run(f"rules-{name}", max_train_steps=2, **keys)
        return f"rules-{name}"

    return start


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"train_batch_size": 1}, "a step had 2 samples and has 1 now"),
        ({"gradient_accumulation_steps": 2}, "a step had 2 samples and has 4 now"),
        ({"learning_rate": 5e-3}, "changed since that checkpoint: .*learning_rate"),
        ({"lr_scheduler": "cosine"}, "changed since that checkpoint: .*lr_scheduler"),
        ({"seed": 7}, "changed since that checkpoint: .*seed"),
        ({"tread_config": ROUTES}, "changed since that checkpoint: .*tread_config"),
        ({"optimizer": "optimi-lion"}, "starts afresh"),
    ],
)
def test_it_goes_on_and_says_what_is_not_as_it_was(job, begun, steps_of, caplog, keys, words):
    name = begun(f"{next(iter(keys))}-{next(iter(keys.values()))}"[:40].replace("/", "-"))
    output = job.run(name, max_train_steps=4, resume_from_checkpoint="latest", **keys)
    assert re.search(words, caplog.text)
    assert [line["step"] for line in steps_of(output)] == [1, 2, 3, 4]


def test_other_data_are_planned_anew_and_said(job, begun, steps_of, caplog):
    name = begun("data")
    datasets = [dict(entry) for entry in job.config("x")["data_backend_config"]]
    datasets[0]["max_num_samples"] = 3
    config = {"max_train_steps": 4, "resume_from_checkpoint": "latest", "data_backend_config": datasets}
    output = job.run(name, **config)
    assert "trained on 4 samples and this one has 3" in caplog.text
    assert [line["step"] for line in steps_of(output)] == [1, 2, 3, 4]


def test_another_number_of_threads_is_said(job, begun, caplog, monkeypatch):
    name = begun("threads")
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    job.run(name, max_train_steps=3, resume_from_checkpoint="latest")
    assert "was made with 1 threads and this run has 3" in caplog.text


def test_a_plugin_that_is_gone_is_named(job, begun, caplog):
    name = begun("gone", use_ema=True)
    job.run(name, max_train_steps=4, resume_from_checkpoint="latest")
    assert "the checkpoint holds state of plugin 'ema'" in caplog.text or "use_ema" in caplog.text


@pytest.mark.parametrize("keys", [{"lora_rank": 8}, {"model_type": "full"}, {"lora_target_modules": ["to_q"]}])
def test_what_would_be_another_adapter_is_refused(job, begun, keys):
    name = begun(f"refused-{next(iter(keys))}")
    with pytest.raises(CheckpointError, match="do not fit"):
        job.run(name, max_train_steps=4, resume_from_checkpoint="latest", **keys)


def test_a_loss_that_stays_no_number_ends_the_run_although_steps_may_be_skipped(job, tmp_path):
    folder = write_distribution(
        tmp_path / "always", "tuner-always", {"always": "always_module:Poison"}, modules={"always_module": ALWAYS}
    )
    with importable(folder), pytest.raises(TrainingError, match=rf"step {SKIPPED_IN_A_ROW}: the loss is nan"):
        job.run("rules-nan", plugins=["toy", "always"], nonfinite="skip", max_train_steps=100)
    assert not checkpoint.existing(job.folder / "rules-nan")


def _broken(manifest):
    """Manifests that are JSON and nonsense."""
    first = next(iter(manifest["files"]))
    yield []
    yield "text"
    yield None
    yield {}
    for key in ("format", "step", "files"):
        for value in (None, "x", [], {}, -1, 1e99, False, [[]], {"a": 1}):
            yield {**manifest, key: value}
    for value in (None, "x", [], {"bytes": "many", "sha256": 1}, {"bytes": -1}, {"sha256": None, "bytes": 1}):
        yield {**manifest, "files": {**manifest["files"], first: value}}
    yield {**manifest, "files": {**manifest["files"], "../outside": {"bytes": 1, "sha256": "0"}}}
    yield {**manifest, "step": str(manifest["step"])}


def test_no_nonsense_in_a_manifest_passes_or_shows_a_traceback(job, begun, tmp_path):
    path = checkpoint.folder(job.folder / begun("fuzz"), 2)
    whole = (path / checkpoint.MANIFEST).read_text(encoding="utf-8")
    manifest = json.loads(whole)
    for broken in _broken(manifest):
        (path / checkpoint.MANIFEST).write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(CheckpointError):
            checkpoint.read_manifest(path)
    for cut in range(0, len(whole) - 1, 97):
        (path / checkpoint.MANIFEST).write_text(whole[:cut], encoding="utf-8")
        with pytest.raises(CheckpointError):
            checkpoint.read_manifest(path)


def test_no_damage_to_any_file_passes(job, begun):
    path = checkpoint.folder(job.folder / begun("damage"), 2)
    files = [file for file in path.rglob("*") if file.is_file() and file.name != checkpoint.MANIFEST]
    assert len(files) >= 3
    for file in files:
        data = file.read_bytes()
        flipped = bytes([data[0] ^ 1])
        for damaged in (data[:-1], b"", data + b"\\0", flipped + data[1:], data[:-1] + bytes([data[-1] ^ 128])):
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="missing or damaged"):
                checkpoint.read_manifest(path)
        file.write_bytes(data)
    checkpoint.read_manifest(path)
