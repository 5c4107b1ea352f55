"""Gradients of weights that stream: they go to the host, where the weights live and the optimizer works."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from tuner_offload.host import host_buffer
from tuner_offload.masters import Master
from tuner_offload.transfer import Copier


class HostGradients:
    """Brings the gradients of one master's trained parameters to the host as soon as backward has each of them.

    The device holds a gradient only until it is copied. Further micro-batches are added in place. What is here is
    complete once :meth:`tuner_offload.transfer.Copier.finish` was called.
    """

    def __init__(self, master: Master, copier: Copier, *, pinned: bool) -> None:
        self._master, self._copier, self._pinned = master, copier, pinned
        self._places: Sequence[Tensor] = ()

    def watch(self, index: int, leaf: Tensor) -> None:
        """Make ``leaf``, which stands for entry ``index`` on the device, trained, and collect its gradients."""
        leaf.requires_grad_(True)
        leaf.register_post_accumulate_grad_hook(partial(self._collect, index))

    def _collect(self, index: int, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        host = self._master.values[index]
        if host.grad is None:
            target = self._place(index)
            self._copier.collect(target, gradient, add=False)
            host.grad = target
        else:
            self._copier.collect(host.grad, gradient, add=True)
        # Whoever asked to be told of the parameter's gradient, such as an optimizer that steps in backward.
        hooks = host._post_accumulate_grad_hooks  # type: ignore[attr-defined]
        if hooks:
            self._copier.finish()
            for hook in tuple(hooks.values()):
                hook(host)

    def _place(self, index: int) -> Tensor:
        """Memory for the gradient of entry ``index``, laid out as the master is."""
        if not self._places:
            buffer = host_buffer(self._master.nbytes, pinned=self._pinned)
            self._places = [entry.pieces[0].view(buffer) for entry in self._master.entries]
        return self._places[index]
