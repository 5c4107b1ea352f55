"""An S3 bucket on a server of this machine, through s3fs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuner.builtin.sources.keys import BucketKeys
from tuner.builtin.sources.remote import bucket_options
from tuner.data.source import Listing
from tuner.errors import ConfigError, DataError

Listed = Callable[..., Listing]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3-compatible server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def login(s3: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The keys of an entry, the secret in the environment."""
    monkeypatch.setenv("TUNER_TEST_SECRET", "a-very-secret-value")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return {
        "aws_bucket_name": "clips",
        "aws_region_name": "us-east-1",
        "aws_endpoint_url": s3,
        "aws_access_key_id": "anna",
        "aws_secret_access_key": "$TUNER_TEST_SECRET",
    }


@pytest.fixture
def bucket(s3: str, clip: bytes) -> Iterator[Any]:
    """A boto3 client with a bucket that holds two clips and a caption; emptied afterwards."""
    import boto3

    client = boto3.client(
        "s3", endpoint_url=s3, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="y"
    )
    client.create_bucket(Bucket="clips")
    for name, content in (("set/a.mp4", clip), ("set/deep/b.mp4", clip), ("set/a.txt", b"a horse"), ("else.mp4", clip)):
        client.put_object(Bucket="clips", Key=name, Body=content)
    yield client
    for each in client.list_objects_v2(Bucket="clips")["Contents"]:
        client.delete_object(Bucket="clips", Key=each["Key"])
    client.delete_bucket(Bucket="clips")


def test_a_prefix_of_a_bucket_is_mirrored_and_followed(
    bucket: Any, login: dict[str, Any], listed: Listed, clip: bytes
) -> None:
    listing = listed("aws", **login, aws_data_prefix="set/")
    paths = [Path(found.path).relative_to(listing.root).as_posix() for found in listing.files]
    assert paths == ["a.mp4", "deep/b.mp4"]
    assert (listing.root / "a.mp4").read_bytes() == clip
    assert (listing.root / "a.txt").read_text() == "a horse"
    before = {found.path: found.mtime_ns for found in listing.files}
    bucket.put_object(Bucket="clips", Key="set/a.mp4", Body=clip[:-1] + b"!")  # the same size, another etag
    again = listed("aws", **login, aws_data_prefix="set/")
    assert (again.root / "a.mp4").read_bytes() == clip[:-1] + b"!"
    after = {found.path: found.mtime_ns for found in again.files}
    changed = {Path(path).name for path in after if after[path] != before[path]}
    assert changed == {"a.mp4"}, "the other one was not fetched again"


def test_the_same_through_an_address(bucket: Any, login: dict[str, Any], listed: Listed) -> None:
    options = bucket_options(BucketKeys(**login))
    listing = listed("fsspec", folder="s3://clips/set", storage_options=options)
    assert [Path(found.path).name for found in listing.files] == ["a.mp4", "b.mp4"]


def test_a_bucket_that_is_not_there(s3: str, login: dict[str, Any], listed: Listed) -> None:
    with pytest.raises(DataError, match=r"s3://nowhere(.|\n)*correct the address") as caught:
        listed("aws", **(login | {"aws_bucket_name": "nowhere"}))
    assert "a-very-secret-value" not in str(caught.value)


def test_half_a_login_is_refused(login: dict[str, Any], listed: Listed) -> None:
    del login["aws_secret_access_key"]
    with pytest.raises(ConfigError, match="belong together"):
        listed("aws", **login)


def test_without_a_login_the_machines_own_is_used() -> None:
    assert bucket_options(BucketKeys(aws_bucket_name="clips")) == {}


def test_without_s3fs_the_extra_is_named(
    login: dict[str, Any], listed: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"s3:// addresses cannot be read(.|\n)*difftuner\[remote\]"):
        listed("aws", **login)


def test_a_login_is_never_shown() -> None:
    keys = BucketKeys(aws_bucket_name="clips", aws_access_key_id="anna", aws_secret_access_key="a-very-secret-value")
    assert "anna" not in repr(keys)
    assert "a-very-secret-value" not in repr(keys)
