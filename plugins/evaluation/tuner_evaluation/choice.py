"""Which held-out samples are measured: always the same ones, whatever else the datasets hold. Light: no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from tuner import rng
from tuner.data.samples import Sample
from tuner.errors import ConfigError


def chosen(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most ``most`` of the samples, in order of their ids, as many of each dataset as it has or its share is.

    Within a dataset those with the smallest hash of their id come first: one file more or less changes one sample,
    and runs with different seeds measure the same ones.
    """
    places: Counter[str] = Counter()
    ranked = []
    for sample in sorted(samples, key=_hash):
        ranked.append((places[sample.dataset_id], _hash(sample), sample))
        places[sample.dataset_id] += 1
    first = sorted(ranked, key=lambda each: each[:2])[:most]
    return sorted((sample for _, _, sample in first), key=lambda each: each.sample_id)


def _hash(sample: Sample) -> int:
    return rng.derive_seed(0, f"evaluation/{sample.sample_id}")


def check_ids(samples: Iterable[Sample]) -> None:
    """Raise ConfigError for a dataset whose loss would be called like the loss at a timestep."""
    for name in sorted({sample.dataset_id for sample in samples}):
        if re.fullmatch(r"t\d+", name):
            raise ConfigError(
                f"the loss on dataset {name!r} would be called loss/{name}, as the one at timestep {name[1:]} is",
                where="id",
                remedy="give the dataset another id",
            )
