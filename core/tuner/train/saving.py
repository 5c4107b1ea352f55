"""Writing checkpoints while training goes on.

A thread copies what a checkpoint holds to the host while the next step goes forward and backward, which change none of
it; that step's optimizer waits for the copies. The thread then writes, flushes, seals and renames the checkpoint, and
prunes older ones. At most one is on its way: the next waits for it. Where the host has no room for the copies, training
waits for all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from tuner import processes, sharded
from tuner.train import checkpoint, state

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.train.session import Session

Files = dict[str, state.Contents]
"""What a checkpoint holds, by name of the file."""

ROOM = 2
"""The copies are made where the host has this many times their size free."""

KEPT_BYTES = 2**30
"""Copies no larger than this stay in memory, for the next checkpoint."""


class Saving:
    """The checkpoint that is being written, if there is one."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._writing: _Writing | None = None
        self._copies: Files = {}

    def start(self) -> Path:
        """Begin the checkpoint of this step; gives its folder, which is there when :meth:`finish` has returned.

        Until ``session.copied`` is set, nobody may change what is trained. Raises CheckpointError when this checkpoint,
        or the one before it, cannot be written.
        """
        self.finish()
        session, run = self._session, self._session.run
        target = checkpoint.folder(run.output_dir, run.step)
        parts: dict[str, Tensor] | None = {} if session.saves_parts else None
        contents = session.contents(parts)
        with ExitStack() as sealing:
            directory = checkpoint.aside(target)
            with processes.together():
                if run.is_main:
                    manifest = {"step": run.step, **session.manifest}
                    directory = sealing.enter_context(checkpoint.writing(target, manifest))
            exports = session.export_into(directory)
            try:
                sharded.write(directory, parts or {})
            except OSError as error:
                raise checkpoint.write_error(target, error) from error
            if not run.is_main:
                return target
            room = psutil.virtual_memory().available > ROOM * sum(each.nbytes for each in contents.values())
            if room:
                # Only the optimizer can be made to wait; a plugin may change its state in any hook.
                self._copy(contents, of_optimizer=False)
            beside = _beside(session.engine.device) if room else None
            self._writing = _Writing(target, partial(self._write, target, contents, beside, exports, sealing.pop_all()))
        session.copied.clear()
        self._writing.start()
        if not room:
            self.finish()
        return target

    def _write(
        self,
        target: Path,
        contents: Files,
        beside: AbstractContextManager[object] | None,
        exports: Sequence[Callable[[], object]],
        sealing: ExitStack,
    ) -> None:
        """Copy what the optimizer changes, unless training waits; write, seal, prune what is superfluous then."""
        run = self._session.run
        with sealing:
            try:
                if beside is not None:
                    with beside:
                        self._copy(contents, of_optimizer=True)
            finally:
                self._session.copied.set()
            for write in exports:
                write()
            state.write_all(checkpoint.aside(target), contents)
        kept = beside is not None and sum(each.nbytes for each in contents.values()) <= KEPT_BYTES
        self._copies = contents if kept else {}
        for path in checkpoint.prune(run.output_dir, run.config.checkpoints_total_limit):
            run.log.info("removed %s (checkpoints_total_limit %d)", path, run.config.checkpoints_total_limit)

    def _copy(self, contents: Files, *, of_optimizer: bool) -> None:
        """Put copies in the place of what only the optimizer changes, or else of the rest."""
        for name, each in contents.items():
            if each.of_optimizer is of_optimizer:
                contents[name] = each.copied(self._copies.get(name))

    def look(self) -> None:
        """Tell the plugins of a checkpoint that has come to the disk meanwhile. Raises what went wrong with it."""
        if self._writing is not None and not self._writing.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait until it is on the disk, then tell the plugins. Raises what went wrong with it."""
        done, self._writing = self._writing, None
        if done is None:
            return
        done.join()
        if done.error is not None:
            raise done.error
        self._session.manager.notify("on_checkpoint", run=self._session.run, checkpoint=done.target)

    def abandon(self) -> None:
        """Wait until it is on the disk, or not: something else has gone wrong already."""
        if self._writing is not None:
            self._writing.join()


class _Writing(threading.Thread):
    """One checkpoint on its way; ``error`` says what went wrong. A daemon: who leaves at once does not wait for it."""

    def __init__(self, target: Path, write: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.target, self._write = target, write
        self.error: BaseException | None = None

    def run(self) -> None:
        """Write it, and let go of what was written."""
        try:
            self._write()
        except BaseException as error:
            self.error = error
        del self._write


def _beside(device: torch.device) -> AbstractContextManager[object]:
    """While entered, copies from ``device`` follow what is queued on it now, and nothing that is queued later."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)
