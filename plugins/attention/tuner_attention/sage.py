"""SageAttention, called by ourselves: both 1.0.6, which the package index has, and 2.1.1 or newer, built from source.

diffusers accepts only the latter. Neither has a backward.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tuner.errors import ConfigError
from tuner_attention.precision import halves

if TYPE_CHECKING:
    from tuner.attention import Kernel

FUNCTIONS = {
    "int8-fp16-triton": "sageattn_qk_int8_pv_fp16_triton",
    "int8-fp16-cuda": "sageattn_qk_int8_pv_fp16_cuda",
    "int8-fp8-cuda": "sageattn_qk_int8_pv_fp8_cuda",
}
"""End of a value of ``attention_mechanism`` -> the function of SageAttention 2."""


def sage(name: str) -> Kernel:
    """The kernel that ``attention_mechanism: name`` means.

    Raises ConfigError where the installed version has no such function.
    """
    library: Any = import_module("sageattention")
    installed = version("sageattention")
    function = getattr(library, _function(name), None)
    if function is None:
        raise ConfigError(
            f"attention_mechanism {name!r} needs SageAttention 2.1.1 or newer, and {installed} is installed",
            remedy="use sageattention, or build a newer version from its repository",
        )
    # The first version subtracts the mean of the keys in place.
    alters_keys = int(installed.split(".")[0]) < 2

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = halves(query, key, value)
        if alters_keys:
            key = key.clone()
        out: Tensor = function(query, key, value, tensor_layout="NHD", is_causal=False)
        return out

    return kernel


def _function(name: str) -> str:
    """Name of the library's function."""
    if name.startswith("_sage_"):
        return "sageattn" + name.removeprefix("_sage")
    return FUNCTIONS.get(name.removeprefix("sageattention-"), "sageattn")
