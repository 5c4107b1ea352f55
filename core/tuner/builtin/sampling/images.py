"""The frames that validation clips of an image-to-video model start from: the user's pictures, or the datasets' own.

They become samples of their own, encoded with all others before training, so that rendering needs no encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.builtin.buckets import framing
from tuner.builtin.sampling.prompts import Prompt, slug
from tuner.builtin.sampling.settings import Settings
from tuner.data.samples import Bucket, Companion, Decode, Prepared, Sample, View
from tuner.errors import ConfigError, DataError
from tuner.files import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.config.keys import CoreConfig
    from tuner.run import Run
    from tuner.spec import ModelSpec

FORMATS = ("AVIF", "BMP", "JPEG", "PNG", "TIFF", "WEBP")
"""Pictures, by Pillow's names."""
KEY = "validation_images"
LAST = "last_frame"
TOLERANCE = 0.01
"""How much the aspects of a first and a last frame may differ."""
LAST_SUFFIX = "-last"
"""``cat-last.png`` is the last frame that goes with ``cat.png``."""


def sample_id(prompt: Prompt) -> str:
    """What the starting frame of a prompt is found by; no sample of a dataset can have it."""
    return f"validation//{prompt.frame or prompt.slug}"


def starting_samples(
    run: Run, spec: ModelSpec, data: Prepared, prompts: Sequence[Prompt], settings: Settings
) -> list[Sample]:
    """One sample for each prompt: what its clip starts from (and ends at), at the size of the validation clips.

    Fewer where the datasets have no clip to take both frames from. Raises ConfigError or DataError for pictures that
    do not exist, cannot be read, or lack their last frame.
    """
    if not spec.frames_taken or not data.samples:
        return []
    # A first latent frame is the encoding of one picture, however long the clip is to become.
    frames = 1 if spec.condition == "clean_first_frame" else settings.frames
    bucket = Bucket(frames, settings.height, settings.width)
    if run.config.validation_images is not None:
        pictures = chosen_pictures(run.config, prompts, LAST in spec.frames_taken)
        first = data.samples[0]
        stores = (first.cache, first.image_cache)
        found = {prompt: from_pictures(prompt, pictures[prompt], bucket, data.decode, stores) for prompt in prompts}
    else:
        found = dict(_from_datasets(data, prompts, bucket, LAST in spec.frames_taken))
    for prompt, sample in found.items() if run.is_main else ():
        run.log.info("the validation clip of %r starts from %s", prompt.nickname, sample.path.name)
    return list(found.values())


def encoded_images(run: Run, spec: ModelSpec, prompt: Prompt) -> Mapping[str, Tensor] | None:
    """What was encoded of a prompt's frames; empty where the model takes none, None where there are none to take."""
    if not spec.frames_taken:
        return {}
    assert run.cached is not None, "validation needs the cache"
    wanted = sample_id(prompt)
    sample = next((each for each in run.cached.prepared.extra if each.sample_id == wanted), None)
    if sample is None:
        return None
    return {name: tensor for name, tensor in run.cached.video(sample).items() if name != "latents"}


def picture_name(run: Run, prompt: Prompt) -> str | None:
    """The name of the file that a prompt's clip starts from."""
    extra = run.cached.prepared.extra if run.cached is not None else ()
    return next((each.path.name for each in extra if each.sample_id == sample_id(prompt)), None)


def chosen_pictures(
    core: CoreConfig, prompts: Sequence[Prompt], with_last: bool
) -> dict[Prompt, tuple[Path, Path | None]]:
    """The first (and last) frame of each prompt: by nickname, and for prompts without one of theirs in turn."""
    files = _files(core)
    last = {_stem(each): each for each in files if with_last and each.stem.endswith(LAST_SUFFIX)}
    first = {_stem(each): each for each in files if each not in last.values()}
    if not first:
        raise ConfigError(f"{KEY} names no picture", where=core.validation_images, remedy="put pictures there")
    owned = {prompt: first[name] for prompt in prompts if (name := prompt.picture or prompt.slug) in first}
    free = [each for each in first.values() if each not in owned.values()] or list(first.values())
    others = [prompt for prompt in prompts if prompt not in owned]
    owned |= {prompt: free[turn % len(free)] for turn, prompt in enumerate(others)}
    for each in owned.values():
        if with_last and _stem(each) not in last:
            raise ConfigError(
                f"{KEY} has no last frame for {each.name}, and this model renders from a first to a last frame",
                remedy=f"add a picture named {each.stem}{LAST_SUFFIX}{each.suffix}",
            )
    return {prompt: (each, last.get(_stem(each))) for prompt, each in owned.items()}


def _stem(path: Path) -> str:
    """What a file is matched to a prompt by."""
    return slug(path.stem.removesuffix(LAST_SUFFIX))


def _files(core: CoreConfig) -> list[Path]:
    """The files that ``validation_images`` names: those listed, or the pictures of a folder in order of their names."""
    wish = core.validation_images
    if isinstance(wish, Path) and wish.is_dir():
        return sorted(each for each in wish.iterdir() if each.suffix.lower() in _suffixes() and each.is_file())
    listed = [wish] if isinstance(wish, Path) else wish or []
    for each in listed:
        if not each.is_file():
            raise ConfigError(f"{KEY} names a file that does not exist", where=each, remedy="correct the path")
    return listed


def _suffixes() -> set[str]:
    from PIL import Image

    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def from_pictures(
    prompt: Prompt, pictures: tuple[Path, Path | None], bucket: Bucket, decode: Decode, stores: tuple[Path, Path | None]
) -> Sample:
    """The sample of a user's first and last picture; ``stores``: roots of what is encoded of clips, and of images.

    Raises DataError for what is no picture, ConfigError where the two have other aspects.
    """
    first, last = pictures
    width, height = _displayed_size(first)
    other_width, other_height = _displayed_size(last or first)
    if abs(width * other_height / (height * other_width) - 1) > TOLERANCE:
        raise ConfigError(
            f"{(last or first).name} does not have the aspect of {first.name}",
            where=last,
            remedy="cut one of them as the other",
        )
    view = View(framing(width, height, bucket), still=True)
    for file in (first, last) if last is not None else (first,):
        decode(file, view, replace(bucket, frames=1))  # what cannot be encoded ends the run now, not later
    return Sample(
        sample_id=sample_id(prompt),
        dataset_id=KEY,
        path=first,
        content_hash=sha256_of(first),
        captions=(prompt.text,),
        width=width,
        height=height,
        frames=1,
        fps=0,
        bucket=bucket,
        views=(view,),
        cache=stores[0],
        companions=() if last is None else (Companion(LAST, last, sha256_of(last)),),
        image_cache=stores[1],
    )


def _displayed_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of a picture, upright. Raises DataError for what is none."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=FORMATS) as picture:
            return ImageOps.exif_transpose(picture).size
    except Exception as error:  # what Pillow raises for bad files is documented nowhere: any of a dozen kinds
        raise DataError(
            f"{KEY} names what is no picture: {error}", where=path, remedy="convert it to PNG or JPEG"
        ) from error


def _from_datasets(
    data: Prepared, prompts: Sequence[Prompt], bucket: Bucket, with_last: bool
) -> Iterator[tuple[Prompt, Sample]]:
    """First frames of held-out clips, or of trained ones: of a clip with the prompt for a caption, else in turn."""
    pool = {each.path: each for each in data.held_out or data.samples if not with_last or _has_last(each, bucket)}
    # Clips of the very shape are encoded already.
    alike = [each for each in pool.values() if each.bucket == bucket] or list(pool.values())
    for turn, prompt in enumerate(prompts if alike else ()):
        source = next((each for each in pool.values() if prompt.text in each.captions), alike[turn % len(alike)])
        yield prompt, _reshaped(source, sample_id(prompt), bucket, with_last)


def _has_last(sample: Sample, bucket: Bucket) -> bool:
    """Whether there is a frame to end at: one of its own, or one that a clip of that length ends with."""
    return sample.companion(LAST) is not None or sample.bucket.frames >= bucket.frames


def _reshaped(source: Sample, name: str, bucket: Bucket, with_last: bool) -> Sample:
    """A sample of a dataset, at the size and length of the validation clips."""
    view = source.views[0]
    if source.bucket != bucket:
        still = not with_last or source.companion(LAST) is not None
        view = replace(view, framing=framing(source.width, source.height, bucket), still=still)
    return replace(source, sample_id=name, bucket=bucket, views=(view,))
