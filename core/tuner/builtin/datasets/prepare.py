"""From folders of files to the samples that are trained on, without reading a weight or a pixel twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.builtin.datasets.captions import captions_of
from tuner.builtin.datasets.entries import AnyTrained, Clips, EvalDataset
from tuner.builtin.datasets.judge import REMEDIES, Kept, judge
from tuner.builtin.datasets.notes import dataset_notes
from tuner.builtin.datasets.pairing import companions
from tuner.builtin.datasets.probe import PICTURE_SUFFIXES, VIDEO_SUFFIXES, Probed, local_listing, probe
from tuner.builtin.datasets.reading import LOCAL, Datasets, read_datasets
from tuner.builtin.datasets.views import windows
from tuner.data.report import DataReport, DatasetReport, Dropped, summary
from tuner.data.samples import Dataset, Prepared, Sample, Schedule
from tuner.data.source import Listing, Request
from tuner.errors import DataError
from tuner.spec import ModelSpec

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.data.source import Source

COPIES = "source"
"""Folder inside a dataset's cache that holds copies of files from elsewhere."""


def prepare(
    core: CoreConfig, spec: ModelSpec, sources: Mapping[str, Source] | None = None, *, show_progress: bool = True
) -> Prepared:
    """Read the datasets, probe their files, give each file its captions, its bucket and its views.

    Nothing is decoded but the first frame of a file that was not probed before; no weights are read.
    Raises ConfigError for a wrong list of datasets, DataError for missing captions or a dataset without a
    usable file.
    """
    datasets = read_datasets(core, sources)
    trained: list[Sample] = []
    held_out: list[Sample] = []
    reports: list[DatasetReport] = []
    for dataset in datasets.trained:
        listing = _listing(dataset, datasets, sources or {}, show_progress)
        probed = probe(listing, dataset.cache_dir_vae, processes=core.probe_processes, show_progress=show_progress)
        kept, dropped = judge(dataset, listing.root, probed, spec)
        if not kept:
            raise _nothing_left(dataset, listing, probed, dropped)
        made = _samples(dataset, datasets, listing, kept, core, spec)
        (held_out if isinstance(dataset, EvalDataset) else trained).extend(made)
        reports.append(_report(dataset, listing, made, dropped, spec))
    return Prepared(
        samples=tuple(trained),
        datasets={dataset.id: _dataset(dataset) for dataset in datasets.trained},
        text_cache=datasets.text.cache_dir,
        report=DataReport(tuple(reports), _notes(datasets, spec)),
        held_out=tuple(held_out),
        caches=tuple(dict.fromkeys(dataset.cache_dir_vae for dataset in datasets.trained)),
    )


def _listing(dataset: AnyTrained, datasets: Datasets, sources: Mapping[str, Source], show: bool) -> Listing:
    """The dataset's files, on this machine."""
    suffixes = {"video": VIDEO_SUFFIXES, "image": PICTURE_SUFFIXES}.get(
        dataset.dataset_type, VIDEO_SUFFIXES | PICTURE_SUFFIXES
    )
    if dataset.type == LOCAL:
        return local_listing(Path(dataset.instance_data_dir or ""), suffixes)
    return sources[dataset.type].listing(
        Request(
            dataset_id=dataset.id,
            entry=dataset.model_dump(),
            keys=datasets.source_keys[dataset.id],
            suffixes=suffixes,
            folder=dataset.cache_dir_vae / COPIES,
            show_progress=show,
        )
    )


def _dataset(dataset: AnyTrained) -> Dataset:
    schedule = Schedule(
        repeats=dataset.repeats,
        probability=dataset.probability,
        start_epoch=max(1, dataset.start_epoch),
        end_epoch=dataset.end_epoch or None,
        start_step=dataset.start_step,
        end_step=dataset.end_step or None,
    )
    return Dataset(dataset.id, schedule, dataset.caption_dropout_probability, dataset.is_regularisation_data)


def _samples(
    dataset: AnyTrained, datasets: Datasets, listing: Listing, kept: Sequence[Kept], core: CoreConfig, spec: ModelSpec
) -> list[Sample]:
    captions = captions_of(dataset, listing, [each.path for each in kept], seed=core.seed)
    paired = companions(dataset, datasets, [each.name for each in kept])
    samples = []
    for each in kept:
        made = windows(dataset, each.name, each.facts, spec, core.seed)
        for index, window in enumerate(made):
            samples.append(
                Sample(
                    sample_id=f"{dataset.id}/{each.name}" + (f"#{index}" if len(made) > 1 else ""),
                    dataset_id=dataset.id,
                    path=each.path,
                    content_hash=each.facts.sha256,
                    captions=captions[each.path],
                    width=each.facts.width,
                    height=each.facts.height,
                    frames=each.facts.frames,
                    fps=each.facts.fps,
                    bucket=window.bucket,
                    views=window.views,
                    cache=dataset.cache_dir_vae,
                    companions=paired.get(each.name, ()),
                )
            )
    return samples


def _report(
    dataset: AnyTrained, listing: Listing, samples: Sequence[Sample], dropped: Sequence[Dropped], spec: ModelSpec
) -> DatasetReport:
    return DatasetReport(
        dataset_id=dataset.id,
        folder=listing.root,
        kept=len(samples),
        repeats=dataset.repeats,
        buckets=tuple(sorted(Counter(sample.bucket for sample in samples).items())),
        dropped=tuple(dropped),
        notes=(*listing.notes, *dataset_notes(dataset, samples, spec)),
    )


def _notes(datasets: Datasets, spec: ModelSpec) -> tuple[str, ...]:
    unused = [entry.id for entry in datasets.image_embeds if "conditioning" not in spec.encoders]
    return datasets.notes + tuple(f"dataset {name!r} is not used: {spec.flavour} takes no image" for name in unused)


def _nothing_left(
    dataset: AnyTrained, listing: Listing, probed: Sequence[Probed], dropped: Sequence[Dropped]
) -> DataError:
    if not probed:
        return DataError(
            f"dataset {dataset.id!r} has no {'video' if isinstance(dataset, Clips) else 'image'} files",
            where=listing.root,
            allowed=sorted(VIDEO_SUFFIXES if isinstance(dataset, Clips) else PICTURE_SUFFIXES),
            remedy="correct instance_data_dir, or put files there",
        )
    reasons = dict(Counter(each.reason for each in dropped).most_common())
    first = "; ".join(f"{each.path.name}: {each.detail}" for each in dropped[:3]) + " …" * (len(dropped) > 3)
    return DataError(
        f"dataset {dataset.id!r} has no usable file: of {len(probed)} files {summary(reasons)} ({first})",
        where=listing.root,
        remedy="; ".join(REMEDIES[reason] for reason in reasons),
    )
