"""TREAD: in training, a share of the tokens skips the middle blocks, so a step costs less (arXiv:2501.04765)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tuner import ConfigError, Plugin, PluginConfig, hookimpl, key
from tuner.errors import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.blocks import RouteRequest, TokenRoute, TokenSelector
    from tuner.config.keys import CoreConfig
    from tuner.data.order import Order
    from tuner.data.samples import Prepared
    from tuner.model import Loss, Model
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload


UNIFORM = "uniform"


class RouteSettings(BaseModel):
    """One route: a share of the tokens skips blocks ``start_layer_idx`` to ``end_layer_idx``, both inclusive."""

    # Strict, so that a stray `true` does not become block 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    selection_ratio: float = Field(ge=0, lt=1, description="Share of the tokens that is dropped; 0.1 keeps 90 %.")
    start_layer_idx: int = Field(description="First routed block; negative counts from the end, -1 is the last.")
    end_layer_idx: int = Field(description="Last routed block, inclusive; negative counts from the end.")


class TreadSettings(BaseModel):
    """The value of ``tread_config``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    routes: tuple[RouteSettings, ...] = Field(min_length=1, description="Routes in the order of the blocks, disjoint.")


class TreadConfig(PluginConfig):
    """The keys of TREAD."""

    tread_config: TreadSettings | None = key(
        None,
        'Token routes, `{"routes": [{"selection_ratio", "start_layer_idx", "end_layer_idx"}, …]}`: in training that '
        "share of the tokens, drawn at random, skips those blocks (both ends inclusive, negative counts from the end). "
        "0.5 halves the per-token work and quarters the self-attention of a routed block.",
    )
    tread_selector: str = key(
        UNIFORM,
        "How the kept tokens are chosen: `uniform`; `motion`, rather those that differ from the frame before; "
        "`salience`, rather those that differ from the clip's mean; or a name that another plugin's `token_selectors` "
        "offers.",
    )
    tread_ratio_schedule: Literal["constant", "linear", "cosine"] = key(
        "constant",
        "How much of every `selection_ratio` counts: all of it in every step; from 0 up to all of it over "
        "`tread_warmup_steps` (`linear`); or all of it at first, along half a cosine down to 0 in the last step "
        "(`cosine`). Both ramps go in sixteenths.",
    )
    tread_warmup_steps: int | None = key(
        None, "Optimizer steps of the ramp of `linear`; a tenth of the run when absent.", ge=1
    )


class TreadPlugin(Plugin[TreadConfig]):
    """TREAD token routing: a share of the tokens skips the middle blocks in training (arXiv:2501.04765)."""

    requires = frozenset({"model-family"})
    conflicts = frozenset({"token-router"})
    provides = frozenset({"token-router"})
    Config = TreadConfig

    def __init__(self, name: str, config: TreadConfig) -> None:
        super().__init__(name, config)
        self._skipped: list[float] = []
        """What each forward of this micro-batch left out."""

    def is_active(self, core: CoreConfig) -> bool:
        """Only with routes: without them no token is dropped."""
        return self.config.tread_config is not None

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse a warm-up that nothing uses, and say of other keys that nothing uses them."""
        config = self.config
        if config.tread_warmup_steps is not None and config.tread_ratio_schedule != "linear":
            raise ConfigError(
                f"tread_warmup_steps is {config.tread_warmup_steps}, and tread_ratio_schedule "
                f"{config.tread_ratio_schedule!r} has no warm-up",
                remedy="set tread_ratio_schedule to linear, or leave tread_warmup_steps out",
            )
        idle = sorted(run.explicit & {"tread_selector", "tread_ratio_schedule", "tread_warmup_steps"})
        if config.tread_config is None and idle:
            run.log.warning("without effect, as there is no tread_config: %s", ", ".join(idle))

    @hookimpl
    def token_selectors(self, run: Run) -> Mapping[str, TokenSelector]:
        """Uniform choice, and two that weigh tokens by what they show."""
        return {UNIFORM: uniform, "motion": motion, "salience": salience}

    @hookimpl
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Refuse routes that do not fit the blocks of one of the networks, and a selector that nobody offers."""
        if self.config.tread_config is None:
            return
        if self.config.tread_selector not in run.token_selectors:
            raise ConfigError(
                f"tread_selector is {self.config.tread_selector!r}, which no loaded plugin offers",
                allowed=sorted(run.token_selectors),
                nearest=nearest(self.config.tread_selector, run.token_selectors),
            )
        from tuner_tread.ranges import resolve

        for network in spec.networks:
            resolve(self.config.tread_config, network.blocks, f"tread_config, for {network.name!r} of {spec.flavour}")

    @hookimpl
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared, plan: Order) -> None:
        """Refuse a warm-up longer than the run, and routes that would keep nothing of one of the clips."""
        config = self.config
        if config.tread_config is None:
            return
        if config.tread_warmup_steps is not None and config.tread_warmup_steps > run.total_steps:
            raise ConfigError(
                f"tread_warmup_steps is {config.tread_warmup_steps}, and the run has {run.total_steps} steps: "
                "the ratio would never be reached",
                remedy="lower tread_warmup_steps, or train longer",
            )
        from tuner_tread.ranges import check_clip, resolve

        for bucket in sorted({sample.bucket for sample in data.samples}):
            latents = spec.latents.shape(bucket.frames, bucket.height, bucket.width)[1:]
            for network in spec.networks:
                ranges = resolve(config.tread_config, network.blocks)
                check_clip(ranges, network.tokens(*latents), f"a clip of {bucket}")

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """The share of the tokens that each block does not see, at the full ratio."""
        if self.config.tread_config is None:
            return {}
        from tuner_tread.ranges import dropped_shares, resolve

        blocks = workload.network.blocks
        return {
            "dropped": dropped_shares(resolve(self.config.tread_config, blocks), blocks),
            "dropped_sometimes": self.config.tread_ratio_schedule != "constant",
        }

    @hookimpl
    def on_train_start(self, run: Run, model: Model) -> None:
        """Say what the routes leave of the work, and when."""
        if self.config.tread_config is None or not run.is_main:
            return
        from tuner_tread.ranges import remaining_share, resolve

        blocks = model.network.spec.blocks
        ranges = resolve(self.config.tread_config, blocks)
        linear, attention = remaining_share(ranges, blocks)
        run.log.info(
            "TREAD routes over %d of %d blocks leave %.0f %% of the per-token work and %.0f %% of the self-attention%s",
            sum(route.stop - route.start for route in ranges),
            blocks,
            100 * linear,
            100 * attention,
            self._when(run),
        )

    @hookimpl
    def route_tokens(self, run: Run, request: RouteRequest) -> Sequence[TokenRoute] | None:
        """Draw the kept tokens of this forward."""
        if self.config.tread_config is None:
            return None
        from tuner_tread.ranges import resolve
        from tuner_tread.routing import draw_routes, skipped

        select = run.token_selectors[self.config.tread_selector]
        ranges = resolve(self.config.tread_config, request.blocks)
        routes = draw_routes(run, request, ranges, select, self._share(run))
        self._skipped.append(skipped(routes, request))
        return routes

    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run) -> Generator[None, Loss, Loss]:
        """Add to a micro-batch's numbers what share of the passes of tokens through blocks its forwards left out."""
        if not self.is_active(run.config):
            return (yield)
        import torch

        self._skipped.clear()
        loss = yield
        mean = sum(self._skipped) / max(1, len(self._skipped))
        return replace(loss, metrics={**loss.metrics, "tread/dropped": torch.tensor(mean)})

    def _share(self, run: Run) -> float:
        """The factor by which every ratio is multiplied in the step at hand."""
        from tuner_tread.schedule import share_at

        config = self.config
        return share_at(config.tread_ratio_schedule, run.step, run.total_steps, config.tread_warmup_steps)

    def _when(self, run: Run) -> str:
        """What the schedule makes of it, for the line at the start."""
        from tuner_tread.schedule import default_warmup

        if self.config.tread_ratio_schedule == "constant":
            return ""
        if self.config.tread_ratio_schedule == "cosine":
            return ", less and less so: in the last steps nothing is dropped, and memory is needed for all tokens"
        steps = self.config.tread_warmup_steps or default_warmup(run.total_steps)
        return f", from step {steps} on: in the first steps nothing is dropped, and memory is needed for all tokens"


def uniform(run: Run, request: RouteRequest, purpose: str) -> Tensor:
    """Scores (B, S), uniform in [0, 1): every token is as likely to be kept as any other."""
    from tuner_tread.routing import draw_scores

    return draw_scores(run, request, purpose)


def motion(run: Run, request: RouteRequest, purpose: str) -> Tensor:
    """Scores (B, S): tokens that differ more from the frame before are more likely to be kept."""
    from tuner_tread import selectors

    return selectors.weighted(run, request, purpose, selectors.motion)


def salience(run: Run, request: RouteRequest, purpose: str) -> Tensor:
    """Scores (B, S): tokens that differ more from the mean of their clip are more likely to be kept."""
    from tuner_tread import selectors

    return selectors.weighted(run, request, purpose, selectors.salience)
