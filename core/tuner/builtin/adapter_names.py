"""The formats of adapter files: how each names modules and tensors.

``comfyui``: ``diffusion_model.``, the model's original module names, ``lora_A``/``lora_B`` and one ``alpha`` for each
pair. ``diffusers``: ``transformer.`` and diffusers' names, with alpha in the metadata, as ``save_lora_weights`` writes
it. ``kohya``: ``lora_unet_`` and the original names with underscores, as musubi-tuner has them. ``lycoris``: what the
LyCORIS library writes for a diffusers model. ``peft``: bare names, as PEFT and DiffSynth have them; only read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.builtin import adapter_metadata
from tuner.builtin.adapter_file import AdapterFile, Shapes, Update
from tuner.errors import CheckpointError
from tuner.spec import ModelSpec

SPELLINGS = {
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_A.default.weight": "lora_down",
    "lora_B.default.weight": "lora_up",
    "lora_down.weight": "lora_down",
    "lora_up.weight": "lora_up",
    "lora.down.weight": "lora_down",
    "lora.up.weight": "lora_up",
    "lora_mid.weight": "lora_mid",
    "lora_B.bias": "up_bias",
    "lora_B.default.bias": "up_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "diff": "diff",
    "w_norm": "diff",
    "diff_b": "diff_b",
    "b_norm": "diff_b",
}
"""Ends of keys and what they hold; ``hada_*`` and ``lokr_*`` are called so everywhere."""
_KEY = re.compile(
    rf"(?P<module>.*?)\.?(?P<end>{'|'.join(map(re.escape, sorted(SPELLINGS, key=len, reverse=True)))}"
    r"|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)"
)


def end_of(key: str) -> str:
    """What a key says of its tensor, after the name of the module; empty where no reader knows it."""
    found = _KEY.fullmatch(key)
    return "" if found is None else found["end"]


OURS = {"lora_down": "lora_A.weight", "lora_up": "lora_B.weight"}
THEIRS = {"lora_down": "lora_down.weight", "lora_up": "lora_up.weight", "lora_mid": "lora_mid.weight"}
ADDED = ("lora", "hada", "lokr", "diff")


@dataclass(frozen=True)
class Format:
    """One way to name things; an ``AdapterFormat``."""

    name: str
    prefixes: tuple[str, ...]
    """What its keys begin with; the first is written."""
    original: bool
    """Whether modules have their names in the model's own code."""
    flat: bool = False
    """Whether the dots of a module's name become underscores."""

    def module_name(self, module: str, spec: ModelSpec) -> str:
        """The name in a file of a module of our network."""
        return self.prefixes[0] + self._bare(spec.original_name(module) if self.original else module)

    def _bare(self, name: str) -> str:
        return name.replace(".", "_") if self.flat else name

    def claims(self, keys: Collection[str]) -> bool:
        """Whether a key begins as this format's do and ends as an adapter's do."""
        return any(key.startswith(self.prefixes) and _KEY.fullmatch(key) for key in keys)

    def read(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], spec: ModelSpec, shapes: Shapes
    ) -> AdapterFile:
        """What a file says; keys that name no weight of ``shapes``, or do not fit it, are left ``unread``."""
        known = self.modules(spec, shapes)
        unread: dict[str, str] = {}
        grouped: dict[str, dict[str, str]] = {}
        for key in tensors:
            found = _KEY.fullmatch(key)
            module = found and self._find(found["module"], known)
            if found is None:
                unread[key] = "no reader knows such a tensor"
            elif not module:
                unread[key] = "names no weight of the model"
            else:
                grouped.setdefault(module, {})[SPELLINGS.get(found["end"], found["end"])] = key
        updates: dict[str, Update] = {}
        biases: dict[str, Tensor] = {}
        alphas = adapter_metadata.alphas(metadata)
        for module, keys in grouped.items():
            parts = {part: tensors[key] for part, key in keys.items()}
            why = _problem(parts, shapes[module])
            if why:
                unread |= dict.fromkeys(keys.values(), why)
                continue
            update = _update(parts, alphas(module, parts) if self.name in ("diffusers", "peft") else None)
            if update is not None:
                updates[module] = update
            if (bias := _bias(parts, update)) is not None:
                biases[module] = bias
        notes = [*self._foreign(tensors, spec, grouped), *adapter_metadata.notes(metadata, updates, self.name)]
        return AdapterFile(updates, biases, metadata, tuple(notes), unread)

    def _foreign(self, tensors: Mapping[str, Tensor], spec: ModelSpec, modules: Collection[str]) -> list[str]:
        """Say so where names are not those that this format has: only we read them."""
        if self.name == "peft":
            return []
        proper = tuple(f"{self.module_name(module, spec)}." for module in modules)
        odd = [key for key in tensors if not key.startswith(proper)]
        return [f"{len(odd)} keys such as {odd[0]} are not named as readers of {self.name} files expect"] if odd else []

    def modules(self, spec: ModelSpec, shapes: Shapes) -> dict[str, str]:
        """Names in files, without prefix, to modules. A file that kept the other program's names is read, too.

        Raises CheckpointError where two modules would have one name.
        """
        names: dict[str, str] = {}
        for module in shapes:
            name = self._bare(spec.original_name(module) if self.original else module)
            if name in names:
                raise CheckpointError(
                    f"two modules of the model are both called {name!r} in a {self.name} LoRA file: {names[name]!r} "
                    f"and {module!r}",
                    remedy="the table of names of the model family does not fit it: report it to the family's author",
                )
            names[name] = module
        others = {self._bare(module if self.original else spec.original_name(module)): module for module in shapes}
        return others | names

    def _find(self, name: str, known: Mapping[str, str]) -> str | None:
        for prefix in self.prefixes:
            if name.startswith(prefix) and name.removeprefix(prefix) in known:
                return known[name.removeprefix(prefix)]
        return None

    def write(self, file: AdapterFile, spec: ModelSpec) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a file that this format's readers load as it is meant.

        Raises CheckpointError for what they would refuse, leave out or compute otherwise.
        """
        _refuse(self, file)
        # ComfyUI looks for a core only beside the names down and up.
        mid = any("lora_mid" in update.tensors for update in file.updates.values())
        names = OURS if self.name in ("comfyui", "diffusers") and not mid else THEIRS
        tensors: dict[str, Tensor] = {}
        for module, update in file.updates.items():
            name = self.module_name(module, spec)
            for part, tensor in update.tensors.items():
                tensors[f"{name}.{names.get(part, part)}"] = tensor
            if self.name == "diffusers":
                tensors |= _peft_extras(name, update, file.biases.get(module), has_bias=bool(file.biases))
            elif update.kind != "diff":
                tensors[f"{name}.alpha"] = torch.tensor(_written_alpha(update))
            if update.dora_scale is not None and self.name != "diffusers":
                tensors[f"{name}.dora_scale"] = update.dora_scale
        if self.name != "diffusers":
            tensors |= {f"{self.module_name(module, spec)}.diff_b": bias for module, bias in file.biases.items()}
        held = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        return held, adapter_metadata.written(file, self.name)


def _problem(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> str | None:
    """Why the tensors of one module are no update of a weight of ``shape``; None when they are."""
    added = {part: tensor for part, tensor in parts.items() if part.startswith(ADDED) and part != "diff_b"}
    if len({part.partition("_")[0] for part in added}) > 1:
        return "tensors of two kinds of adapters on one module"
    if "diff_b" in parts and parts["diff_b"].shape != torch.Size(shape[:1]):
        return f"the bias has shape {tuple(shape[:1])}, and this {tuple(parts['diff_b'].shape)}"
    if not added:
        return None if "diff_b" in parts else "belongs to no update"
    if ("lora_down" in added) != ("lora_up" in added):
        return "only one of the two matrices"
    update = Update(added, dora_scale=_dora_scale(parts, len(shape)))
    if not update.fits(shape):
        shown = ", ".join(f"{tuple(tensor.shape)}" for tensor in added.values())
        return f"the weight has shape {shape}, which {shown} do not make"
    return None


def _dora_scale(parts: Mapping[str, Tensor], axes: int) -> Tensor | None:
    """DoRA's scale as LyCORIS has it; PEFT's, one number for each row, in the axes of its weight."""
    if "magnitude" in parts:
        return parts["magnitude"].reshape(-1, *[1] * (axes - 1))
    return parts.get("dora_scale")


def _update(parts: Mapping[str, Tensor], declared: float | None) -> Update | None:
    added = {part: parts[part] for part in sorted(parts) if part.startswith(ADDED) and part != "diff_b"}
    if not added:
        return None
    alpha = float(parts["alpha"].float()) if "alpha" in parts else declared
    return Update(added, alpha, _dora_scale(parts, parts["lora_down"].ndim if "lora_down" in parts else 2))


def _bias(parts: Mapping[str, Tensor], update: Update | None) -> Tensor | None:
    """A bias that is scaled like the matrices (PEFT's ``lora_bias``) as what it adds."""
    if "up_bias" in parts and update is not None:
        return parts["up_bias"].float() * update.scale
    return parts.get("diff_b")


def _written_alpha(update: Update) -> float:
    """Alpha as the file has it; where it scales nothing some write a huge one, which float16 cannot hold."""
    if update.rank is not None:
        return float(update.rank if update.alpha is None else update.alpha)
    return update.alpha if update.alpha is not None and 0 < update.alpha < torch.finfo(torch.float16).max else 1.0


def _peft_extras(name: str, update: Update, bias: Tensor | None, *, has_bias: bool) -> dict[str, Tensor]:
    """PEFT's tensors beside the pair: DoRA's norms (out,), and a bias for every module where there is one."""
    found = {}
    if update.dora_scale is not None:
        found[f"{name}.lora_magnitude_vector"] = update.dora_scale.flatten()
    if has_bias:
        rows = update.tensors["lora_up"].shape[0]
        found[f"{name}.lora_B.bias"] = torch.zeros(rows) if bias is None else bias.float() / update.scale
    return found


def _refuse(form: Format, file: AdapterFile) -> None:
    """Raise CheckpointError for what the readers of ``form`` do not load as it is meant."""
    if form.name == "peft":
        raise CheckpointError("bare names are only read", allowed="comfyui, diffusers, kohya, lycoris")
    rows = [module for module, update in file.updates.items() if update.by_rows]
    if rows and form.name in ("comfyui", "kohya"):
        raise CheckpointError(
            f"{len(rows)} modules such as {rows[0]} are DoRA, and ComfyUI divides by the norms of the base's rows "
            "where DoRA divides by those of the sum",
            where=form.name,
            remedy="keep it as diffusers, or merge it into the base",
        )
    if form.name != "diffusers":
        return
    odd = [
        f"{module} ({NAMES[update.kind]})"
        for module, update in file.updates.items()
        if update.kind != "lora"
        or "lora_mid" in update.tensors
        or (update.dora_scale is not None and not update.by_rows)
    ]
    odd += [f"{module} (bias)" for module in file.biases if module not in file.updates]
    if odd:
        raise CheckpointError(
            f"{len(odd)} updates are nothing that diffusers loads, such as {', '.join(odd[:3])}",
            where="diffusers",
            remedy="make them LoRA by --rank, or keep them for ComfyUI",
        )


NAMES = {"lora": "LoRA", "hada": "LoHa", "lokr": "LoKr", "diff": "full difference"}
"""What people call the kinds."""
FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (
        Format("peft", ("base_model.model.", "pipe.dit.", ""), original=False),
        Format("comfyui", ("diffusion_model.", "model.diffusion_model."), original=True),
        Format("diffusers", ("transformer.",), original=False),
        Format("kohya", ("lora_unet_", "lora_unet__"), original=True, flat=True),
        Format("lycoris", ("lycoris_",), original=False, flat=True),
    )
}
"""The formats by name; the last one that claims a file is taken, so bare names come first."""
