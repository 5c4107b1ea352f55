"""The settings file of LyCORIS as users have it, read strictly: the library itself ignores what it does not know.

No torch and no LyCORIS here: a config is judged before either is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tuner import ConfigError
from tuner.errors import nearest

Algorithm = Literal["lora", "locon", "loha", "lokr", "full"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
NOT_OFFERED = {
    "dylora": "its files reload as something else than was trained",
    "ia3": "the library cannot load its own files",
    "boft": "it rotates the base's weights, which a quantised or streamed base does not show",
    "diag-oft": "it rotates the base's weights, which a quantised or streamed base does not show",
    "glora": "its update is made of the base's weights, which a quantised or streamed base does not show",
    "tlora": "its masks follow the noise level, and the library leaves that to its caller",
}
"""Algorithms that LyCORIS has beside, and why they are refused."""
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "full-lin": {"target_module": ["Linear"], "enable_conv": False},
    "attn-mlp": {"target_module": ["Attention", "FeedForward"], "enable_conv": False},
    "attn-only": {"target_module": ["Attention"], "enable_conv": False},
}
"""LyCORIS's own presets that mean something here. They name classes of other networks; these are the same parts."""
EVERYTHING = ("Linear", "Conv1d", "Conv2d", "Conv3d")
"""What is adapted where the settings name no target."""
IDLE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "block_size": ((4,), "it belongs to dylora"),
    "constraint": ((0, None), "it belongs to diag-oft and boft"),
    "rescaled": ((False,), "it belongs to diag-oft and boft"),
    "train_norm": ((False,), "norms have no matrices, and other programs do not load theirs"),
    "train_llm_adapter": ((False,), "this network has none"),
    "dora_wd": ((False,), "weight decomposition needs the base's weights in every forward"),
    "weight_decompose": ((False,), "weight decomposition needs the base's weights in every forward"),
    "wd_on_output": ((True, False), ""),
    "wd_on_out": ((True, False), ""),
    "bypass_mode": ((True, False, None), ""),
    "warn_on_unmatched": ((True, False), ""),
}
"""Options of the library that change nothing here: the values that may stand, and why others are refused."""


class Shape(BaseModel):
    """What decides the shape of one module's factors, in the whole file or in an entry of a map."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    algo: Algorithm | None = Field(None, description="The algorithm.")
    factor: int | None = Field(None, description="LoKr: the smaller factor of each side; -1 is near the square root.")
    full_matrix: bool | None = Field(None, description="LoKr: the larger matrix whole, whatever the dim.")
    decompose_both: bool | None = Field(None, description="LoKr: the smaller matrix in two factors, too.")
    unbalanced_factorization: bool | None = Field(None, description="LoKr: the larger factor of the outputs first.")
    use_tucker: bool | None = Field(None, description="Convolutions with a kernel: Tucker decomposition.")
    use_scalar: bool | None = Field(None, description="A trained factor in front of the update, which starts at 0.")
    rs_lora: bool | None = Field(None, description="Divide alpha by the square root of the dim.")

    @field_validator("algo", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("factor")
    @classmethod
    def _is_factor(cls, value: int | None) -> int | None:
        if value is not None and (value == 0 or value < -1):
            raise ValueError("must be -1 or at least 1")
        return value


class Override(Shape):
    """An entry of ``module_algo_map`` or ``name_algo_map``."""

    dim: int | None = Field(None, ge=1, description="The dim (rank) of these modules.")
    alpha: float | None = Field(None, ge=0, description="Their alpha; 0 is the dim.")


class Targets(BaseModel):
    """The value of ``apply_preset``: what is adapted, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_module: tuple[str, ...] = Field((), description="Classes of modules, all matrices in which are adapted.")
    target_name: tuple[str, ...] = Field((), description="Patterns of full names of the modules that are adapted.")
    module_algo_map: dict[str, Override] = Field(default_factory=dict, description="Class -> other options.")
    name_algo_map: dict[str, Override] = Field(default_factory=dict, description="Pattern of names -> other options.")
    exclude_name: tuple[str, ...] = Field((), description="Patterns of names that are left alone.")
    use_fnmatch: bool = Field(False, description="Patterns are shell patterns; else regular expressions.")
    enable_conv: bool = Field(True, description="Whether convolutions with a kernel are adapted, too.")
    lora_prefix: Literal["lycoris"] = "lycoris"


class LycorisSettings(Shape):
    """A settings file."""

    multiplier: float = Field(1.0, description="What the update is multiplied with.")
    linear_dim: int = Field(4, ge=1, description="The dim (rank); so large that LoKr keeps whole matrices: 10000.")
    linear_alpha: float = Field(1.0, ge=0, description="The update is scaled by alpha / dim; 0 is the dim.")
    conv_dim: int | None = Field(None, ge=1, description="The dim of convolutions with a kernel.")
    conv_alpha: float | None = Field(None, ge=0, description="Their alpha.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the update's outputs that is dropped in training.")
    rank_dropout: float = Field(0.0, ge=0, lt=1, description="Share of the update's rows that is dropped.")
    rank_dropout_scale: bool = Field(False, description="Whether the other rows make up for them.")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="How often a module's update is left out.")
    preset: Literal["full", "full-lin", "attn-mlp", "attn-only"] | None = None
    apply_preset: Targets | None = None

    @property
    def targets(self) -> Targets:
        """What is adapted: ``apply_preset``, or else the named preset, or else everything."""
        return self.apply_preset or Targets.model_validate(PRESETS[self.preset or "full"])


def read(source: Path | Mapping[str, Any]) -> LycorisSettings:
    """The settings in a file, or given as they would stand in one.

    Raises ConfigError for a file that cannot be read, for options that LyCORIS does not have (with the nearest one
    that it has), and for values that cannot be used.
    """
    from tuner.config.load import plain_data

    where = "lycoris_config" if isinstance(source, Mapping) else str(source)
    found = source if isinstance(source, Mapping) else plain_data(source)
    if not isinstance(found, Mapping):
        raise ConfigError("the LyCORIS settings must be one object", where=where)
    settings = _checked(LycorisSettings, _renamed(found), where, idle=True)
    if "preset" in settings and "apply_preset" in settings:
        raise ConfigError("both preset and apply_preset are set", where=where, remedy="keep apply_preset")
    if settings.get("apply_preset") is not None:
        settings["apply_preset"] = _targets(settings["apply_preset"], f"{where}: apply_preset")
    try:
        return LycorisSettings.model_validate(settings)
    except ValidationError as error:
        raise _invalid(error, where) from None


_RENAMED = {"use_cp": "use_tucker", "use_conv_cp": "use_tucker", "disable_conv_cp": "use_tucker"}
"""What the library calls deprecated."""


def _renamed(found: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {name: value for name, value in found.items() if name not in _RENAMED}
    for name in _RENAMED.keys() & found.keys():
        value = not found[name] if name.startswith("disable") else found[name]
        renamed.setdefault(_RENAMED[name], value)
    return renamed


def _targets(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise ConfigError("apply_preset must be one object", where=where)
    for name in found:
        if name.startswith(("unet_", "text_encoder_")):
            remedy = f"use {name.removeprefix('unet_')}" if name.startswith("unet_") else "leave it out"
            raise ConfigError(f"{name!r} belongs to networks of image models", where=where, remedy=remedy)
    targets = _checked(Targets, found, where)
    for name in ("module_algo_map", "name_algo_map"):
        entries = targets.get(name)
        if entries is None:
            continue
        if not isinstance(entries, Mapping) or not all(isinstance(each, Mapping) for each in entries.values()):
            raise ConfigError(f"{name} must be an object of objects", where=where)
        targets[name] = {
            key: _checked(Override, _renamed(entry), f"{where}: {name}: {key}", idle=True)
            for key, entry in entries.items()
        }
    return targets


def _checked(model: type[BaseModel], found: Mapping[str, Any], where: str, *, idle: bool = False) -> dict[str, Any]:
    """``found`` without what changes nothing. Raises ConfigError for names that ``model`` does not have."""
    kept: dict[str, Any] = {}
    for name, value in found.items():
        if idle and name in IDLE:
            allowed, why = IDLE[name]
            if not any(value is each or (value == each and type(value) is type(each)) for each in allowed):
                raise ConfigError(f"{name} {value!r} is not offered: {why}", where=where, remedy="leave it out")
        elif name in model.model_fields:
            kept[name] = _algorithm(value, where) if name == "algo" else value
        else:
            raise _unknown(name, (*model.model_fields, *(IDLE if idle else ())), where)
    return kept


def _algorithm(value: Any, where: str) -> Any:
    name = value.lower() if isinstance(value, str) else value
    if name in ALGORITHMS or name is None:
        return value
    why = f" is not offered: {NOT_OFFERED[name]}" if name in NOT_OFFERED else " is unknown"
    raise ConfigError(f"algo {value!r}{why}", where=where, allowed=ALGORITHMS, nearest=nearest(str(name), ALGORITHMS))


def _unknown(name: str, known: Iterable[str], where: str) -> ConfigError:
    closest = {"linear_dim": "dim", "linear_alpha": "alpha"}.get(name) or nearest(name, known)
    return ConfigError(
        f"LyCORIS has no option {name!r} here, and would ignore it", where=where, nearest=closest, allowed=sorted(known)
    )


def _invalid(error: ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    path = ".".join(str(each) for each in first["loc"])
    field = LycorisSettings.model_fields.get(str(first["loc"][0]))
    choices = get_args(field.annotation) if field is not None and len(first["loc"]) == 1 else ()
    literals = [each for choice in choices if get_origin(choice) is Literal for each in get_args(choice)]
    return ConfigError(
        f"{path} is {first['input']!r}: {first['msg'].removeprefix('Value error, ')}",
        where=where,
        allowed=literals or None,
    )
