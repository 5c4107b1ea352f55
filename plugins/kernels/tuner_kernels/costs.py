"""What a fused block holds of each token, and which product its recomputation leaves out: no torch, no weights.

The figures are sums over the tensors that this plugin's functions save, and agree with counts of live bytes on fake
tensors of real dimensions (see docs/memory-model.md). The unit is a tensor (B, S, D) in the activations' type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

from tuner.spec import Activations, Held, NetworkSpec
from tuner.workload import Workload

PIECE_TOKENS = 4096
"""Of a clip, which the feed-forward of a checkpointed block computes together."""
BLOCK, TEXT = "WanTransformerBlock", "text"
NORMED = frozenset({"attn1", "attn2.to_q"})
SELF_OUTPUT, CROSS_OUTPUT = "output of self-attention", "output of cross-attention"
WIDENS, NARROWS = "ffn.net.0.proj", "ffn.net.2"
"""What the family calls the block, what its matrices are given, and the matrices of its feed-forward."""
FLOAT32 = 2
"""Units of a tensor in it."""
FACTORS, SCALE = 6 * FLOAT32, FLOAT32
"""Units of modulation where each token has a time: all six factors, of which views are kept, and 1 + scale."""
Apart = Literal["nothing", "lora", "matrices"]
"""What is left to its own modules: nothing, matrices with LoRA, or every matrix."""


def is_of_wan(network: NetworkSpec) -> bool:
    """Whether ``network`` consists of the blocks that are computed here."""
    return any(BLOCK in each.within for each in network.linears)


def activations(
    workload: Workload, tokens: int, checkpointed: bool, *, kernels: bool, apart: Apart = "nothing"
) -> Activations:
    """What a fused block holds of each of the ``tokens`` of a clip that it sees.

    Arguments
        kernels: whether Triton's kernels compute it, not torch's own operations.
    """
    return _Block(workload, tokens, checkpointed, kernels, apart).activations()


@dataclass(frozen=True)
class _Block:
    """A fused block in one kind of step."""

    workload: Workload
    tokens: int
    checkpointed: bool
    kernels: bool
    apart: Apart

    def activations(self) -> Activations:
        chunks = self._chunks
        before = self._before_feed_forward
        kept = Held(before + 1 + (chunks > 1) + SCALE * self._timed, wide=not (self._in_pieces or chunks > 1))
        behind = (Held(units - kept.dim, wide=-kept.wide) for units in self._behind_feed_forward())
        return Activations(
            kept=kept,
            forward=Held(dim=1, wide=2 / chunks) if chunks > 1 else Held(dim=2, wide=1),
            recompute=(),
            backward=(*self._feed_forward_backward(), *behind),
            inference=tuple(self._inference()),
            context=Held(dim=2 if self._turns_again else 3),
            inputs=self._inputs,
            once=frozenset({NARROWS} if self._in_pieces else ()),
            companions=self._companions,
        )

    @property
    def _companions(self) -> float:
        """Bytes of cosine and sine, in float32."""
        return 8 * self.workload.network.dim / self.workload.network.heads

    @property
    def _multiplies(self) -> bool:
        """Whether matrices without LoRA are multiplied here: those that are in the activations' type."""
        return self.apart != "matrices" and self.workload.weight_bytes == self.workload.activation_bytes

    @property
    def _in_pieces(self) -> bool:
        """Whether the feed-forward is computed here, and made again in backward."""
        free = self.workload.feed_forward_tokens is None
        plain = self._multiplies and not (self.apart == "lora" and self._feed_forward_adapted)
        return self.checkpointed and free and plain and not self._adapted_otherwise

    @property
    def _feed_forward_adapted(self) -> bool:
        return bool({WIDENS, NARROWS} & self.workload.adapted_inputs)

    @property
    def _adapted_otherwise(self) -> bool:
        """Whether the feed-forward has adapters that name no inputs: more is adapted than attention has."""
        attention = sum(each.inputs for each in self.workload.network.linears if each.over == "tokens")
        attention -= sum(each.inputs for each in self.workload.network.linears if each.name in (WIDENS, NARROWS))
        return not self.workload.adapted_inputs and self.workload.adapted_width > attention

    @property
    def _chunks(self) -> int:
        """Of a feed-forward that is chunked by its own key."""
        limit = self.workload.feed_forward_tokens
        return 1 if limit is None else ceil(self.tokens / limit)

    @property
    def _timed(self) -> bool:
        return self.workload.network.per_token_times and self.workload.shape[0] > 1

    @property
    def _turns_again(self) -> bool:
        """Whether queries and keys are turned again in backward."""
        return self.kernels and self.checkpointed

    @property
    def _own(self) -> int:
        """Units that are there throughout: modulation, and the input where no recomputation begins with it."""
        return (not self.checkpointed) + (FACTORS + SCALE) * self._timed

    @property
    def _before_feed_forward(self) -> int:
        """Units kept before the input of the feed-forward.

        Queries, keys, values and output of self-attention, the sum after it, queries and output of cross-attention;
        queries and keys a second time as they are turned; what attention to embedded frames gives.
        """
        frames = bool(self.workload.network.image_tokens)
        return self._own + 7 + 3 * (not self._turns_again) + frames

    def _behind_feed_forward(self) -> Iterator[float]:
        """Units held at the worst moments of backward behind the feed-forward.

        In cross-attention the gradients of the sum, of its output and of queries, summed in float32, and queries that
        are turned again; in self-attention the same; in torch's own operations norms in float32.
        """
        yield self._before_feed_forward + 3 + FLOAT32 + self._turns_again
        yield self._own + 11 + FLOAT32
        if not self.kernels:
            yield self._own + 9 + 3 * FLOAT32
            if not self._in_pieces:
                yield self._before_feed_forward + 3 + 3 * FLOAT32

    def _feed_forward_backward(self) -> Iterator[Held]:
        """Beside what is kept, the gradient that comes in among it."""
        if self._chunks > 1:
            # Every chunk keeps what LoRA is given beside what is multiplied, and its gradient waits for the others'.
            share = 1 / self._chunks
            yield Held(dim=3 - 2 * share, wide=(3 + self._feed_forward_adapted) * share)
        elif self._in_pieces:
            share = 1 / ceil(self.tokens / PIECE_TOKENS)
            adapted = NARROWS in self.workload.adapted_inputs
            yield Held(dim=2 + (1 + adapted) * share, wide=3 * share)
            if not self.kernels:
                yield Held(dim=2 + (2 + 3 * FLOAT32) * share, wide=share)
        else:
            yield Held(dim=1, wide=2)
            yield Held(dim=3, wide=1)

    def _inference(self) -> Iterator[Held]:
        """Without gradients: the network's input and the block's, and what is at work."""
        own = (FACTORS + SCALE) * self._timed
        yield Held(dim=4 + own, wide=2)
        yield Held(dim=8 + own if self.kernels else 8 + own + 2 * FLOAT32)
        yield Held(dim=2 + 2 * FACTORS * self._timed)

    @property
    def _inputs(self) -> frozenset[str]:
        """Of matrices, that LoRA keeps no copy of: kept anyway, or made again."""
        found = {TEXT, SELF_OUTPUT}
        if not self.workload.network.image_tokens:  # whose sum with what the text gives is nobody else's
            found.add(CROSS_OUTPUT)
        if self.checkpointed and self._multiplies and self.apart == "nothing":
            found |= NORMED
        if self._in_pieces or self._chunks > 1:
            found |= {WIDENS, NARROWS}
        return frozenset(found)
