"""What a checkpoint holds, as safetensors and JSON: trained tensors, optimizer state, plugin state. No pickle."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tuner import sharded
from tuner.errors import CheckpointError
from tuner.model import Network
from tuner.plugin import AnyPlugin
from tuner.run import log
from tuner.train import optimizers
from tuner.train.checkpoint import MANIFEST
from tuner.train.subclasses import put_together, taken_apart

NUMBERS = "numbers"
"""Metadata key of the JSON beside the tensors."""
NESTED = "::"
"""Between the name of a dict in the state of a tensor and a name in it."""
KIND = "kind"
"""Name of the optimizer's class among the numbers of its state."""


def adapter_file(network: str) -> str:
    """Name of the file with a network's trained tensors."""
    return f"adapter.{network}.safetensors"


def optimizer_file(network: str) -> str:
    """Name of the file with a network's optimizer state."""
    return f"optimizer.{network}.safetensors"


def plugin_file(plugin: str) -> str:
    """Name of the file with a plugin's state."""
    return f"plugin.{plugin}.safetensors"


def exports(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that people use elsewhere, sorted: all but what a resume needs."""
    own = re.compile(rf"(adapter|optimizer|plugin)\..+\.safetensors|{MANIFEST}|{sharded.FOLDER}/.*")
    files = (path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if not own.fullmatch(path.relative_to(checkpoint).as_posix()))


@dataclass(frozen=True)
class Contents:
    """What one file of a checkpoint holds."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """JSON values"""
    of_optimizer: bool = False
    """whether only an optimizer's step changes it"""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def copied(self, into: Contents | None = None) -> Contents:
        """The same on the host, in storage that no later step changes: that of ``into``, where it fits."""
        there = {} if into is None else into.tensors
        tensors = {name: _copied(tensor.detach(), there.get(name)) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, numbers=json.loads(json.dumps(self.numbers)))


def _copied(tensor: Tensor, into: Tensor | None) -> Tensor:
    """Memory that was used before is copied to several times faster than new memory."""
    if into is None or into.shape != tensor.shape or into.dtype != tensor.dtype:
        return tensor.to("cpu", copy=True)
    return into.copy_(tensor)


def of_network(
    network: Network, optimizer: torch.optim.Optimizer, parts: dict[str, Tensor] | None = None
) -> dict[str, Contents]:
    """The trained tensors and the optimizer state of ``network``, by name of the file; views of them.

    ``parts`` gets those that are spread over the processes; without it they are put together.
    """
    assert network.adapter is not None
    trained, stepped = adapter_file(network.name), optimizer_file(network.name)
    homes: dict[bool, dict[str, Any]] = {True: {}, False: {KIND: _kind(optimizer)}}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in _flat(values):
            homes[isinstance(value, Tensor)][f"{index}.{name}"] = value
    for index, group in enumerate(optimizer.param_groups):
        for name, value in optimizers.evolved(group).items():
            homes[isinstance(value, Tensor)][f"group.{index}.{name}"] = value
    plain, recipes = taken_apart(sharded.for_file(stepped, homes[True], parts))
    return {
        trained: Contents(_views(sharded.for_file(trained, network.adapter.state(), parts)), of_optimizer=True),
        stepped: Contents(_views(plain), {**homes[False], **recipes}, of_optimizer=True),
    }


def _views(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same memory, also where a parameter is given other memory for the time of a block."""
    return {name: each.detach() for name, each in tensors.items()}


def load_network(network: Network, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Copy trained tensors into the network's own and restore the optimizer.

    Another optimizer than the checkpoint's starts afresh, with a warning: their states mean different things.
    Raises CheckpointError when the checkpoint was made with other trained tensors.
    """
    assert network.adapter is not None
    path = directory / adapter_file(network.name)
    if not path.exists():
        raise CheckpointError(
            f"the checkpoint has no trained tensors for network {network.name!r}",
            where=directory,
            remedy="it belongs to another model: choose another output_dir",
        )
    network.adapter.load({**read(path)[0], **sharded.read(directory, path.name, network.adapter.state().get)})
    tensors, numbers = read(directory / optimizer_file(network.name))
    kind = numbers.pop(KIND, None)
    if kind != _kind(optimizer):
        log.warning("the checkpoint's optimizer is %s, this run's is %s, which starts afresh", kind, _kind(optimizer))
        return
    put_together(tensors, numbers)
    everything = optimizers.parameters(optimizer)
    places = {str(place): parameter for place, parameter in enumerate(everything)}
    parts = sharded.read(directory, optimizer_file(network.name), lambda name: places.get(name.partition(".")[0]))
    state: dict[int, dict[str, Any]] = {}
    groups: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **parts, **numbers}.items():
        index, _, leaf = name.removeprefix("group.").partition(".")
        values = (groups if name.startswith("group.") else state).setdefault(int(index), {})
        nest, _, inner = leaf.partition(NESTED)
        (values.setdefault(nest, {}) if inner else values)[inner or leaf] = value
    current = optimizer.state_dict()
    if groups and max(groups) + 1 != len(current["param_groups"]):
        log.warning("the checkpoint's optimizer has other groups of tensors than this run's, which starts afresh")
        return
    if state and max(state) >= len(everything):
        raise CheckpointError(
            f"the optimizer state is for {max(state) + 1} tensors, and {len(everything)} are trained now",
            where=directory,
            remedy="resume with the adapter settings the run was started with, or choose another output_dir",
        )
    for place, parameter in enumerate(everything):
        for name, value in state.get(place, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[place][name] = sharded.cut_like(value, parameter)
    merged = [{**group, **groups.get(index, {})} for index, group in enumerate(current["param_groups"])]
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of the state of one tensor; some libraries keep a part of it in a dict of its own."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}{NESTED}{inner}", each) for inner, each in value.items())
        else:
            yield name, value


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def of_plugins(plugins: Mapping[str, AnyPlugin], parts: dict[str, Tensor] | None) -> dict[str, Contents]:
    """The state of every plugin that has one, by name of the file; ``parts`` as in :func:`of_network`."""
    contents = {}
    for name, plugin in plugins.items():
        state = plugin.state_dict()
        if state:
            tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            numbers = {key: value for key, value in state.items() if key not in tensors}
            file = plugin_file(name)
            contents[file] = Contents(sharded.for_file(file, tensors, parts), numbers)
    return contents


def load_plugins(plugins: Mapping[str, AnyPlugin], directory: Path, trained: Mapping[str, Tensor]) -> list[str]:
    """Give every plugin its state back; the names of plugins whose state nobody loaded are returned.

    What was spread over the processes comes as the one of ``trained`` is spread whose name ends its own.
    """
    saved = {path.name.split(".")[1] for path in directory.glob(plugin_file("*"))}
    for name in sorted(saved & set(plugins)):
        tensors, numbers = read(directory / plugin_file(name))
        parts = sharded.read(directory, plugin_file(name), lambda own: trained.get(own.rpartition("/")[2]))
        plugins[name].load_state_dict({**tensors, **parts, **numbers})
    return sorted(saved - set(plugins))


def write_all(directory: Path, contents: Mapping[str, Contents]) -> None:
    """Write each file into ``directory``."""
    for name, each in contents.items():
        write(directory / name, each)


def write(path: Path, contents: Contents) -> None:
    """Write named tensors and JSON values to one safetensors file."""
    tensors = contents.tensors
    # Some optimizers hold one table for all tensors, and a file holds no two names of one memory.
    uses = Counter(tensor.data_ptr() for tensor in tensors.values())
    save_file(
        {name: each.detach().to("cpu", copy=uses[each.data_ptr()] > 1).contiguous() for name, each in tensors.items()},
        path,
        metadata={NUMBERS: json.dumps(dict(contents.numbers))},
    )


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, each in storage of its own (mapped offsets would change bits on CPU), and JSON values."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    return tensors, json.loads(metadata.get(NUMBERS, "{}"))
