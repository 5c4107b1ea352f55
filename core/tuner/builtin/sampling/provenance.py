"""What a clip was rendered with, as far as the config says it: enough to tell two bases apart, and no folder names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.run import Run
    from tuner.spec import ModelSpec

COMPUTED = (
    "mixed_precision",
    "base_model_precision",
    "base_model_default_dtype",
    "text_encoder_1_precision",
    "attention_mechanism",
    "attention_usage",
    "revision",
    "pretrained_transformer_subfolder",
)
"""Core keys beside the sampler's that change what is rendered."""
PLACE = "_name_or_path"
"""What keys that say where weights lie end with."""
SAMPLES, SAMPLE_BYTES = 9, 1 << 16
"""Places of a weight file that are looked at, and how much of each."""


def model_record(run: Run, spec: ModelSpec) -> dict[str, Any]:
    """The model, where its weights came from, and what else decides what it computes."""
    own = run.plugins[spec.family].config if spec.family in run.plugins else None
    places = [(name, value) for config in (run.config, own) if config is not None for name, value in config]
    family = {} if own is None else own.model_dump(mode="json", exclude_defaults=True)
    return {
        "family": spec.family,
        "flavour": spec.flavour,
        "base": spec.public_base,
        "weights": {name: _weights(str(value)) for name, value in places if name.endswith(PLACE) and value},
        "keys": {name: getattr(run.config, name) for name in COMPUTED if getattr(run.config, name) is not None}
        | {name: value for name, value in family.items() if not name.endswith(PLACE)},
    }


def _weights(value: str) -> str | dict[str, str]:
    """A hub repository as it is; of a file or folder its name and a hash of parts of its weights."""
    path = Path(value).expanduser()
    if not path.exists():
        return value
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as content:
            for number in range(SAMPLES):
                content.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                digest.update(content.read(SAMPLE_BYTES))
    return {"name": path.name, "sampled_sha256": digest.hexdigest()}
