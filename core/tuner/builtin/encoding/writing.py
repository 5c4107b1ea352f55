"""Writing entries of the cache in a thread, while the next ones are encoded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore
from types import TracebackType

from torch import Tensor

from tuner.builtin.encoding.stamps import Stamp
from tuner.builtin.encoding.store import Store

STAMP_EVERY = 64


class Writer:
    """A context in which entries are written behind the caller's back: when it ends, all are on the disk.

    The first error is raised by the next :meth:`write`, or at the end; nothing more is written after it. Where the
    block itself fails, what was handed over before is still written.
    """

    def __init__(self, waiting: int) -> None:
        """At most ``waiting`` entries are held in memory; whoever brings more has to wait."""
        self._room = BoundedSemaphore(waiting)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache-writer")
        self._error: Exception | None = None
        self._stamps: dict[Path, dict[str, Stamp]] = defaultdict(dict)

    def write(self, store: Store, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Hand over one entry (see :meth:`Store.write`). Raises what went wrong with an earlier one."""
        held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self._room.acquire()
        self._raise()
        self._thread.submit(self._write, store, key, held, dict(metadata))

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        for root in list(self._stamps):
            self._record(root)
        if error is None:
            self._raise()

    def _write(self, store: Store, key: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        try:
            if self._error is None:
                store.write(key, tensors, metadata)
                self._remember(store, key)
        except Exception as error:
            self._error = error
        finally:
            self._room.release()

    def _remember(self, store: Store, key: str) -> None:
        stamp = store.stamp(key)
        if stamp is not None:
            self._stamps[store.root][key] = stamp
        if len(self._stamps[store.root]) >= STAMP_EVERY:
            self._record(store.root)

    def _record(self, root: Path) -> None:
        Store(root).stamps.record(self._stamps.pop(root))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
