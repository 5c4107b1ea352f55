"""The main job end to end on the toy family: train, log, checkpoint, resume, unload."""

from __future__ import annotations

import json
import math
import socket

import pytest
from safetensors.torch import load_file

from tuner.builtin import BUILTINS
from tuner.errors import CheckpointError, ConfigError, DataError


def test_a_run_trains_logs_and_saves(job, steps_of):
    output = job.run("whole", max_train_steps=8, checkpoint_step_interval=4, checkpoints_total_limit=2)
    steps = steps_of(output)
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    before, after = (load_file(output / f"checkpoint-{step}" / "adapter.transformer.safetensors") for step in (4, 8))
    assert any((before[name] != after[name]).any() for name in before)
    manifest = json.loads((output / "checkpoint-8" / "manifest.json").read_text())
    assert manifest["step"] == 8
    assert manifest["plugins"] == sorted(["toy", *BUILTINS])
    assert manifest["config"]["learning_rate"] == 1e-2
    assert (output / "checkpoint-8" / "pytorch_lora_weights.safetensors").is_file()


def test_training_lowers_the_loss_on_a_fixed_batch(job):
    """Same clip, same noise: the loss after 60 steps is well below the loss before."""
    from tuner import pipeline
    from tuner.assembly import assemble
    from tuner.train import loop, step

    losses = []

    def probe(session, **arguments):
        kept, session.run.step = session.run.step, 10_000  # the noise of one fixed step
        batch = step.make_batch(session, session.loader.load(0, 0))
        losses.append(step._loss(session, batch, 0).per_sample.mean().item())
        session.run.step = kept
        return original(session, **arguments)

    original = loop.train_step
    loop.train_step = probe
    try:
        with job.on_path():
            pipeline.run(
                assemble(job.config("lower", max_train_steps=60, lora_rank=16, caption_dropout_probability=0.0))
            )
    finally:
        loop.train_step = original
    assert losses[-1] < 0.8 * losses[0]


def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(job, steps_of, state_of):
    whole = job.run("undisturbed", max_train_steps=6)
    job.run("resumed", max_train_steps=3, lr_scheduler="constant")
    resumed = job.run("resumed", max_train_steps=6, resume_from_checkpoint="latest")
    assert state_of(resumed, 6) == state_of(whole, 6)
    assert steps_of(resumed) == steps_of(whole)


def test_another_optimizer_starts_afresh_and_says_so(job, caplog):
    """Lion would take Adam's first moment for its own: same name, another meaning."""
    job.run("adam", max_train_steps=3)
    output = job.run("adam", max_train_steps=5, optimizer="optimi-lion", resume_from_checkpoint="latest")
    assert "starts afresh" in caplog.text
    assert "changed since that checkpoint: max_train_steps, optimizer" in caplog.text
    saved = load_file(output / "checkpoint-5" / "optimizer.transformer.safetensors")
    assert not [name for name in saved if name.endswith("exp_avg_sq")]


def test_steps_beyond_the_checkpoint_are_logged_once(job, steps_of, state_of):
    """Killed at step 5, last checkpoint at 3: steps 4 and 5 are trained and logged anew."""
    whole = job.run("logged-whole", max_train_steps=6)
    output = job.run("logged", max_train_steps=3)
    with (output / "train.jsonl").open("a") as log:
        log.write('{"step": 4, "loss": 99}\n{"step": 5, "lo')
    job.run("logged", max_train_steps=6, resume_from_checkpoint="latest")
    assert steps_of(output) == steps_of(whole)


def test_validation_leaves_no_trace_on_training(job, steps_of, state_of):
    plain = job.run("plain")
    validated = job.run(
        "validated",
        validation_prompt="a red square",
        validation_step_interval=2,
        validation_num_inference_steps=2,
        validation_resolution="64x64",
        validation_num_video_frames=5,
    )
    assert list((validated / "validation").rglob("*.mp4"))
    adapter = "adapter.transformer.safetensors"
    assert state_of(validated, 6)[adapter] == state_of(plain, 6)[adapter]
    assert [line["loss"] for line in steps_of(validated)] == [line["loss"] for line in steps_of(plain)]


ROUTES = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}


def test_unloading_tread_equals_never_naming_it(job, state_of, capsys):
    never = job.run("never")
    capsys.readouterr()
    unloaded = job.run("unloaded", tread_config=ROUTES, without=["tread"])
    routed = job.run("routed", tread_config=ROUTES)
    assert state_of(unloaded, 6) == state_of(never, 6)
    assert state_of(routed, 6) != state_of(never, 6)


def test_accumulated_micro_batches_equal_one_large_batch(job, steps_of):
    """Positions in the global batch, not processes or micro-batches, decide the noise."""
    keys = {"max_train_steps": 2, "caption_dropout_probability": 0.0}
    once = job.run("batch", train_batch_size=2, **keys)
    twice = job.run("accumulated", train_batch_size=1, gradient_accumulation_steps=2, **keys)
    assert steps_of(once)[0]["samples"] == steps_of(twice)[0]["samples"] == 2


def test_a_finished_run_says_so_and_trains_nothing(job, capsys):
    output = job.run("finished", max_train_steps=2)
    before = (output / "train.jsonl").read_bytes()
    capsys.readouterr()
    job.run("finished", max_train_steps=2, resume_from_checkpoint="latest")
    assert "nothing to train" in capsys.readouterr().out
    assert (output / "train.jsonl").read_bytes() == before


def test_a_second_start_reads_the_cache_and_loads_no_encoder(job, monkeypatch):
    job.run("cached", max_train_steps=1)
    from tuner.testing.toy.networks import ToyTextEncoder, ToyVae

    def refuse(*_, **__):
        raise AssertionError("an encoder was loaded on a warm cache")

    monkeypatch.setattr(ToyVae, "__init__", refuse)
    monkeypatch.setattr(ToyTextEncoder, "__init__", refuse)
    job.run("cached-again", max_train_steps=1)


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"optimizer": "adamw2"}, ConfigError, ["adamw2", "adamw"]),
        ({"max_train_steps": 0}, ConfigError, ["max_train_steps"]),
        ({"flow_schedule_auto_shift": True, "flow_schedule_shift": 3}, ConfigError, ["flow_schedule_auto_shift"]),
        ({"tread_config": {"routes": [{**ROUTES["routes"][0], "end_layer_idx": 9}]}}, ConfigError, ["routes[0]", "9"]),
        ({"resume_from_checkpoint": "/nowhere"}, CheckpointError, ["/nowhere"]),
        ({"lora_target_modules": ["to_qq"]}, ConfigError, ["to_qq", "to_q"]),
        ({"lora_type": "lycoris"}, ConfigError, ["there is no lycoris_config"]),
        ({"without": ["lora"], "lora_rank": 8}, ConfigError, ["model_type", "lora"]),
    ],
)
def test_bad_input_is_one_error_before_any_weight_is_read(job, keys, error, words, monkeypatch):
    from tuner.testing.toy import model

    def refuse(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(model, "read_weights", refuse)
    with pytest.raises(error) as caught:
        job.run("bad", **keys)
    assert all(word in str(caught.value) for word in words)


def test_a_missing_dataset_folder_is_one_error(job):
    config = job.config("bad-data")["data_backend_config"]
    config[0]["instance_data_dir"] = "/nowhere/at/all"
    with pytest.raises((ConfigError, DataError), match="/nowhere/at/all"):
        job.run("bad-data", data_backend_config=config)


def test_no_connection_is_opened(job, monkeypatch):
    """A run from local files needs no network, and asks for none."""
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket.socket, "connect_ex", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **named: asked.append(words))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    job.run("alone", max_train_steps=1)
    assert asked == []
