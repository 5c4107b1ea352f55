"""The trained factors of one module, and what they add to it, by the LyCORIS library's own classes and functions.

The library makes the factors and their start. How they are applied is fixed here: the update is computed beside the
base layer, never from the base's weights, so a quantised or streamed base is like any other, and in a bf16 base no
small update rounds to nothing. The library's ``get_diff_weight`` and ``merge_to``, which apply alpha twice, are not
used, nor are its fused kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lycoris.functional import locon, loha, lokr
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn
from torch.nn import functional

from tuner_lycoris.targets import Chosen

BACKEND = "torch"
"""Of the library's functions: the same arithmetic on every device."""
CONVOLUTIONS: Mapping[type[nn.Module], Any] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


class Factors(nn.Module, ABC):
    """The trained tensors of one adapted module; their names are those in the library's files.

    Arguments
        base: the module that is adapted, of whose weights only the shape is looked at.
        chosen: its options.
    """

    library: type[nn.Module]

    def __init__(self, base: nn.Module, chosen: Chosen) -> None:
        super().__init__()
        options = {name: value for name, value in vars(chosen).items() if name not in ("algo", "dim", "alpha")}
        # On a stand-in: the class and the device of the base's weights must not decide how this is made.
        made: Any = self.library("", stand_in(base), lora_dim=chosen.dim, alpha=chosen.alpha, **options)
        self.names = [name for name, _ in made.named_parameters()]
        for name, parameter in made.named_parameters():
            self.register_parameter(name.replace(".", "_"), parameter)
        self.shape = tuple(made.shape)
        self.scale = float(made.scale)
        self.alpha = float(made.alpha)
        """As files have it: over the dim, it is the scale."""

    def tensor(self, name: str) -> Tensor | None:
        """The trained tensor of that name; None where this module has none."""
        return self._parameters.get(name.replace(".", "_"))

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors by their names in files; ``scalar``, which no file has, among them."""
        return {name: self.get_parameter(name.replace(".", "_")) for name in self.names}

    def update(self, rows: Tensor) -> Tensor:
        """What is added to a Linear layer's outputs (..., out) for ``rows`` (..., in)."""
        return functional.linear(rows, self.weight(rows.dtype))

    @abstractmethod
    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The update of the base's weight, in its shape, computed in ``dtype`` (that of the factors when None)."""

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The update of the base's bias (out,)."""
        return None

    @torch.no_grad()
    def exported(self, multiplier: float) -> dict[str, Tensor]:
        """Tensors of a file whose reader, at strength 1, adds what is added here times ``multiplier``.

        A trained scalar is folded in, as the library does, and the multiplier is in ``alpha``.
        """
        found = {name: each.detach() for name, each in self.trained().items() if name != "scalar"}
        scalar = self.tensor("scalar")
        if scalar is not None:
            found[self._scaled] = found[self._scaled] * scalar
        return found | {"alpha": torch.tensor(self.alpha * multiplier)}

    _scaled: str
    """The tensor that takes up a factor."""

    def _factor(self, name: str, dtype: torch.dtype | None) -> Tensor | None:
        found = self.tensor(name)
        if found is None:
            return None
        cast = found if dtype is None else found.to(dtype)
        scalar = self.tensor("scalar") if name == self._scaled else None
        return cast if scalar is None else cast * scalar.to(cast.dtype)


class LoCon(Factors):
    """LoRA, of convolutions too: up @ down."""

    library = LoConModule
    _scaled = "lora_up.weight"

    def _parts(self, dtype: torch.dtype | None) -> list[Tensor | None]:
        return [self._factor(f"lora_{name}.weight", dtype) for name in ("down", "up", "mid")]

    def update(self, rows: Tensor) -> Tensor:
        """Through both factors, one after the other."""
        result: Tensor = locon.bypass_forward_diff(
            rows, None, *self._parts(rows.dtype), gamma=self.scale, backend=BACKEND
        )
        return result

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """up @ down, scaled."""
        result: Tensor = locon.diff_weight(*self._parts(dtype), gamma=self.scale, backend=BACKEND)
        return result.view(self.shape)


class LoHa(Factors):
    """The elementwise product of two low-rank matrices (arXiv:2108.06098), which has to be written out."""

    library = LohaModule
    _scaled = "hada_w1_a"

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(w1_a @ w1_b) * (w2_a @ w2_b), scaled."""
        names = ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")
        parts = [self._factor(f"hada_{name}", dtype) for name in names]
        # On the host: a number for every device, without waiting for one.
        scale = torch.tensor(self.scale, dtype=torch.float64)
        result: Tensor = loha.diff_weight(*parts, gamma=scale, backend=BACKEND)
        return result.view(self.shape)


class LoKr(Factors):
    """The Kronecker product of a small matrix and a large one (arXiv:2309.14859, section 3)."""

    library = LokrModule
    _NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")

    def __init__(self, base: nn.Module, chosen: Chosen) -> None:
        super().__init__(base, chosen)
        if self.is_whole:
            # Without a dim there is nothing to divide alpha by: readers leave it out, and to any other 1 is no change.
            self.scale = self.alpha = 1.0

    @property
    def is_whole(self) -> bool:
        """Whether both matrices are whole, and so nothing is scaled by alpha."""
        return {"lokr_w1", "lokr_w2"} <= set(self.names)

    @property
    def _scaled(self) -> str:  # type: ignore[override]
        return "lokr_w1" if "lokr_w1" in self.names else "lokr_w1_a"

    def _parts(self, dtype: torch.dtype | None) -> list[Tensor | None]:
        return [self._factor(f"lokr_{name}", dtype) for name in self._NAMES]

    def update(self, rows: Tensor) -> Tensor:
        """Through the large matrix, then across its groups through the small one: the product is never written out."""
        result: Tensor = lokr.kron_bypass(rows, *self._parts(rows.dtype), scale=self.scale, backend=BACKEND)
        return result

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """kron(w1, w2), scaled."""
        parts = self._parts(dtype)
        result: Tensor = lokr.kron_weight(*parts, scale=self.scale, backend=BACKEND)
        return result.view(self.shape)

    @torch.no_grad()
    def exported(self, multiplier: float) -> dict[str, Tensor]:
        """As the others; where nothing is scaled by alpha, the multiplier is in the small matrix."""
        found = super().exported(1.0 if self.is_whole else multiplier)
        if self.is_whole and multiplier != 1.0:
            found["lokr_w1"] = found["lokr_w1"] * multiplier
        return found


class Full(Factors):
    """The whole difference to the base's weight and bias."""

    def __init__(self, base: nn.Module, chosen: Chosen) -> None:
        nn.Module.__init__(self)
        self.shape = weight_shape(base)
        self.names = ["diff"]
        self.diff = nn.Parameter(torch.zeros(self.shape))
        if getattr(base, "bias", None) is not None:
            self.names.append("diff_b")
            self.diff_b = nn.Parameter(torch.zeros(self.shape[0]))

    def update(self, rows: Tensor) -> Tensor:
        """Like a layer of its own."""
        return functional.linear(rows, self.weight(rows.dtype), self.bias(rows.dtype))

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The difference itself."""
        return self.diff if dtype is None else self.diff.to(dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The difference itself."""
        return self.diff_b.to(dtype) if "diff_b" in self.names else None

    @torch.no_grad()
    def exported(self, multiplier: float) -> dict[str, Tensor]:
        """The differences, which have no alpha."""
        return {name: each.detach() * multiplier for name, each in self.trained().items()}


KINDS: Mapping[str, type[Factors]] = {"lora": LoCon, "locon": LoCon, "loha": LoHa, "lokr": LoKr, "full": Full}


def stand_in(base: nn.Module) -> nn.Module:
    """A plain module of the shape of ``base``, without storage."""
    with torch.device("meta"):
        if isinstance(base, nn.Linear):
            return nn.Linear(base.in_features, base.out_features)
        assert isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        kind = next(each for each in CONVOLUTIONS if isinstance(base, each))
        return kind(base.in_channels, base.out_channels, base.kernel_size, groups=base.groups)  # type: ignore[call-arg]


def weight_shape(base: nn.Module) -> tuple[int, ...]:
    """The shape of the weight that ``base`` stands for; a quantised one may be stored in another."""
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    assert isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return base.out_channels, base.in_channels // base.groups, *base.kernel_size
