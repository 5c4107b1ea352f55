"""From folders of files to the samples that are trained on, without reading a weight or a pixel twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tuner import rng
from tuner.builtin.datasets.captions import captions_of
from tuner.builtin.datasets.decode import decode_file
from tuner.builtin.datasets.entries import LOCAL, AnyTrained, EvalDataset
from tuner.builtin.datasets.idle import idle_keys
from tuner.builtin.datasets.images import image_cache, unused
from tuner.builtin.datasets.judge import REMEDIES, UNDECODABLE, Kept, check_dataset, judge
from tuner.builtin.datasets.mask_weights import weigh_mask
from tuner.builtin.datasets.notes import dataset_notes
from tuner.builtin.datasets.pairing import companions, conditioning_of
from tuner.builtin.datasets.probe import Probed, probe
from tuner.builtin.datasets.quarantine import quarantine
from tuner.builtin.datasets.reading import Datasets, read_datasets
from tuner.builtin.datasets.scanning import PICTURE_SUFFIXES, VIDEO_SUFFIXES, local_listing
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


@dataclass(frozen=True)
class _Inputs:
    """What every dataset is prepared from."""

    core: CoreConfig
    spec: ModelSpec
    datasets: Datasets
    sources: Mapping[str, Source]
    show_progress: bool


def prepare(
    core: CoreConfig, spec: ModelSpec, sources: Mapping[str, Source] | None = None, *, show_progress: bool = True
) -> Prepared:
    """Read the datasets, probe their files, give each file its captions, its bucket and its views.

    Nothing is decoded but the first frame of a file that was not probed before; no weights are read.
    Raises ConfigError for a wrong list of datasets, DataError for missing captions or a dataset without a
    usable file.
    """
    datasets = read_datasets(core, sources)
    inputs = _Inputs(core, spec, datasets, sources or {}, show_progress)
    trained: list[Sample] = []
    held_out: list[Sample] = []
    reports: list[DatasetReport] = []
    for dataset in datasets.trained:
        check_dataset(dataset, spec)
    for dataset in datasets.trained:
        samples, report = _prepared(dataset, inputs)
        (held_out if isinstance(dataset, EvalDataset) else trained).extend(samples)
        reports.append(report)
    return Prepared(
        samples=tuple(trained),
        datasets={dataset.id: _dataset(dataset) for dataset in datasets.trained},
        text_cache=datasets.text.cache_dir,
        text_write_batch_size=datasets.text.write_batch_size,
        decode=decode_file,
        weigh=weigh_mask,
        report=DataReport(tuple(reports), (*datasets.notes, *unused(datasets, spec))),
        held_out=tuple(held_out),
        caches=_caches(inputs),
    )


def _caches(inputs: _Inputs) -> tuple[Path, ...]:
    """Every folder that encodings of these datasets may lie in, once."""
    latents = [dataset.cache_dir_vae for dataset in inputs.datasets.trained]
    images = [image_cache(each, inputs.datasets, inputs.core, inputs.spec) for each in inputs.datasets.trained]
    return tuple(dict.fromkeys([*latents, *(folder for folder in images if folder is not None)]))


def _prepared(dataset: AnyTrained, inputs: _Inputs) -> tuple[list[Sample], DatasetReport]:
    """The samples of one dataset, and what became of its files."""
    core, spec = inputs.core, inputs.spec
    listing = _listing(dataset, inputs)
    probed = probe(
        listing,
        dataset.cache_dir_vae,
        processes=core.probe_processes,
        show_progress=inputs.show_progress,
        pictures=dataset.dataset_type != "video",
        clips=dataset.dataset_type != "image",
    )
    usable, dropped = judge(dataset, listing.root, probed, spec)
    if not usable:
        raise _nothing_left(dataset, listing, probed, dropped)
    kept = chosen(usable, dataset.max_num_samples, core.seed)
    captions = captions_of(
        dataset, listing, [each.path for each in kept], seed=core.seed, table=_table(dataset, inputs.datasets)
    )
    samples = _samples(dataset, inputs, kept, captions.by_clip)
    notes = [*listing.notes, *idle_keys(dataset), *captions.notes, *dataset_notes(dataset, kept, samples, spec)]
    if len(kept) < len(usable):
        notes.append(f"{len(kept)} of {len(usable)} files are used (max_num_samples), chosen by the seed")
    if core.quarantine_problematic_files and dataset.type == LOCAL:
        notes += quarantine(listing.root, dataset.cache_dir_vae, dropped)
    elif core.delete_problematic_images and any(each.reason == UNDECODABLE for each in dropped):
        notes.append(
            "nothing is ever deleted (delete_problematic_images): files that cannot be decoded are left where they "
            "are, or moved aside with quarantine_problematic_files"
        )
    return samples, _report(dataset, listing, samples, dropped, notes)


def chosen(kept: Sequence[Kept], most: int | None, seed: int) -> list[Kept]:
    """At most ``most`` of the files, in their order.

    Each file's place in the draw is a function of ``seed`` and its name: another file more or less changes one.
    """
    if most is None or most >= len(kept):
        return list(kept)
    drawn = sorted(kept, key=lambda each: rng.derive_seed(seed, f"max_num_samples/{each.name}"))
    names = {each.name for each in drawn[:most]}
    return [each for each in kept if each.name in names]


def _listing(dataset: AnyTrained, inputs: _Inputs) -> Listing:
    """The dataset's files, on this machine."""
    suffixes = _suffixes(dataset)
    if dataset.type == LOCAL:
        return local_listing(Path(dataset.instance_data_dir or ""), suffixes)
    return inputs.sources[dataset.type].listing(
        Request(
            dataset_id=dataset.id,
            entry=dataset.model_dump(),
            keys=inputs.datasets.source_keys[dataset.id],
            suffixes=suffixes,
            folder=dataset.cache_dir_vae / COPIES,
            show_progress=inputs.show_progress,
        )
    )


def _suffixes(dataset: AnyTrained) -> frozenset[str]:
    """Which files a dataset takes; one of ``eval`` takes pictures and clips."""
    kinds = {"video": VIDEO_SUFFIXES, "image": PICTURE_SUFFIXES}
    return kinds.get(dataset.dataset_type, VIDEO_SUFFIXES | PICTURE_SUFFIXES)


def _table(dataset: AnyTrained, datasets: Datasets) -> str:
    """The file that a source reads captions from, where one of its keys says so; an address without its secrets."""
    named = str(datasets.source_keys[dataset.id].model_dump().get("manifest") or "")
    address = urlsplit(named)
    return f"{address.scheme}://{address.hostname or ''}{address.path}" if "://" in named else named


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
    dataset: AnyTrained, inputs: _Inputs, kept: Sequence[Kept], captions: Mapping[Path, tuple[str, ...]]
) -> list[Sample]:
    files = [(each, windows(dataset, each.name, each.facts, inputs.spec, inputs.core.seed)) for each in kept]
    entries = conditioning_of(dataset, inputs.datasets, inputs.spec)
    processes, show = inputs.core.probe_processes, inputs.show_progress
    paired = companions(dataset, entries, files, processes=processes, show_progress=show)
    images = image_cache(dataset, inputs.datasets, inputs.core, inputs.spec)
    samples = []
    for each, made in files:
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
                    companions=paired[each.name],
                    image_cache=images,
                )
            )
    return samples


def _report(
    dataset: AnyTrained,
    listing: Listing,
    samples: Sequence[Sample],
    dropped: Sequence[Dropped],
    notes: Sequence[str],
) -> DatasetReport:
    return DatasetReport(
        dataset_id=dataset.id,
        folder=listing.root,
        kept=len(samples),
        repeats=dataset.repeats,
        buckets=tuple(sorted(Counter(sample.bucket for sample in samples).items())),
        dropped=tuple(dropped),
        notes=tuple(notes),
        held_out=isinstance(dataset, EvalDataset),
    )


def _nothing_left(
    dataset: AnyTrained, listing: Listing, probed: Sequence[Probed], dropped: Sequence[Dropped]
) -> DataError:
    if not probed:
        kind = {"video": "video", "image": "image"}.get(dataset.dataset_type, "video or image")
        return DataError(
            f"dataset {dataset.id!r} has no {kind} files",
            where=listing.root,
            allowed=sorted(_suffixes(dataset)),
            remedy="correct instance_data_dir, or put files there",
        )
    reasons = dict(Counter(each.reason for each in dropped).most_common())
    first = "; ".join(f"{each.path.name}: {each.detail}" for each in dropped[:3]) + " …" * (len(dropped) > 3)
    return DataError(
        f"dataset {dataset.id!r} has no usable file: of {len(probed)} files {summary(reasons)} ({first})",
        where=listing.root,
        remedy="; ".join(REMEDIES[reason] for reason in reasons),
    )
