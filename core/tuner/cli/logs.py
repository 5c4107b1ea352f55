"""Where the log lines of a command go: to standard error, above whatever progress bar stands there."""

from __future__ import annotations

import logging
import os

NOISY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Libraries that warn, when they are imported, of what no run here uses."""


class ConsoleLines(logging.Handler):
    """One plain line per record; warnings and errors say what they are."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record through the console that progress bars use, so that neither garbles the other."""
        from tuner.console import console

        label = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        console().print(label + self.format(record), markup=False, highlight=False, soft_wrap=True)


def show_log() -> None:
    """Show what tuner logs from INFO up, in the first of several processes; other libraries keep Python's own rule."""
    log = logging.getLogger("tuner")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not any(isinstance(handler, ConsoleLines) for handler in log.handlers):
        log.addHandler(ConsoleLines())
        log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
        log.propagate = False
