"""The shapes that a plan is made for: those of the data, or those that are named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuner.builtin.planner.cards import Card
from tuner.builtin.planner.costs import Shape, cost_of, most_frequent, shapes_of
from tuner.builtin.planner.memory_phases import of_run
from tuner.builtin.planner.page import Plan
from tuner.data.samples import Bucket
from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner.assembly import Assembly
    from tuner.config.keys import CoreConfig
    from tuner.run import Run
    from tuner.spec import ModelSpec

WORDS = re.compile(r"(\d+)x(\d+)(?:x(\d+))?")


def of_data(assembly: Assembly, card: Card | None) -> Plan:
    """The plan for the configured data, surveyed as ``tuner check`` does. Raises what that raises."""
    from tuner import pipeline

    if assembly.core.data_backend_config is None:
        raise ConfigError(
            "there are no data to plan for",
            where="data_backend_config",
            remedy="name the data, or shapes of clips: tuner plan --shape 832x480x81",
        )
    survey = pipeline.survey(assembly)
    return _plan(survey.run, survey.spec, shapes_of(survey.plan, survey.total), card, survey.total)


def of_words(assembly: Assembly, words: Sequence[str], card: Card | None) -> Plan:
    """The plan for clips of the shapes ``words``, such as ``832x480x81``, in equal shares; no data are looked at.

    Raises ConfigError for what is no shape, or none that the model can take.
    """
    from tuner import pipeline
    from tuner.assembly import new_run

    run = new_run(assembly)
    spec = pipeline.describe(run, assembly.manager)
    shapes = named(run, spec, words)
    run.trained_shape = most_frequent(shapes)
    return _plan(run, spec, shapes, card, None)


def named(run: Run, spec: ModelSpec, words: Sequence[str]) -> list[Shape]:
    """The shapes ``words`` in equal shares. Raises ConfigError."""
    buckets = [parse(word, spec) for word in words]
    return [Shape(bucket, _samples(run.config, spec, bucket), 1 / len(buckets)) for bucket in buckets]


def parse(word: str, spec: ModelSpec) -> Bucket:
    """``832x480x81`` (width, height, frames), or ``832x480`` for a picture. Raises ConfigError."""
    match = WORDS.fullmatch(word)
    if match is None:
        raise ConfigError(f"{word!r} is no shape", where="--shape", remedy="write width x height x frames: 832x480x81")
    width, height, frames = (int(each or 1) for each in match.groups())
    multiple, allowed = spec.size_multiple, spec.latents.frames_allowed(frames)
    fits = (max(1, side // multiple) * multiple for side in (width, height))
    near = "x".join(map(str, (*fits, max(1, allowed))))
    if (width % multiple, height % multiple, frames) != (0, 0, allowed) or not width * height * frames:
        raise ConfigError(
            f"{spec.flavour} takes no clips of {word}",
            where="--shape",
            allowed=f"sides that are multiples of {multiple}, {spec.latents.stride_time}k + 1 frames",
            nearest=near,
        )
    return Bucket(frames, height, width)


def _samples(config: CoreConfig, spec: ModelSpec, bucket: Bucket) -> int:
    """Clips in a micro-batch, as epochs are planned."""
    tokens = spec.networks[0].tokens(*spec.latents.shape(bucket.frames, bucket.height, bucket.width)[1:])
    return max(config.train_batch_size, (config.batch_tokens or 0) // tokens)


def _plan(run: Run, spec: ModelSpec, shapes: Sequence[Shape], card: Card | None, steps: int | None) -> Plan:
    estimate = run.estimate
    assert estimate is not None  # the model is described
    costs = {network.name: [cost_of(estimate, network, shape, card) for shape in shapes] for network in spec.networks}
    found = of_run(run, spec, [cost.workload for each in costs.values() for cost in each])
    return Plan(spec, card, costs, found, run.trained_shape, steps)
