"""What an entry may say beside the common keys, by its source."""

from __future__ import annotations

from typing import Any

from tuner.plugin import PluginConfig, key


class AddressKeys(PluginConfig):
    """Keys of `type: fsspec`: what fsspec reads at `instance_data_dir`."""

    storage_options: dict[str, Any] = key(
        {},
        "Options of the file system as fsspec has them (login, endpoint …). A value `$NAME` or `${NAME}` is that "
        "environment variable's.",
        repr=False,
    )


class BucketKeys(PluginConfig):
    """Keys of `type: aws`: files in an S3 bucket."""

    aws_bucket_name: str = key(..., "Name of the bucket.", min_length=1)
    aws_data_prefix: str = key("", "Folder inside the bucket; the whole bucket when empty.")
    aws_region_name: str | None = key(None, "Region of the bucket; what the machine is set to when absent.")
    aws_endpoint_url: str | None = key(None, "Address of another S3-compatible service.")
    aws_access_key_id: str | None = key(
        None, "Login; `$NAME` is that environment variable's. The machine's own login when absent.", repr=False
    )
    aws_secret_access_key: str | None = key(None, "Belongs to `aws_access_key_id`.", repr=False)


class HubKeys(PluginConfig):
    """Keys of `type: huggingface`: a dataset repository of the Hugging Face hub."""

    dataset_name: str = key(..., "The repository, `owner/name`.", min_length=1)
    revision: str | None = key(None, "Branch, tag or commit; `main` when absent.")
    split: str | None = key(None, "Use only this split, such as `train`; all files when absent.")
    video_column: str | None = key(
        None, "Column that holds or names the clips; the first of the usual names when absent."
    )
    image_column: str | None = key(
        None, "Column that holds or names the pictures; the first of the usual names when absent."
    )
    caption_column: str | None = key(
        None, "Column of captions; the first of `caption`, `captions`, `text`, `prompt` when absent."
    )
    allow_patterns: tuple[str, ...] = key(
        (), "Download only what matches one of these, such as `train/*`; media, captions and tables when absent."
    )


class TableKeys(AddressKeys):
    """Keys of `type: csv`, `jsonl`, `parquet` and `manifest`: files listed in a table."""

    manifest: str = key(..., "The table: a path or an address.", aliases=("csv_file",), min_length=1)
    file_column: str | None = key(
        None,
        "Column of paths or addresses; the first of `file_name`, `filename`, `path`, `video`, `image`, `url` that "
        "exists when absent.",
        aliases=("filename_column", "csv_url_column"),
    )
    caption_column: str | None = key(
        None,
        "Column of captions; the first of `caption`, `captions`, `text`, `prompt` that exists when absent. A list "
        "gives alternatives.",
        aliases=("csv_caption_column",),
    )
