"""``type: fsspec`` and ``type: aws``: a folder behind an address, mirrored."""

from __future__ import annotations

from typing import Any, cast

from tuner.builtin.sources.credentials import resolved
from tuner.builtin.sources.keys import AddressKeys, BucketKeys
from tuner.builtin.sources.mirror import mirrored
from tuner.data.source import Listing, Request
from tuner.errors import ConfigError
from tuner.plugin import PluginConfig


class AddressSource:
    """Files at ``instance_data_dir``, an address that fsspec reads."""

    keys: type[PluginConfig] = AddressKeys

    def listing(self, request: Request) -> Listing:
        """The files, fetched. Raises ConfigError or DataError."""
        address = str(request.entry.get("instance_data_dir") or "")
        if "://" not in address:
            raise ConfigError(
                f"dataset {request.dataset_id!r} of type fsspec needs an address at instance_data_dir",
                allowed="such as s3://bucket/folder",
                remedy="write the address, or `type: local` for a folder of this machine",
            )
        keys = cast("AddressKeys", request.keys)
        return mirrored(address, resolved(keys.storage_options, "storage_options"), request)


class BucketSource:
    """Files in an S3 bucket."""

    keys: type[PluginConfig] = BucketKeys

    def listing(self, request: Request) -> Listing:
        """The files, fetched. Raises ConfigError or DataError."""
        keys = cast("BucketKeys", request.keys)
        address = f"s3://{keys.aws_bucket_name}/{keys.aws_data_prefix.strip('/')}".rstrip("/")
        return mirrored(address, bucket_options(keys), request)


def bucket_options(keys: BucketKeys) -> dict[str, Any]:
    """The keys as s3fs has them. Raises ConfigError for half a login, or a variable that is not set."""
    login = {"aws_access_key_id": keys.aws_access_key_id, "aws_secret_access_key": keys.aws_secret_access_key}
    given = resolved({name: value for name, value in login.items() if value is not None}, "")
    if len(given) == 1:
        raise ConfigError(
            "aws_access_key_id and aws_secret_access_key belong together",
            remedy="give both, or neither to use the machine's own login",
        )
    client = {"region_name": keys.aws_region_name, "endpoint_url": keys.aws_endpoint_url}
    options: dict[str, Any] = {name: value for name, value in client.items() if value is not None}
    options = {"client_kwargs": options} if options else {}
    if given:
        options |= {"key": given["aws_access_key_id"], "secret": given["aws_secret_access_key"]}
    return options
