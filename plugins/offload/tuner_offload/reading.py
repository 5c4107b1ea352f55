"""Weights on their way from the files into their masters: the device never sees them whole, nor the host twice."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tuner.model import Network
from tuner_offload.masters import Master, Members, Store, make_master
from tuner_offload.parts import take_apart


class MasterSink:
    """Gathers each group's weights as they are read and makes its master when the last of them has come.

    A quantised weight is taken too, as its quantiser left it. At most the groups that are half read wait beside
    the masters; files hold blocks one after another.

    Arguments
        network: not yet materialised, its Linear layers already the quantiser's where there is one.
        groups: what moves together.
        store: where masters are kept.
    """

    def __init__(self, network: Network, groups: Sequence[Members], store: Store) -> None:
        self._network, self._groups, self._store = network, groups, store
        self._masters: list[Master | None] = [None] * len(groups)
        names = {module: name for name, module in network.module.named_modules()}
        self._waiting = [
            {f"{names[module]}.{name}" for _, module in group for name, _ in module.named_parameters()}
            for group in groups
        ]
        self._group_of = {name: group for group, waiting in enumerate(self._waiting) for name in waiting}

    def take(self, module: nn.Module, name: str, tensor: Tensor) -> bool:
        """Take ``tensor``, plain or quantised, if it belongs to a block that streams."""
        group = self._group_of.get(name)
        if group is None:
            return False
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = on_host(tensor)
        self._waiting[group].discard(name)
        if not self._waiting[group]:
            self._make(group)
        return True

    def finish(self) -> list[Master]:
        """All masters; those whose weights did not come under their own names are made of what the blocks hold."""
        return [self._masters[group] or self._make(group) for group in range(len(self._groups))]

    def _make(self, group: int) -> Master:
        self._masters[group] = master = make_master(self._network, self._groups[group], self._store)
        return master


def on_host(tensor: Tensor) -> nn.Parameter:
    """``tensor`` as a frozen parameter in host memory; itself where it is there, or of a class not known here."""
    parts = take_apart(tensor)
    moved = tensor
    if parts is not None and any(each.device.type != "cpu" for each in parts.tensors):
        moved = parts.build([each.to("cpu") for each in parts.tensors])
    return moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
