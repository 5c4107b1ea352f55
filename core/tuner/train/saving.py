"""Writing checkpoints while training goes on.

What a checkpoint holds is copied to the host first, then written, flushed, sealed and renamed in a thread. At most
one is on its way: the next waits for it. Where the host has no room for the copy, training waits instead.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tuner import processes, sharded
from tuner.train import checkpoint, state

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.train.session import Session

ROOM = 2
"""The copy is made where the host has this many times its size free."""

KEPT_BYTES = 2**30
"""Copies no larger than this stay in memory, for the next checkpoint."""


class Saving:
    """The checkpoint that is being written, if there is one."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._writing: _Writing | None = None
        self._copies: dict[str, state.Contents] = {}

    def start(self) -> Path:
        """Begin the checkpoint of this step; gives its folder, which is there when :meth:`finish` has returned.

        Raises CheckpointError when it, or the one before it, cannot be written.
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
            session.export_into(directory)
            try:
                sharded.write(directory, parts or {})
            except OSError as error:
                raise checkpoint.write_error(target, error) from error
            if not run.is_main:
                return target
            apart = psutil.virtual_memory().available > ROOM * sum(each.nbytes for each in contents.values())
            if apart:
                contents = {name: each.copied(self._copies.get(name)) for name, each in contents.items()}
                small = sum(each.nbytes for each in contents.values()) <= KEPT_BYTES
                self._copies = contents if small else {}
            self._writing = _Writing(target, directory, contents, sealing.pop_all())
        self._writing.start()
        if not apart:
            self.finish()
        return target

    def look(self) -> None:
        """Tell the plugins of a checkpoint that has come to the disk meanwhile. Raises what went wrong with it."""
        if self._writing is not None and not self._writing.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait until it is on the disk, then prune older ones and tell the plugins. Raises what went wrong with it."""
        done, self._writing = self._writing, None
        if done is None:
            return
        done.join()
        if done.error is not None:
            raise done.error
        run = self._session.run
        for path in checkpoint.prune(run.output_dir, run.config.checkpoints_total_limit):
            run.log.info("removed %s (checkpoints_total_limit %d)", path, run.config.checkpoints_total_limit)
        self._session.manager.notify("on_checkpoint", run=run, checkpoint=done.target)

    def abandon(self) -> None:
        """Wait until it is on the disk, or not: something else has gone wrong already."""
        if self._writing is not None:
            self._writing.join()


class _Writing(threading.Thread):
    """One checkpoint on its way; ``error`` says what went wrong. A daemon: who leaves at once does not wait for it."""

    def __init__(
        self, target: Path, directory: Path, contents: Mapping[str, state.Contents], sealing: ExitStack
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.target = target
        self.error: BaseException | None = None
        self._directory, self._contents, self._sealing = directory, contents, sealing

    def run(self) -> None:
        """Write the files and seal the folder."""
        try:
            with self._sealing:
                state.write_all(self._directory, self._contents)
        except BaseException as error:
            self.error = error
        self._contents = {}
