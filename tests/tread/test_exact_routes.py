"""Routes equal a loop written by hand, in every family: each sample by itself, its kept rows by plain indexing.

What holds to which precision. In float64 nothing but the order of sums differs between a batch and its samples one
by one, so all agrees to 1e-12. diffusers however computes some of it in float32 whatever the network's dtype:

- Wan rounds the stream before each norm and each residual (``.float()``), and its layer norms are float32
  (``FP32LayerNorm``). Of parameters only the affine ones of these norms are summed over tokens *in float32*: theirs
  agree to 1e-6. All other sums (tables of modulation, time embedding, everything linear) are float64.
- LTX turns queries and keys in float32 and takes the variance of its RMS norms in float32. Both are rounded token by
  token, so all sums are float64 still.

Rounding token by token is the same for a batch and for one sample. With ``float`` meaning ``double`` nothing is
rounded, and every parameter agrees to 1e-12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tuner.blocks import BlockStack, RouteRequest, StepContext, TokenRoute, install
from tuner.config.keys import CoreConfig
from tuner.run import Run
from tuner.testing.plugin_env import importable
from tuner_tread import RouteSettings, TreadConfig, TreadPlugin, TreadSettings

LTX_PACKAGE = Path(__file__).parents[2] / "examples" / "tuner-ltx"
BLOCKS, BATCH = 6, 2
WAN_GRID = (3, 4, 3)
WAN_FAMILIES = {
    "wan-t2v": "t2v-480p-1.3b-2.1",
    "wan-i2v-clip": "i2v-14b-2.1",
    "wan-i2v": "i2v-14b-2.2-high",
    "wan-ti2v": "ti2v-5b-2.2",
}
FAMILIES = (*WAN_FAMILIES, "ltx", "ltx-per-token", "toy")
ROUTES = ((0.4, 1, 2), (0.75, 3, 3), (0.1, -1, -1))
"""One beside the next, then a whole block, then the last block."""
RunBlock = Callable[[nn.Module, Tensor, Mapping[str, Tensor], Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Case:
    """A network with float64 weights, arguments of its forward, and how one of its blocks is called."""

    stack: BlockStack
    inputs: dict[str, Any]
    """those that are tensors have the batch as their first axis"""
    run_block: RunBlock
    """block, tokens (1, K, D), per-token companions at the same rows, shared companions -> (1, K, D)"""

    @property
    def module(self) -> nn.Module:
        return self.stack.module


@dataclass(frozen=True)
class Outcome:
    """A forward and its backward."""

    output: Tensor
    gradients: dict[str, Tensor]
    """by parameter, and by input as ``input.<name>``"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """One of each family, every per-sample input another for each sample."""
    family: str = request.param
    if family in WAN_FAMILIES:
        return wan_case(WAN_FAMILIES[family])
    if family == "toy":
        return toy_case(monkeypatch)
    return ltx_case(per_token_times=family == "ltx-per-token")


@pytest.fixture
def nothing_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tensor.float()`` gives float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wan_case(flavour: str) -> Case:
    from tuner_wan.stack import WanStack
    from tuner_wan.tiny import IMAGE_TOKENS, IMAGE_WIDTH, TEXT_WIDTH, tiny_pipeline

    transformer = tiny_pipeline(flavour, layers=BLOCKS).transformer.double().train()
    frames, height, width = WAN_GRID
    inputs: dict[str, Any] = {
        "hidden_states": drawn(BATCH, transformer.config.in_channels, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([100.25, 700.5]),
        "encoder_hidden_states": drawn(BATCH, 512, TEXT_WIDTH),
        "return_dict": False,
    }
    if transformer.config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = drawn(BATCH, IMAGE_TOKENS, IMAGE_WIDTH)
    if flavour.startswith("ti2v"):
        times = torch.rand(BATCH, frames * height * width, generator=torch.Generator().manual_seed(4)) * 1000
        times[:, : height * width] = 0
        inputs["timestep"] = times

    def run_block(block: nn.Module, tokens: Tensor, per_token: Mapping[str, Tensor], shared: Any) -> Tensor:
        modulation = per_token.get("modulation", shared.get("modulation"))
        return block(tokens, shared["text"], modulation, (per_token["cos"], per_token["sin"]))  # type: ignore[no-any-return]

    return Case(WanStack(transformer), inputs, run_block)


def ltx_case(*, per_token_times: bool) -> Case:
    with importable(LTX_PACKAGE):
        from tuner_ltx.stack import LtxStack
        from tuner_ltx.tiny import TEXT_WIDTH, tiny_pipeline

        transformer = tiny_pipeline(layers=BLOCKS).transformer.double().train()
    frames, height, width = WAN_GRID
    size = frames * height * width
    times = torch.rand(BATCH, size, generator=torch.Generator().manual_seed(4)) * 1000
    inputs: dict[str, Any] = {
        "hidden_states": drawn(BATCH, size, 128),
        "encoder_hidden_states": drawn(BATCH, 16, TEXT_WIDTH),
        "timestep": times if per_token_times else times[:, 0],
        "encoder_attention_mask": (torch.arange(16) < torch.tensor([[3], [7]])).double(),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }

    def run_block(block: nn.Module, tokens: Tensor, per_token: Mapping[str, Tensor], shared: Any) -> Tensor:
        modulation = per_token.get("modulation", shared.get("modulation"))
        return block(tokens, shared["text"], modulation, (per_token["cos"], per_token["sin"]), shared["mask"])  # type: ignore[no-any-return]

    return Case(LtxStack(transformer), inputs, run_block)


def toy_case(monkeypatch: pytest.MonkeyPatch) -> Case:
    from tuner.testing.toy import networks
    from tuner.testing.toy.describe import ToyDimensions
    from tuner.testing.toy.stack import ToyStack

    waves = networks.waves  # float32 by itself, which no float64 layer takes
    monkeypatch.setattr(networks, "waves", lambda values, width: waves(values, width).double())
    torch.manual_seed(0)
    network = networks.ToyTransformer(ToyDimensions(blocks=BLOCKS)).double().train()
    inputs = {
        "latents": drawn(BATCH, 12, 3, 8, 8),
        "time": torch.tensor([100.25, 700.5]).double(),
        "text": drawn(BATCH, 8, 16),
    }

    def run_block(block: nn.Module, tokens: Tensor, per_token: Mapping[str, Tensor], shared: Any) -> Tensor:
        return block(tokens, per_token["position"], shared["modulation"], shared["text"])  # type: ignore[no-any-return]

    return Case(ToyStack(network), inputs, run_block)


class Router:
    """The plugin's own routes, and a note of what it answered."""

    def __init__(self, routes: Sequence[tuple[float, int, int]] = ROUTES) -> None:
        written = tuple(
            RouteSettings(selection_ratio=ratio, start_layer_idx=start, end_layer_idx=end)
            for ratio, start, end in routes
        )
        self.plugin = TreadPlugin("tread", TreadConfig(tread_config=TreadSettings(routes=written)))
        self.run = Run(CoreConfig(seed=11), {"tread": self.plugin}, step=5)
        self.run.token_selectors = self.plugin.token_selectors(run=self.run)
        self.answers: list[Sequence[TokenRoute]] = []

    def __call__(self, request: RouteRequest) -> Sequence[TokenRoute]:
        self.answers.append(self.plugin.route_tokens(run=self.run, request=request) or ())
        return self.answers[-1]


def inputs_with_gradients(case: Case) -> dict[str, Any]:
    """The inputs, those that a gradient can reach as leaves."""
    wanted = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image", "latents", "text")
    return {
        name: value.clone().requires_grad_(True) if name in wanted else value for name, value in case.inputs.items()
    }


def learn(case: Case, forward: Callable[[dict[str, Any]], Tensor]) -> Outcome:
    """The outcome of ``forward``, its loss a fixed weighting of the whole output."""
    case.module.zero_grad(set_to_none=True)
    inputs = inputs_with_gradients(case)
    output = forward(inputs)
    (output * drawn(*output.shape, seed=9)).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: each.grad for name, each in case.module.named_parameters() if each.grad is not None}
    assert gradients.keys() == dict(case.module.named_parameters()).keys()
    of_inputs = {f"input.{name}": each.grad for name, each in inputs.items() if getattr(each, "requires_grad", False)}
    return Outcome(output.detach(), gradients | of_inputs)


def driven(case: Case, router: Callable[[RouteRequest], Sequence[TokenRoute]] | None, **others: Any) -> Outcome:
    """Through the network's own ``__call__`` and the block driver."""
    trampoline = install(case.module, case.stack)
    trampoline.context = StepContext(router=router, positions=(4, 7), **others)
    return learn(case, lambda inputs: only(case.module(**inputs)))


def by_hand(case: Case, routes: Sequence[TokenRoute]) -> Outcome:
    """The reference: no driver, no gather, no batch."""

    def forward(inputs: dict[str, Any]) -> Tensor:
        return torch.cat([one_sample(case, inputs, routes, sample) for sample in range(BATCH)])

    return learn(case, forward)


def one_sample(case: Case, inputs: Mapping[str, Any], routes: Sequence[TokenRoute], sample: int) -> Tensor:
    arguments = {
        name: value[sample : sample + 1] if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    stream = case.stack.embed(**arguments)
    tokens = stream.tokens
    for index, block in enumerate(case.stack.blocks):
        rows = torch.arange(tokens.shape[1])
        for route in routes:
            if route.start <= index < route.stop:
                rows = route.keep[sample]
        companions = {name: each[:, rows] for name, (each, _) in stream.per_token.items()}
        changed = case.run_block(block, tokens[:, rows], companions, stream.shared)
        tokens = tokens.clone()
        tokens[:, rows] = changed
    return only(case.stack.unembed(replace(stream, tokens=tokens)))


def only(output: Tensor | tuple[Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def float32_sums(name: str) -> bool:
    """Whether the gradient of this parameter is summed over tokens in float32: those of Wan's layer norms."""
    return "image_embedder.norm" in name or (name.startswith("blocks.") and ".norm2." in name)


def differences(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """|ours - theirs| / |theirs| of each tensor, in the L2 norm.

    Gradients that are zero by arithmetic (the bias of keys, which softmax does not see) are measured by the others.
    """
    assert ours.gradients.keys() == theirs.gradients.keys()
    largest = max(float(each.norm()) for each in theirs.gradients.values())
    found = {"output": float((ours.output - theirs.output).norm() / theirs.output.norm())}
    for name, expected in theirs.gradients.items():
        difference = float((ours.gradients[name] - expected).norm())
        found[name] = difference / max(float(expected.norm()), 1e-4 * largest)
    return found


def assert_bit_equal(ours: Outcome, theirs: Outcome) -> None:
    assert torch.equal(ours.output, theirs.output)
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert not [name for name, each in ours.gradients.items() if not torch.equal(each, theirs.gradients[name])]


def test_output_and_all_gradients_are_those_of_a_loop_by_hand(case: Case) -> None:
    router = Router()
    routed = driven(case, router)
    (routes,) = router.answers
    size = case.stack.embed(**case.inputs).tokens.shape[1]
    assert [(route.start, route.stop, route.keep.shape[1]) for route in routes] == [
        (1, 3, size - round(size * 0.4)),
        (3, 4, size // 4),
        (5, 6, size - round(size * 0.1)),
    ]
    assert not torch.equal(routes[0].keep[0], routes[0].keep[1]), "each sample has its own tokens"
    found = differences(routed, by_hand(case, routes))
    beyond = {name: each for name, each in found.items() if each > (1e-6 if float32_sums(name) else 1e-12)}
    assert not beyond


@pytest.mark.usefixtures("nothing_rounded")
def test_with_nothing_rounded_the_norms_agree_as_well(case: Case) -> None:
    router = Router()
    routed = driven(case, router)
    found = differences(routed, by_hand(case, router.answers[0]))
    assert not {name: each for name, each in found.items() if each > 1e-12}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_ratio_of_0_and_a_route_over_all_tokens_are_no_route(case: Case, checkpointing: bool) -> None:
    plain = driven(case, None, checkpointing=checkpointing)
    assert_bit_equal(driven(case, Router([(0.0, 1, 2), (0.0, 3, -1)]), checkpointing=checkpointing), plain)

    def keep_all(request: RouteRequest) -> Sequence[TokenRoute]:
        return [TokenRoute(1, 4, torch.arange(request.tokens.shape[1]).expand(BATCH, -1))]

    assert_bit_equal(driven(case, keep_all, checkpointing=checkpointing), plain)


@pytest.mark.usefixtures("nothing_rounded")
def test_the_order_of_the_kept_tokens_changes_nothing(case: Case) -> None:
    router = Router()
    routed = driven(case, router)
    mixed = []
    for route in router.answers[0]:
        order = torch.randperm(route.keep.shape[1], generator=torch.Generator().manual_seed(2))
        mixed.append(replace(route, keep=route.keep[:, order]))
    found = differences(driven(case, lambda _: mixed), routed)
    assert not {name: each for name, each in found.items() if each > 1e-12}


def test_a_dropped_token_passes_as_it_is_and_its_gradient_with_it(case: Case) -> None:
    """A route over all blocks: what it drops reaches the end as it was embedded, its gradient what the end's is."""
    stack = case.stack
    size = stack.embed(**case.inputs).tokens.shape[1]
    keep = torch.arange(0, size, 2).expand(BATCH, -1)
    seen: dict[str, Tensor] = {}
    trampoline = install(case.module, stack)
    trampoline.context = StepContext(router=lambda _: [TokenRoute(0, BLOCKS, keep)])

    def note(name: str, tokens: Tensor) -> Tensor:
        seen[name] = tokens
        tokens.retain_grad()
        return tokens

    def forward(drive: Callable[[Any], Any], *args: Any, **kwargs: Any) -> Any:
        entered = stack.embed(*args, **kwargs)
        left = drive(replace(entered, tokens=note("in", entered.tokens)))
        return stack.unembed(replace(left, tokens=note("out", left.tokens)))

    stack.forward = forward  # type: ignore[method-assign]
    learn(case, lambda inputs: only(case.module(**inputs)))
    dropped = slice(1, None, 2)
    assert torch.equal(seen["in"][:, dropped], seen["out"][:, dropped])
    assert torch.equal(seen["in"].grad[:, dropped], seen["out"].grad[:, dropped])  # type: ignore[index]
    assert not torch.equal(seen["in"][:, ::2], seen["out"][:, ::2])


class Indices(TorchDispatchMode):
    """Notes how many whole numbers each operation writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(found) if isinstance(each, Tensor) and each.dtype == torch.int64]
        self.written += [each.untyped_storage().nbytes() // 8 for each in tensors]
        return found


def test_an_index_is_written_for_each_token_not_for_each_of_its_numbers(case: Case) -> None:
    """Eight bytes for every element of per-token modulation would be more than the modulation itself."""
    with Indices() as indices:
        driven(case, Router(), checkpointing=True)
    size = case.stack.embed(**case.inputs).tokens.shape[1]
    assert 0 < max(indices.written) <= BATCH * size


def test_evaluation_knows_no_routes(case: Case) -> None:
    """In evaluation, and wherever no gradient is wanted, the output is bit by bit that of a network without."""
    trampoline = install(case.module, case.stack)
    with torch.no_grad():
        plain = only(case.module(**case.inputs))
        trampoline.context = StepContext(router=Router())
        assert torch.equal(only(case.module(**case.inputs)), plain)
    case.module.eval()
    assert torch.equal(only(case.module(**case.inputs)).detach(), plain)
    case.module.train()
    assert not torch.equal(only(case.module(**case.inputs)).detach(), plain)
