"""What an encoder is known by in the cache: a hash over its files, its settings and its version.

Weights are sampled, not read: names, dtypes and shapes of all tensors, and the first and last bytes of each.
That is about two megabytes for a text encoder of eleven gigabytes, and any training step changes it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO

from tuner.errors import ModelError
from tuner.files import sha256_of
from tuner.model import Component

SAMPLED = 4096
"""Bytes read at either end of each tensor."""


def fingerprint(name: str, component: Component) -> str:
    """A hexadecimal hash of all that decides a component's output. File names count, their folders do not.

    Raises ModelError when one of its files is missing or is no safetensors file.
    """
    digest = hashlib.sha256()
    parts = [name, str(component.version), json.dumps(dict(component.settings), sort_keys=True)]
    try:
        for path in sorted(component.files, key=lambda each: (each.name, str(each))):
            content = _weights(path) if path.suffix == ".safetensors" else sha256_of(path)
            parts += [path.name, content]
    except FileNotFoundError as error:
        raise ModelError(f"a file of the {name} is missing", where=error.filename) from error
    digest.update("\x1f".join(parts).encode())
    return digest.hexdigest()


def _weights(path: Path) -> str:
    """Hash of a safetensors file's header and the ends of each tensor."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        try:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            for name in sorted(tensors):
                digest.update(f"{name}\x1f{tensors[name]['dtype']}\x1f{tensors[name]['shape']}\x1f".encode())
                _sample(file, digest, 8 + length, *tensors[name]["data_offsets"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError("not a safetensors file", where=path, remedy="download it again") from error
    return digest.hexdigest()


def _sample(file: IO[bytes], digest: hashlib._Hash, base: int, begin: int, end: int) -> None:
    """Feed the first and the last bytes of one tensor to the hash; the whole of a small one."""
    file.seek(base + begin)
    digest.update(file.read(min(SAMPLED, end - begin)))
    tail = max(begin + SAMPLED, end - SAMPLED)
    if tail < end:
        file.seek(base + tail)
        digest.update(file.read(end - tail))
