"""What is encoded: the names of the cache's entries, and reading them.

Filling the cache is the answer of the hook ``fill_cache``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tuner.builtin.encoding.fingerprint import fingerprint
from tuner.builtin.encoding.masks import mask_keys, read_mask
from tuner.builtin.encoding.store import Store, make_key
from tuner.data.cached import EMPTY_CAPTION, Mask
from tuner.data.samples import Dataset, Prepared, Sample, View
from tuner.model import EncodeKind, Model
from tuner.spec import ModelSpec

ENCODING = 2
"""Bumped by hand when decoding, framing or the layout of entries changes what is stored (see the golden test)."""


@dataclass(frozen=True)
class Encodings:
    """The samples that are encoded, and their encodings."""

    prepared: Prepared
    """what was prepared, without the samples that could not be encoded; its report names them"""
    encoded: int
    """entries made now, in all processes"""
    rebuilt: int
    """of these, entries that were there but damaged"""
    text_keys: dict[str, str]
    video_keys: dict[tuple[str, int], str]
    """by sample id and number of the view"""
    mask_keys: dict[tuple[str, int], str] = field(default_factory=dict)
    """the same, of those that have a mask"""
    image_keys: dict[tuple[str, int], str] = field(default_factory=dict)
    """the same, of those whose frames are embedded"""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples that are trained on."""
        return self.prepared.samples

    @property
    def datasets(self) -> Mapping[str, Dataset]:
        """What holds for the samples of each dataset alike."""
        return self.prepared.datasets

    def text(self, caption: str) -> dict[str, Tensor]:
        """The encoding of a caption: tensors whose first axis is its true length.

        Raises KeyError for a caption that was not asked for, DataError for a damaged entry.
        """
        return Store(self.prepared.text_cache).read(self.text_keys[caption])

    def video(self, sample: Sample, view: int = 0) -> dict[str, Tensor]:
        """The encoding of a clip's view: ``latents`` (C, F', h, w) and whatever else the family stores."""
        stored = Store(sample.cache).read(self.video_keys[sample.sample_id, view])
        key = self.image_keys.get((sample.sample_id, view))
        if key is None or sample.image_cache is None:
            return stored
        return stored | Store(sample.image_cache).read(key)

    def mask(self, sample: Sample, view: int = 0) -> Mask | None:
        """The mask of a clip's view, where it has one."""
        key = self.mask_keys.get((sample.sample_id, view))
        return None if key is None else read_mask(Store(sample.cache), key)


def text_key(caption: str, encoder: str) -> str:
    """The name of a caption's entry. ``encoder``: the fingerprints of the components."""
    return make_key("text", ENCODING, encoder, caption)


def video_key(sample: Sample, view: View, encoder: str, given: Iterable[str] = ()) -> str:
    """The name of the entry of a clip's view: its content, what is taken of it, the encoder; not where it lies.

    ``given``: what says what else is encoded beside its latents.
    """
    return make_key("video", ENCODING, encoder, sample.content_hash, sample.bucket, view, *given)


def image_key(sample: Sample, view: View, encoder: str, roles: Sequence[str]) -> str:
    """The name of the entry of the embeddings of a view's frames of these ``roles``."""
    frames = (sample.content_hash, sample.bucket, view, *roles, *_frame_files(sample, roles))
    return make_key("conditioning", ENCODING, encoder, *frames)


def _given(sample: Sample, spec: ModelSpec) -> list[str]:
    """What decides what the denoiser is given beside the text: nothing where it is given nothing."""
    return [] if spec.condition == "none" else [spec.condition, *_frame_files(sample, spec.frames_taken)]


def _frame_files(sample: Sample, roles: Iterable[str]) -> list[str]:
    """The files that stand in the place of the clip's own frames."""
    return [f"{role} {file.content_hash}" for role in roles if (file := sample.companion(role)) is not None]


class Keys(NamedTuple):
    """The names of all entries that a run reads."""

    text: dict[str, str]
    """by caption"""
    video: dict[tuple[str, int], str]
    """by sample id and number of the view"""
    mask: dict[tuple[str, int], str]
    """the same, of those that have a mask"""
    image: dict[tuple[str, int], str]
    """the same, of those whose frames are embedded"""


def entry_keys(model: Model, prepared: Prepared, extra_captions: Iterable[str] = ()) -> Keys:
    """The names of all entries for these samples and captions; no weights are loaded, but sampled for a fingerprint."""
    spec, samples = model.spec, prepared.encoded
    captions = [caption for sample in samples for caption in sample.captions]
    text, video = _encoder(model, "text"), _encoder(model, "video")
    image = _encoder(model, "conditioning") if spec.conditioning_frames else ""
    views = [(sample, index, view) for sample in samples for index, view in enumerate(sample.views)]
    return Keys(
        {caption: text_key(caption, text) for caption in [*captions, EMPTY_CAPTION, *extra_captions]},
        {(each.sample_id, at): video_key(each, view, video, _given(each, spec)) for each, at, view in views},
        mask_keys(samples, spec),
        {
            (each.sample_id, at): image_key(each, view, image, spec.conditioning_frames)
            for each, at, view in views
            if each.image_cache is not None
        },
    )


def entries_in_use(prepared: Prepared, keys: Keys) -> dict[Path, set[str]]:
    """The keys that are in use by root of the store, for every folder that may hold entries of these datasets."""
    used: dict[Path, set[str]] = defaultdict(set)
    for root in (*prepared.caches, prepared.text_cache):
        used[root.resolve()] = set()
    used[prepared.text_cache.resolve()].update(keys.text.values())
    for sample in prepared.encoded:
        views = [(sample.sample_id, index) for index in range(len(sample.views))]
        # What is not named here is pruned.
        images = sample.image_cache or sample.cache
        for kind, store in ((keys.video, sample.cache), (keys.mask, sample.cache), (keys.image, images)):
            used[store.resolve()].update(kind[view] for view in views if view in kind)
    return dict(used)


def _encoder(model: Model, kind: EncodeKind) -> str:
    """The fingerprints of the components of one kind, as one text."""
    return "/".join(fingerprint(name, model.components[name]) for name in model.spec.encoders[kind])
