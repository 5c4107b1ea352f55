"""How many parameters each algorithm trains, without any tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuner.spec import Linear, NetworkSpec
from tuner_lycoris.settings import LycorisSettings, Targets
from tuner_lycoris.targets import Chosen, Kind, Tree, choose_known


def factorization(size: int, factor: int) -> tuple[int, int]:
    """(small, large) with ``small * large == size``: the smaller is ``factor`` or, where that is no divisor, the
    nearest one below; -1 is no limit, which gives the most even pair. As ``lycoris.functional.general`` has it.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    small = max(each for each in range(1, int(size**0.5) + 1) if size % each == 0 and each <= limit)
    return small, size // small


def parameters(chosen: Chosen, outputs: int, inputs: int) -> int:
    """Parameters that a Linear layer (outputs, inputs) with a bias gets."""
    if chosen.algo == "full":
        return outputs * inputs + outputs
    count = _lokr(chosen, outputs, inputs) if chosen.algo == "lokr" else chosen.dim * (outputs + inputs)
    return (2 * count if chosen.algo == "loha" else count) + chosen.use_scalar


def _lokr(chosen: Chosen, outputs: int, inputs: int) -> int:
    out_small, out_large = factorization(outputs, chosen.factor)
    in_small, in_large = factorization(inputs, chosen.factor)
    if chosen.unbalanced_factorization:
        out_small, out_large = out_large, out_small
    dim, whole = chosen.dim, chosen.full_matrix
    halved = chosen.decompose_both and not whole and dim < max(out_small, in_small) / 2
    first = dim * (out_small + in_small) if halved else out_small * in_small
    whole = whole or dim >= max(out_large, in_large) / 2
    return first + (out_large * in_large if whole else dim * (out_large + in_large))


def counts(network: NetworkSpec, settings: LycorisSettings) -> tuple[tuple[Linear, int, int], ...]:
    """(matrix of a block, blocks in which it is adapted, parameters in all) of a network that is only described.

    What lies outside the blocks is not counted: a description does not name it.
    """
    tree, matrices = _described(network)
    if not all(linear.within for linear in network.matrices):  # nothing says what lies where: all of it, then
        settings = settings.model_copy(update={"apply_preset": Targets(), "preset": None})
    chosen = choose_known(tree, settings)
    found = []
    for linear in network.matrices:
        mine = [chosen[name] for name in matrices[linear.name] if name in chosen]
        found.append((linear, len(mine), sum(parameters(each, linear.outputs, linear.inputs) for each in mine)))
    return tuple(found)


def _described(network: NetworkSpec) -> tuple[Tree, Mapping[str, Sequence[str]]]:
    """The blocks of a network by name and class, and the full names of each matrix."""
    classes: dict[str, str] = {}
    kinds: dict[str, Kind] = {}
    matrices: dict[str, list[str]] = {linear.name: [] for linear in network.matrices}
    for block in range(network.blocks):
        for linear in network.matrices:
            path = f"blocks.{block}"
            for cls, part in zip(linear.within, ("", *linear.name.split(".")), strict=False):
                path = f"{path}.{part}".rstrip(".")
                classes.setdefault(path, cls)
            full = f"blocks.{block}.{linear.name}"
            classes[full], kinds[full] = "Linear", "linear"
            matrices[linear.name].append(full)
    return Tree(classes, kinds), matrices
