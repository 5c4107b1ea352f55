"""TREAD: in training, a share of the tokens skips the middle blocks, so a step costs less (arXiv:2501.04765)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from tuner import ConfigError, Plugin, PluginConfig, hookimpl, key
from tuner.errors import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.blocks import RouteRequest, TokenRoute, TokenSelector
    from tuner.config.keys import CoreConfig
    from tuner.model import Model
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
        UNIFORM, "How the kept tokens are chosen: `uniform`, or a name that another plugin's `token_selectors` offers."
    )


class TreadPlugin(Plugin[TreadConfig]):
    """TREAD token routing: a share of the tokens skips the middle blocks in training (arXiv:2501.04765)."""

    requires = frozenset({"model-family"})
    conflicts = frozenset({"token-router"})
    provides = frozenset({"token-router"})
    Config = TreadConfig

    def is_active(self, core: CoreConfig) -> bool:
        """Only with routes: without them no token is dropped."""
        return self.config.tread_config is not None

    @hookimpl
    def token_selectors(self, run: Run) -> Mapping[str, TokenSelector]:
        """Uniform choice."""
        return {UNIFORM: uniform}

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
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """The share of the tokens that each block does not see."""
        if self.config.tread_config is None:
            return {}
        from tuner_tread.ranges import dropped_shares, resolve

        blocks = workload.network.blocks
        return {"dropped": dropped_shares(resolve(self.config.tread_config, blocks), blocks)}

    @hookimpl
    def on_train_start(self, run: Run, model: Model) -> None:
        """Say what the routes leave of the work."""
        if self.config.tread_config is None or not run.is_main:
            return
        from tuner_tread.ranges import remaining_share, resolve

        blocks = model.network.spec.blocks
        ranges = resolve(self.config.tread_config, blocks)
        linear, attention = remaining_share(ranges, blocks)
        run.log.info(
            "TREAD routes over %d of %d blocks leave %.0f %% of the per-token work and %.0f %% of the self-attention",
            sum(route.stop - route.start for route in ranges),
            blocks,
            100 * linear,
            100 * attention,
        )

    @hookimpl
    def route_tokens(self, run: Run, request: RouteRequest) -> Sequence[TokenRoute] | None:
        """Draw the kept tokens of this forward."""
        if self.config.tread_config is None:
            return None
        from tuner_tread.ranges import resolve
        from tuner_tread.routing import draw_routes

        select = run.token_selectors[self.config.tread_selector]
        return draw_routes(run, request, resolve(self.config.tread_config, request.blocks), select)


def uniform(run: Run, request: RouteRequest, purpose: str) -> Tensor:
    """Scores (B, S), uniform in [0, 1): every token is as likely to be kept as any other."""
    from tuner_tread.routing import draw_scores

    return draw_scores(run, request, purpose)
