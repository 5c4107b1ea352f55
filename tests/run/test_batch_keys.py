"""The keys about batches and schedules, from the config to what a run trains on."""

from __future__ import annotations

import pytest

from tuner import pipeline
from tuner.assembly import assemble
from tuner.errors import DataError, TunerError


def entries(job, *more: dict) -> list[dict]:
    """The job's datasets (four clips, one of them upright), the first once more for each of ``more``."""
    clips, text = job.config("out")["data_backend_config"]
    return [clips, *({**clips, **each} for each in more), text]


def survey(job, **keys):
    with job.on_path():
        return pipeline.survey(assemble(job.config("out", **keys)))


def test_a_run_trains_on_what_the_schedule_says(job, steps_of):
    datasets = entries(job, {"id": "again", "start_step": 3, "end_epoch": 3, "probability": 0.5})
    datasets[0]["end_step"] = 5
    datasets[0]["repeats"] = 1
    datasets.insert(2, {**datasets[1], "id": "last", "start_step": 5, "end_epoch": None})
    output = job.run("scheduled", max_train_steps=9, train_batch_size=1, data_backend_config=datasets)
    assert [line["epoch"] for line in steps_of(output)] == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_short_clips_make_larger_batches(job, steps_of, capsys):
    pictures = {"id": "short", "video": {"num_frames": 1, "min_frames": 1}}
    found = survey(job, train_batch_size=1, data_backend_config=entries(job, pictures))
    one = found.spec.networks[0].tokens(*found.spec.latents.shape(9, 48, 80)[1:])
    assert found.plan.samples_per_step == (1, 1)
    output = job.run(
        "budget", train_batch_size=1, batch_tokens=one, max_train_steps=7, data_backend_config=entries(job, pictures)
    )
    out = capsys.readouterr().out
    assert "tokens a clip: batches of" in out
    samples = {line["samples"] for line in steps_of(output)}
    assert len(samples) > 1
    assert f"steps of {min(samples)} to {max(samples)} samples" in out


def test_small_buckets_are_dropped_and_said(job, capsys):
    with job.on_path():
        pipeline.check(assemble(job.config("out", train_batch_size=3, small_buckets="drop")))
    assert "1 left out (small_buckets: drop)" in capsys.readouterr().out
    with pytest.raises(TunerError, match="disable_bucket_pruning"):
        survey(job, small_buckets="drop", disable_bucket_pruning=True)


def test_a_dataset_smaller_than_a_step_is_refused_before_any_weight_is_read(job):
    with pytest.raises(DataError, match=r"'clips': 4 x 1 = 4, a step takes 6[\s\S]*set repeats: 1 in dataset 'clips'"):
        survey(job, train_batch_size=3, gradient_accumulation_steps=2)
    datasets = entries(job)
    datasets[0]["repeats"] = 1
    assert survey(job, train_batch_size=3, gradient_accumulation_steps=2, data_backend_config=datasets).total == 6


def test_a_run_longer_than_its_data_is_refused(job):
    datasets = entries(job)
    datasets[0]["end_epoch"] = 2
    with pytest.raises(DataError, match="from epoch 3 on, after 6 steps"):
        survey(job, max_train_steps=7, data_backend_config=datasets)
    assert survey(job, max_train_steps=6, data_backend_config=datasets).total == 6
