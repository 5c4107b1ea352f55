"""The device side of a run: Hugging Face Accelerate for devices and processes, our own autocast.

Accelerate's own mixed precision wraps the network's forward and would change validation, so it is told
``no`` and autocast is entered around ``compute_loss`` instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from tuner import processes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tuner.run import Run

DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}


class Engine:
    """Devices and precision of this process."""

    def __init__(self, run: Run) -> None:
        """Take a device, and tell ``run``. Several processes are connected already (``tuner.processes``)."""
        from accelerate import Accelerator

        # Without being told, Accelerate takes every process on a machine without a GPU for the only one.
        cpu = processes.launched()[1] > 1 and not torch.accelerator.is_available()
        self.accelerator: Accelerator = Accelerator(mixed_precision="no", device_placement=False, cpu=cpu)
        self.device: torch.device = self.accelerator.device
        self.dtype = DTYPES[run.config.mixed_precision]
        self.mixed = run.config.mixed_precision != "no"
        run.place(self.device, self.dtype, self.accelerator.process_index, self.accelerator.num_processes)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Mixed precision as configured, for a forward (never around an optimizer step)."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.mixed):
            yield

    def peak_memory(self) -> int | None:
        """Bytes of device memory at the peak so far, where the device counts them."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
