"""The network as its own adapter: its parameters in groups, and its weights in a folder that loads back.

Parameters are trained in the dtype they are stored in. In bfloat16 an update smaller than about 1/256 of
its weight rounds to nothing, so ``base_model_default_dtype: fp32`` is the careful choice where it fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_model
from torch import Tensor, nn

from tuner.builtin.adapter_state import copy_into
from tuner.files import atomic_path
from tuner.model import Adapter, Network, ParameterGroup
from tuner.sharded import gathered

WEIGHTS = "diffusion_pytorch_model.safetensors"


def attach(network: Network) -> Adapter:
    """Make every floating-point parameter of ``network`` trainable; norms, biases and tables get no weight decay."""
    parameters = {
        name: parameter for name, parameter in network.module.named_parameters() if parameter.is_floating_point()
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return Adapter(
        kind="full",
        groups=_groups(parameters),
        state=lambda: {name: parameter.detach() for name, parameter in parameters.items()},
        load=lambda state: copy_into(parameters, state, what=f"weights of network {network.name!r}"),
    )


def _groups(parameters: dict[str, nn.Parameter]) -> tuple[ParameterGroup, ...]:
    decayed = {name: each for name, each in parameters.items() if _is_matrix(name, each)}
    rest = {name: each for name, each in parameters.items() if name not in decayed}
    groups = (ParameterGroup("matrices", decayed), ParameterGroup("norms and biases", rest, weight_decay=False))
    return tuple(group for group in groups if group.parameters)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Weights of linear and convolution layers; modulation tables have several axes too, but another name."""
    return name.rpartition(".")[2] == "weight" and parameter.ndim >= 2


def export(network: Network, folder: Path | None) -> list[Path]:
    """Write the weights (and config.json, where the network has one) into ``folder``; returns the files.

    diffusers models load back with ``from_pretrained``; of another module only the safetensors are written. Every
    process calls it for a sharded network; without a folder nothing is written.
    """
    if network.sharding is not None and network.adapter is not None:
        state = {name: gathered(each) for name, each in network.adapter.state().items()}
        return _export_gathered(network.module, state, folder)
    if folder is None:
        return []
    save = getattr(network.module, "save_pretrained", None)
    if save is not None:
        save(folder, safe_serialization=True)
        return sorted(path for path in folder.iterdir() if path.is_file())
    with atomic_path(folder / WEIGHTS) as temporary:
        save_model(network.module, str(temporary))
    return [folder / WEIGHTS]


def _export_gathered(module: nn.Module, state: Mapping[str, Tensor], folder: Path | None) -> list[Path]:
    """The same files from weights that were put together from all processes."""
    if folder is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(dict(state), folder, filename_pattern=WEIGHTS.replace(".", "{suffix}.", 1))
    save_config = getattr(module, "save_config", None)
    if save_config is not None:
        save_config(folder)
    return sorted(path for path in folder.iterdir() if path.is_file())
