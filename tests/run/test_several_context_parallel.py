"""Two processes that share each sample learn what one process does."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tuner import pipeline
from tuner.assembly import assemble
from tuner.errors import TunerError
from tuner.testing.killing import start_several
from tuner_wan.tiny import build_tiny

KEYS = {
    "model_family": "wan",
    "train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 3,
    "learning_rate": 1e-3,
    "noise_levels_interval": 3,
    "eval_steps_interval": 3,
}
SHARED = {"context_parallel_size": 2}


@pytest.fixture(scope="module")
def config(job, tmp_path_factory):
    """Flat configs over a tiny Wan; clips of 45 tokens, which two processes cannot halve."""
    tiny = build_tiny(tmp_path_factory.mktemp("tiny") / "wan")

    def make(output, **keys):
        made = job.config(output, **KEYS, pretrained_model_name_or_path=str(tiny))
        clips, text = made["data_backend_config"]
        held = {**clips, "id": "held", "dataset_type": "eval", "cache_dir_vae": str(job.folder / "cache" / "held")}
        wan = {"cache_dir_vae": str(job.folder / "cache" / "wan")}
        text = {**text, "cache_dir": str(job.folder / "cache" / "wan-text")}
        return {**made, "data_backend_config": [{**clips, **wan}, held, text], **keys}

    return make


def in_several(job, config, count=2):
    ranks = start_several(config, [str(job.distribution)], count)
    for each in ranks:
        each.join(120)
    return [each.exitcode for each in ranks]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("lora", {"gradient_checkpointing": "selective"}),
        # Not Adam, which divides tiny gradients by their size, so that their last bits show.
        ("full", {"model_type": "full", "optimizer": "sgd", "fsdp_enable": True, "gradient_checkpointing": True}),
    ],
)
def test_what_two_learn_of_a_sample_together_is_what_one_learns(job, config, steps_of, name, keys):
    pipeline.run(assemble(config(f"context-{name}-one", **keys)))
    assert in_several(job, config(f"context-{name}-two", **keys, **SHARED)) == [0, 0]
    one, two = (job.folder / f"context-{name}-{each}" for each in ("one", "two"))
    for line, other in zip(steps_of(two), steps_of(one), strict=True):
        assert line.keys() == other.keys()
        assert {key: value for key, value in line.items() if key != "grad_norm"} == pytest.approx(
            {key: value for key, value in other.items() if key != "grad_norm"}, rel=1e-5
        )
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert any(key.startswith("evaluation/") for key in steps_of(two)[-1])
    before, after = (load_file(each / "checkpoint-3" / "adapter.transformer.safetensors") for each in (one, two))
    for tensor, other in zip(after.values(), before.values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=2e-5)


def test_two_groups_of_two_divide_the_batch_and_the_samples(job, config, steps_of):
    pipeline.run(assemble(config("context-groups-one")))
    keys = {**SHARED, "gradient_accumulation_steps": 1}
    assert in_several(job, config("context-groups", **keys), count=4) == [0] * 4
    one, four = (steps_of(job.folder / name) for name in ("context-groups-one", "context-groups"))
    for line, other in zip(four, one, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def refusal(settings, processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(TunerError) as error:
        pipeline.survey(assemble(settings))
    return str(error.value)


def test_what_cannot_be_shared_is_refused_before_weights_are_read(config, monkeypatch):
    assert "3 processes cannot be divided into groups of 2" in refusal(config("x", **SHARED), 3, monkeypatch)
    heads = refusal(config("x", context_parallel_size=4), 4, monkeypatch)
    assert "2 attention heads" in heads
    assert "1, 2" in heads
    routes = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -1}]}
    routed = refusal(config("x", **SHARED, tread_config=routes), 2, monkeypatch)
    assert "tread" in routed
    assert "context_parallel" in routed


def test_one_process_says_that_it_shares_nothing(config, caplog):
    assemble(config("x", **SHARED))
    assert "context_parallel_size does nothing" in caplog.text


def test_a_family_whose_attention_cannot_exchange_is_refused(job):
    assert in_several(job, job.config("context-toy", **SHARED)) == [2, 2]
