"""What kind of file a path is, by its name."""

from __future__ import annotations

import mimetypes
from pathlib import Path


def is_picture(path: Path) -> bool:
    """Whether a file is a picture, by its name."""
    return content_type(path).startswith("image/")


def is_shown(path: Path) -> bool:
    """Whether a file is a picture or a video, by its name."""
    return content_type(path).startswith(("image/", "video/"))


def content_type(path: Path) -> str:
    """The MIME type that a file's name says."""
    return mimetypes.guess_type(path.name)[0] or "application/octet-stream"
