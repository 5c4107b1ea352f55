"""Asks the hub source, in a process of its own: the hub's package reads its settings once, when it is imported.

Standard input: a JSON list of requests, each an object with ``keys`` and, if wanted, ``dataset_type``,
``suffixes`` and ``folder``. Standard output: for each the listing, or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tuner.builtin.sources.hub import HubSource
from tuner.config import faults
from tuner.data.source import Request
from tuner.errors import TunerError


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The listing of one request, as JSON has it."""
    source = HubSource()
    try:
        own = faults.build(source.keys, request["keys"])
        entry = {"dataset_type": request.get("dataset_type", "video")}
        suffixes = frozenset(request.get("suffixes", [".mp4"]))
        listing = source.listing(Request("d", entry, own, suffixes, Path(request["folder"]), show_progress=False))
    except TunerError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {
        "root": str(listing.root),
        "files": [each.path[len(str(listing.root)) + 1 :] for each in listing.files],
        "captions": {path[len(str(listing.root)) + 1 :]: list(each) for path, each in listing.captions.items()},
        "notes": list(listing.notes),
    }


if __name__ == "__main__":
    print(json.dumps([answer(each) for each in json.load(sys.stdin)]))
