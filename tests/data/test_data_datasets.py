"""The list of datasets: users' files pass, and everything wrong in one is said at once, with its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tuner.builtin.data_report.table import lines
from tuner.builtin.datasets.prepare import prepare
from tuner.builtin.datasets.reading import read_datasets
from tuner.config.keys import CoreConfig
from tuner.data.samples import Bucket
from tuner.data.source import Listing, Request
from tuner.errors import ConfigError, ConfigErrors, DataError, TunerError
from tuner.plugin import PluginConfig, key
from tuner.spec import ModelSpec

USERS_FILE = """[
  {
    "id": "disney-black-and-white",
    "type": "local",
    "dataset_type": "video",
    "crop": false,
    "resolution": 480,
    "minimum_image_size": 480,
    "maximum_image_size": 480,
    "target_downsample_size": 480,
    "resolution_type": "pixel_area",
    "cache_dir_vae": "cache/vae/wan/disney-black-and-white",
    "instance_data_dir": "datasets/disney-black-and-white",
    "disabled": false,
    "caption_strategy": "textfile",
    "metadata_backend": "discovery",
    "repeats": 0,
    "video": {
        "num_frames": 75,
        "min_frames": 75
    }
  },
  {
    "id": "text-embeds",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": true,
    "cache_dir": "cache/text/wan",
    "disabled": false,
    "write_batch_size": 128
  }
]
"""
VIDEO: dict[str, Any] = {"id": "v", "dataset_type": "video", "instance_data_dir": "clips", "video": {"num_frames": 9}}
TEXT: dict[str, Any] = {"id": "t", "dataset_type": "text_embeds", "default": True}
IMAGES: dict[str, Any] = {"id": "disney-conditioning", "type": "local", "dataset_type": "conditioning_image_embeds"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()


def core(*entries: dict[str, Any], **keys: Any) -> CoreConfig:
    return CoreConfig(data_backend_config=list(entries), **keys)


def message(*entries: dict[str, Any]) -> str:
    with pytest.raises(TunerError) as caught:
        read_datasets(core(*entries))
    return str(caught.value)


def test_a_users_file_passes_unchanged() -> None:
    Path("datasets/disney-black-and-white").mkdir(parents=True)
    Path("multidatabackend.json").write_text(USERS_FILE)
    read = read_datasets(CoreConfig(data_backend_config=Path("multidatabackend.json")))
    (video,) = read.trained
    assert (video.resolution, video.video.num_frames, video.video.min_frames, video.repeats) == (480, 75, 75, 0)
    assert video.cache_dir_vae == Path("cache/vae/wan/disney-black-and-white")
    assert read.text.cache_dir == Path("cache/text/wan")


def test_a_users_file_with_real_clips_gives_samples(spec: ModelSpec) -> None:
    folder = Path("datasets/disney-black-and-white")
    folder.mkdir(parents=True)
    for name, frames, width in [("long enough", 76, 640), ("too short", 74, 640), ("too small", 75, 320)]:
        (folder / f"{name}.txt").write_text("a mouse whistles\n")
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            video = container.add_stream("mpeg4", rate=16)
            video.width, video.height, video.pix_fmt = width, 480, "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.zeros((480, width, 3), np.uint8), "rgb24")
            for index in range(frames):
                frame.pts = index
                container.mux(video.encode(frame))
            container.mux(video.encode())
    Path("multidatabackend.json").write_text(USERS_FILE)
    prepared = prepare(CoreConfig(data_backend_config=Path("multidatabackend.json")), replace(spec, size_multiple=16))
    (sample,) = prepared.samples
    assert sample.bucket == Bucket(73, 416, 560)
    assert prepared.report.datasets[0].reasons == {"too short": 1, "too small": 1}
    said = "\n".join(lines(prepared.report))
    assert "num_frames 75 becomes 73" in said
    assert "do nothing without `crop: true`" in said


def test_image_to_video_entries_pass() -> None:
    video = VIDEO | {
        "conditioning_image_embeds": "disney-conditioning",
        "cache_dir_conditioning_image_embeds": "cache/conditioning_image_embeds/v",
    }
    assert read_datasets(core(video, TEXT, IMAGES)).image_embeds[0].id == "disney-conditioning"


def test_values_as_people_write_them() -> None:
    video = VIDEO | {"crop": "true", "resolution": "480", "repeats": 2.0, "video": {"num_frames": "75"}}
    (read,) = read_datasets(core(video, TEXT)).trained
    assert (read.crop, read.resolution, read.repeats, read.video.num_frames) == (True, 480, 2, 75)


def test_what_an_entry_leaves_out_comes_from_the_core_keys() -> None:
    read = read_datasets(core(VIDEO, TEXT, resolution=0.25, resolution_type="area", minimum_image_size=0.1))
    (video,) = read.trained
    assert (video.resolution, video.resolution_type, video.minimum_image_size) == (0.25, "area", 0.1)
    assert video.cache_dir_vae == Path("output/cache/vae/v")
    own = read_datasets(core(VIDEO | {"resolution": 64, "resolution_type": "pixel"}, TEXT, resolution=480)).trained[0]
    assert (own.resolution, own.resolution_type) == (64, "pixel")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolutoin": 480}, ["resolutoin", "did you mean 'resolution'", "entry 1", "'v'"]),
        ({"video": {"num_frame": 9}}, ["num_frame", "num_frames"]),
        ({"repeats": "many"}, ["repeats", "many"]),
        ({"repeats": -1}, ["repeats", "-1"]),
        ({"caption_strategy": "text"}, ["caption_strategy", "textfile"]),
        ({"dataset_type": "vidoe"}, ["vidoe", "did you mean 'video'"]),
        ({"type": "attic"}, ["'attic'", "does not exist", "local"]),
        ({"caption_strategy": "instanceprompt"}, ["caption_strategy instanceprompt needs an instance_prompt"]),
        ({"only_instance_prompt": True}, ["only_instance_prompt needs an instance_prompt"]),
        ({"prepend_instance_prompt": True, "instance_prompt": " "}, ["prepend_instance_prompt needs"]),
        ({"conditioning_image_embeds": "nothing"}, ["nothing", "no enabled entry"]),
        ({"text_embeds": "tt"}, ["text_embeds names 'tt'", "no enabled entry"]),
        ({"conditioning_data": "masks"}, ["conditioning_data names 'masks'", "no enabled conditioning entry"]),
        ({"conditioning_data": "t"}, ["'t'", "dataset_type text_embeds, not conditioning"]),
        ({"video": {"num_frames": 9, "min_frames": 20, "max_frames": 10}}, ["min_frames 20", "max_frames 10"]),
        ({"video": {"frame_buckets": []}}, ["video.frame_buckets", "at least one"]),
        ({"video": {"frame_buckets": [17, 0]}}, ["video.frame_buckets", "at least one frame"]),
        ({"crop": True, "crop_aspect": "closest"}, ["crop_aspect closest needs crop_aspect_buckets"]),
        ({"crop": True, "crop_aspect": "random"}, ["crop_aspect random needs crop_aspect_buckets"]),
        ({"crop_aspect_buckets": [1.0, -1]}, ["crop_aspect_buckets", "above 0"]),
        ({"minimum_aspect_ratio": 2, "maximum_aspect_ratio": 0.5}, ["2 is above maximum_aspect_ratio 0.5"]),
        ({"start_epoch": 5, "end_epoch": 4}, ["start_epoch 5 is after end_epoch 4"]),
        ({"start_step": 100, "end_step": 100}, ["start_step 100 is not before end_step 100"]),
        ({"probability": 0}, ["probability", "> 0"]),
        ({"metadata_backend": "parquet"}, ["metadata_backend parquet", '"type": "parquet" and "manifest"']),
        ({"caption_strategy": "csv"}, ["caption_strategy csv", '"type": "csv" and "manifest"']),
        ({"parquet": {"path": "t.parquet"}}, ["no key 'parquet'", '"type": "parquet" and "manifest"']),
        ({"data_dir": "elsewhere"}, ["data_dir is another name of instance_data_dir", "both"]),
        ({"default": True}, ["no key 'default'", "a key of dataset_type text_embeds"]),
        ({"instance_data_dir": "elsewhere"}, ["elsewhere", "does not exist"]),
        ({"instance_data_dir": "file.mp4"}, ["file.mp4", "is no folder"]),
        ({"instance_data_dir": None}, ["instance_data_dir is missing"]),
        ({"instance_data_dir": "s3://bucket/clips"}, ["'s3://bucket/clips'", "'fsspec'"]),
        ({"dataset_type": "image_embeds"}, ["image_embeds", "take the entry out", "cache_dir_vae"]),
        ({"dataset_type": "caption"}, ["caption", "take the entry out", "caption_strategy"]),
        ({"dataset_type": "distillation_cache"}, ["distillation_cache", "take the entry out"]),
        ({"dataset_type": "audio"}, ["audio", "take the entry out"]),
        ({"disabled": True}, ["no dataset to train on is enabled"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_one_clear_error(change: dict[str, Any], words: list[str]) -> None:
    Path("file.mp4").touch()
    text = message(VIDEO | change, TEXT)
    assert text.count("where:") == 1, "one error, not several"
    for word in words:
        assert word in text


MASKS: dict[str, Any] = {"id": "masks", "dataset_type": "conditioning", "instance_data_dir": "masks"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([VIDEO | {"conditioning_data": "mask"}, MASKS], ["names 'mask'", "did you mean 'masks'"]),
        (
            [VIDEO | {"conditioning_data": "masks"}, MASKS | {"disabled": True}],
            ["names 'masks'", "it is disabled", "`disabled: false`"],
        ),
        (
            [VIDEO | {"conditioning_data": ["masks", "more"]}, MASKS, MASKS | {"id": "more"}],
            ["two entries", "masks, more"],
        ),
        (
            [
                VIDEO | {"conditioning_data": ["masks", "parts"]},
                MASKS,
                MASKS | {"id": "parts", "conditioning_type": "segmentation"},
            ],
            ["two entries", "mask or segmentation"],
        ),
        ([VIDEO, MASKS | {"instance_data_dir": "gone"}], ["'masks'", "does not exist: gone"]),
        ([VIDEO, {"id": "masks", "dataset_type": "conditioning"}], ["instance_data_dir is missing", "'masks'"]),
        ([VIDEO, IMAGES | {"type": "cloud"}], ["conditioning_image_embeds is a local folder"]),
        (
            [VIDEO, VIDEO | {"id": "e", "dataset_type": "eval", "is_regularization_data": True}],
            ["is_regularisation_data", "'e'"],
        ),
        ([VIDEO | {"dataset_type": "eval"}], ["no dataset to train on"]),
        ([{"id": "p", "instance_data_dir": "clips", "video": {}}], ["no key 'video'", "dataset_type video, eval"]),
        ([VIDEO | {"type": "cloud", "buckett": "b"}], ["no key 'buckett'", "did you mean 'bucket'"]),
        ([VIDEO | {"bucket": "b"}], ["no key 'bucket'", "a key of type cloud"]),
        ([VIDEO | {"type": "cloud", "bucket": []}], ["bucket cannot be []"]),
    ],
)
def test_one_clear_error_between_entries(entries: list[dict[str, Any]], words: list[str]) -> None:
    Path("masks").mkdir()
    with pytest.raises(TunerError) as caught:
        read_datasets(core(*entries, TEXT), {"cloud": Cloud()})
    text = str(caught.value)
    assert text.count("where:") == 1, "one error, not several"
    for word in words:
        assert word in text


class CloudKeys(PluginConfig):
    """What an entry of the test's source has."""

    bucket: str = key("", "Its name.", aliases=("cloud_bucket",))


class Cloud:
    """A source with a key of its own."""

    keys = CloudKeys

    def listing(self, request: Request) -> Listing:
        raise NotImplementedError


def test_a_source_reads_its_own_keys_by_other_tools_names_too() -> None:
    read = read_datasets(core(VIDEO | {"type": "cloud", "cloud_bucket": "b"}, TEXT), {"cloud": Cloud()})
    assert read.source_keys["v"] == CloudKeys(bucket="b")


def test_the_same_folder_twice_with_other_settings() -> None:
    read = read_datasets(core(VIDEO, VIDEO | {"id": "w", "resolution": 320}, TEXT))
    assert [each.resolution for each in read.trained] == [480, 320]
    assert read.notes == ()


def test_an_entry_without_a_type_is_of_pictures_and_a_file_address_is_a_folder() -> None:
    address = f"file://{Path('clips').resolve()}"
    (read,) = read_datasets(core({"id": "p", "data_dir": address}, TEXT)).trained
    assert (read.dataset_type, read.type) == ("image", "local")
    assert read.instance_data_dir == str(Path("clips").resolve())


def test_the_entry_is_named_by_file_place_and_id() -> None:
    Path("list.json").write_text(json.dumps([TEXT, VIDEO | {"crpo": 1}]))
    with pytest.raises(ConfigError, match=r"list\.json, entry 2 \(id 'v'\)"):
        read_datasets(CoreConfig(data_backend_config=Path("list.json")))


def test_text_embeds_have_exactly_one_default() -> None:
    assert "no entry" in message(VIDEO)
    assert "no entry" in message(VIDEO, TEXT | {"default": False})
    assert "2 entries (t, u)" in message(VIDEO, TEXT, TEXT | {"id": "u"})


def test_an_id_is_used_once() -> None:
    assert "two entries have the id 'v'" in message(VIDEO, VIDEO | {"disabled": True}, TEXT)


def test_all_faults_are_said_at_once() -> None:
    with pytest.raises(ConfigErrors) as caught:
        read_datasets(core(VIDEO | {"resolutoin": 1}, TEXT | {"defualt": True}))
    assert len(caught.value.errors) == 2


def test_a_disabled_entry_may_be_of_any_kind_and_is_noted() -> None:
    read = read_datasets(core(VIDEO, TEXT, {"id": "later", "dataset_type": "image", "disabled": "true"}))
    assert read.notes == ("dataset 'later' is disabled",)


@pytest.mark.parametrize("word", [True, "true", "True", "yes", "y", "on", 1, 1.0])
def test_disabled_in_any_word_that_means_true(word: Any) -> None:
    gone = VIDEO | {"id": "later", "instance_data_dir": "gone", "disabled": word}
    assert [each.id for each in read_datasets(core(VIDEO, gone, TEXT)).trained] == ["v"]
    assert "disabled cannot be" in message(VIDEO | {"disabled": "perhaps"}, TEXT)


def test_a_missing_folder_is_a_data_error() -> None:
    with pytest.raises(DataError):
        read_datasets(core(VIDEO | {"instance_data_dir": "elsewhere"}, TEXT))


def test_no_list_and_no_file() -> None:
    with pytest.raises(ConfigError, match="data_backend_config is not set"):
        read_datasets(CoreConfig())
    with pytest.raises(ConfigError, match="does not exist"):
        read_datasets(CoreConfig(data_backend_config=Path("missing.json")))
    Path("object.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a list"):
        read_datasets(CoreConfig(data_backend_config=Path("object.json")))
