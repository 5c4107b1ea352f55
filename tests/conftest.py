"""Every test: no network, no settings of whoever runs it, no deadlines, GPU tests only where there is one."""

from __future__ import annotations

import gc
import os
import signal

import pytest
from hypothesis import settings

# Set while collecting, before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The last one: without compiled modules each of a few hundred processes would compile ours anew.
for _setting in ("TRAINER_EXTRA_ARGS", "WAN_FEED_FORWARD_CHUNK_SIZE", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(_setting, None)

# A suite that a shell started in the background ignores SIGINT, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: no later search for garbage goes through it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
