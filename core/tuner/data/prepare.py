"""From folders of files to the samples that are trained on, without reading a weight or a pixel twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.config.keys import CoreConfig
from tuner.data import buckets
from tuner.data.captions import captions_of
from tuner.data.datasets import Datasets, VideoDataset, read_datasets
from tuner.data.probe import VIDEO_SUFFIXES, Probed, probe
from tuner.data.probe_file import VideoFacts
from tuner.data.report import DataReport, DatasetReport, Dropped, summary
from tuner.data.samples import Bucket, Framing, Sample
from tuner.errors import DataError
from tuner.spec import ModelSpec

REMEDIES = {
    "cannot be decoded": "convert the files to mp4 (H.264), or take them out",
    "too short": "lower video.num_frames and video.min_frames, or use longer clips",
    "too long": "raise video.max_frames",
    "too small": "lower minimum_image_size, or use larger clips",
}


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready to be encoded."""

    samples: tuple[Sample, ...]
    """in order of dataset and path"""
    report: DataReport
    datasets: Datasets


def prepare(core: CoreConfig, spec: ModelSpec, *, show_progress: bool = True) -> Prepared:
    """Read the datasets, probe their files, give each clip its captions and its bucket.

    Nothing is decoded but the first frame of a file that was not probed before; no weights are read.
    Raises ConfigError for a wrong list of datasets, DataError for missing captions or a dataset without a
    usable clip.
    """
    datasets = read_datasets(core)
    samples: list[Sample] = []
    reports: list[DatasetReport] = []
    for dataset in datasets.videos:
        probed = probe(
            dataset.instance_data_dir,
            dataset.cache_dir_vae,
            processes=core.probe_processes,
            show_progress=show_progress,
        )
        kept, dropped = _judge(dataset, probed, spec)
        if not kept:
            raise _nothing_left(dataset, probed, dropped)
        made = _samples(dataset, kept, core, spec)
        samples += made
        reports.append(_report(dataset, made, dropped, spec))
    return Prepared(tuple(samples), DataReport(tuple(reports), _notes(datasets, spec)), datasets)


def shortest_allowed(dataset: VideoDataset, spec: ModelSpec) -> int:
    """Frames that a clip of this dataset must have: ``min_frames``, else all frames of a training clip."""
    if dataset.video.min_frames is not None:
        return dataset.video.min_frames
    return spec.latents.frames_allowed(dataset.video.num_frames)


def _judge(
    dataset: VideoDataset, probed: Sequence[Probed], spec: ModelSpec
) -> tuple[list[tuple[Path, VideoFacts]], list[Dropped]]:
    """Split into clips to use and clips to leave out."""
    kept: list[tuple[Path, VideoFacts]] = []
    dropped: list[Dropped] = []
    for each in probed:
        path = dataset.instance_data_dir / each.name
        if each.facts is None:
            dropped.append(Dropped(dataset.id, path, "cannot be decoded", each.reason))
        elif fault := _fault(dataset, each.facts, spec):
            dropped.append(Dropped(dataset.id, path, *fault))
        else:
            kept.append((path, each.facts))
    return kept, dropped


def _fault(dataset: VideoDataset, facts: VideoFacts, spec: ModelSpec) -> tuple[str, str] | None:
    """Why a clip is not used: the reason and this clip's numbers; None when it is."""
    shortest, longest = shortest_allowed(dataset, spec), dataset.video.max_frames
    size = buckets.measure(facts.width, facts.height, dataset.resolution_type)
    if facts.frames < shortest:
        return "too short", f"{facts.frames} frames, {shortest} needed"
    if longest is not None and facts.frames > longest:
        return "too long", f"{facts.frames} frames, at most {longest} wanted"
    if size < dataset.minimum_image_size:
        needed = f"{size:.4g} by {dataset.resolution_type}, {dataset.minimum_image_size:g} needed"
        return "too small", f"{facts.width}x{facts.height} is {needed}"
    return None


def _samples(
    dataset: VideoDataset, kept: Sequence[tuple[Path, VideoFacts]], core: CoreConfig, spec: ModelSpec
) -> list[Sample]:
    captions = captions_of(dataset, (path for path, _ in kept))
    samples = []
    for path, facts in kept:
        bucket = _bucket(dataset, facts, core, spec)
        samples.append(
            Sample(
                sample_id=f"{dataset.id}/{path.relative_to(dataset.instance_data_dir).as_posix()}",
                dataset_id=dataset.id,
                path=path,
                content_hash=facts.sha256,
                captions=captions[path],
                width=facts.width,
                height=facts.height,
                frames=facts.frames,
                fps=facts.fps,
                bucket=bucket,
                framing=_framing(dataset, facts, bucket),
                repeats=dataset.repeats,
            )
        )
    return samples


def _bucket(dataset: VideoDataset, facts: VideoFacts, core: CoreConfig, spec: ModelSpec) -> Bucket:
    width, height = buckets.bucket_size(
        facts.width,
        facts.height,
        resolution=dataset.resolution,
        unit=dataset.resolution_type,
        multiple=spec.size_multiple,
        rounding=core.aspect_bucket_rounding,
        square=dataset.crop and dataset.crop_aspect == "square",
    )
    return Bucket(buckets.bucket_frames(facts.frames, dataset.video.num_frames, spec.latents), height, width)


def _framing(dataset: VideoDataset, facts: VideoFacts, bucket: Bucket) -> Framing:
    """Cover the bucket; a clip above ``maximum_image_size`` is scaled to ``target_downsample_size`` before the cut."""
    largest, target, unit = dataset.maximum_image_size, dataset.target_downsample_size, dataset.resolution_type
    scale = 0.0
    if dataset.crop and largest and target and buckets.measure(facts.width, facts.height, unit) > largest:
        scale = buckets.scale_to(facts.width, facts.height, target, unit)
    return buckets.framing(facts.width, facts.height, bucket, at_least_scale=scale)


def _report(
    dataset: VideoDataset, samples: Sequence[Sample], dropped: Sequence[Dropped], spec: ModelSpec
) -> DatasetReport:
    return DatasetReport(
        dataset_id=dataset.id,
        folder=dataset.instance_data_dir,
        kept=len(samples),
        repeats=dataset.repeats,
        buckets=tuple(sorted(Counter(sample.bucket for sample in samples).items())),
        dropped=tuple(dropped),
        notes=tuple(_dataset_notes(dataset, samples, spec)),
    )


def _dataset_notes(dataset: VideoDataset, samples: Sequence[Sample], spec: ModelSpec) -> list[str]:
    """What is not as the user wrote it, or not as the model was trained."""
    notes = []
    wanted, allowed = dataset.video.num_frames, spec.latents.frames_allowed(dataset.video.num_frames)
    if allowed != wanted:
        notes.append(f"num_frames {wanted} becomes {allowed}: the model takes {spec.latents.stride_time}k+1 frames")
    other = sum(abs(sample.fps - spec.fps) > 0.5 for sample in samples)
    if other:
        notes.append(
            f"{other} of {len(samples)} clips do not have the model's {spec.fps:g} frames per second; their frames "
            "are taken as they are, so motion is learnt slower or faster than it was filmed"
        )
    enlarged = sum(sample.framing.width > sample.width for sample in samples)
    if enlarged:
        notes.append(f"{enlarged} of {len(samples)} clips are smaller than their bucket and are enlarged")
    if not dataset.crop and (dataset.maximum_image_size or dataset.target_downsample_size):
        notes.append("maximum_image_size and target_downsample_size do nothing without `crop: true`")
    elif bool(dataset.maximum_image_size) != bool(dataset.target_downsample_size):
        notes.append("maximum_image_size and target_downsample_size do nothing without each other")
    return notes


def _notes(datasets: Datasets, spec: ModelSpec) -> tuple[str, ...]:
    unused = [entry.id for entry in datasets.conditioning if "conditioning" not in spec.encoders]
    return datasets.notes + tuple(f"dataset {name!r} is not used: {spec.flavour} takes no image" for name in unused)


def _nothing_left(dataset: VideoDataset, probed: Sequence[Probed], dropped: Sequence[Dropped]) -> DataError:
    if not probed:
        return DataError(
            f"dataset {dataset.id!r} has no video files",
            where=dataset.instance_data_dir,
            allowed=sorted(VIDEO_SUFFIXES),
            remedy="correct instance_data_dir, or put clips there",
        )
    reasons = dict(Counter(each.reason for each in dropped).most_common())
    first = "; ".join(f"{each.path.name}: {each.detail}" for each in dropped[:3]) + " …" * (len(dropped) > 3)
    return DataError(
        f"dataset {dataset.id!r} has no usable clip: of {len(probed)} files {summary(reasons)} ({first})",
        where=dataset.instance_data_dir,
        remedy="; ".join(REMEDIES[reason] for reason in reasons),
    )
