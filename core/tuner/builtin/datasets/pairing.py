"""Files that belong to the files of a dataset: masks, first and last frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuner.builtin.datasets.entries import Trained
from tuner.builtin.datasets.reading import Datasets
from tuner.data.samples import Companion


def companions(dataset: Trained, datasets: Datasets, names: Sequence[str]) -> Mapping[str, tuple[Companion, ...]]:
    """The companions of the files ``names`` (paths inside the dataset's folder), by name."""
    return {}
