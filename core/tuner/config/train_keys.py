"""Core keys about optimisation, noise, length of the run, checkpoints and output."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tuner.plugin import PluginConfig, key


class TrainKeys(PluginConfig):
    """Length, batches, optimizer, schedule, gradients, output and resuming."""

    output_dir: Path = key(Path("output"), "Folder for checkpoints, LoRA files, validation media and the log.")
    seed: int = key(42, "Seed of everything random.", ge=0)
    max_train_steps: int = key(0, "Optimizer steps; 0 derives them from `num_train_epochs`.", ge=0)
    num_train_epochs: int = key(0, "Passes over the data; 0 derives them from `max_train_steps`.", ge=0)
    ignore_final_epochs: bool = key(
        False, "With both lengths given, let `max_train_steps` alone end the run.", aliases=("strict_epoch_limit_off",)
    )
    train_batch_size: int = key(1, "Samples per micro-batch and process.", ge=1)
    gradient_accumulation_steps: int = key(1, "Micro-batches per optimizer step and process.", ge=1)
    context_parallel_size: int = key(
        1, "Processes that share each sample, each with a part of its tokens: for videos too long for one GPU.", ge=1
    )
    optimizer: str = key("adamw", "Optimizer, such as `adamw`, `optimi-lion`, `bnb-adamw8bit`: see the docs.")
    optimizer_config: dict[str, Any] = key({}, 'Options passed to the optimizer, such as `{"weight_decay": 0.01}`.')
    learning_rate: float = key(1e-4, "Base learning rate.", gt=0)
    lr_scheduler: str = key("constant_with_warmup", "Learning-rate curve over the run, such as `cosine`: see the docs.")
    lr_warmup_steps: int = key(0, "Steps of linear warm-up from 0. As long as the run: no warm-up.", ge=0)
    lr_end: float = key(0.0, "Learning rate that the curve falls to.", ge=0)
    max_grad_norm: float = key(1.0, "Clip gradients to this; 0 does not clip.", ge=0)
    grad_clip_method: Literal["norm", "value"] = key(
        "norm", "`norm`: the global L2 norm; `value`: every element to ±`max_grad_norm`."
    )
    nonfinite: Literal["stop", "skip"] = key("stop", "On a non-finite loss or gradient: end the run, or skip the step.")
    checkpoint_step_interval: int = key(
        500, "Steps between checkpoints; 0 saves only at the end.", ge=0, aliases=("checkpointing_steps",)
    )
    checkpoints_total_limit: int = key(0, "Keep this many newest checkpoints; 0 keeps all.", ge=0)
    resume_from_checkpoint: str | None = key(
        None,
        "`latest`: the newest whole checkpoint in `output_dir`; or the path of one; or `hub:owner/name`, on the hub.",
    )
    logging_steps: int = key(1, "Steps between lines of the local log.", ge=1)


BETA = {"flow_use_beta_schedule": (True,)}
"""Keys of the beta distribution are read beside this."""


class FlowKeys(PluginConfig):
    """Flow matching: which noise levels are trained, and the loss."""

    flow_schedule_shift: float | None = key(
        None, "Shift s of the noise levels: sigma' = s*sigma / (1 + (s-1)*sigma). None shifts nothing.", gt=0
    )
    flow_schedule_auto_shift: bool = key(False, "Derive the shift from the tokens; excludes `flow_schedule_shift`.")
    flow_sigmoid_scale: float = key(1.0, "Width of the logit-normal distribution of noise levels.", gt=0)
    flow_use_uniform_schedule: bool = key(False, "Draw noise levels uniformly.")
    flow_use_beta_schedule: bool = key(False, "Draw noise levels from a beta distribution.")
    flow_beta_schedule_alpha: float = key(2.0, "Alpha of that beta distribution.", gt=0, needs=BETA)
    flow_beta_schedule_beta: float = key(2.0, "Beta of that beta distribution.", gt=0, needs=BETA)
    flow_custom_timesteps: list[float] | None = key(
        None, "Train on these timesteps (0 to 1000) only, drawn uniformly.", aliases=("flux_custom_timesteps",)
    )
    flow_custom_timesteps_order: Literal["random", "round_robin"] = key(
        "random", "Draw from `flow_custom_timesteps`, or take them in turn over samples and steps."
    )
    loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = key(
        "none",
        "Weight of a sample's loss by its noise level s (arXiv:2403.03206): `sigma_sqrt` is s^-2 (s at least 0.001), "
        "`cosmap` 2 / (pi (1 - 2s + 2s^2)).",
    )
    loss_type: Literal["l2", "huber", "smooth_l1"] = key("l2", "Distance between prediction and target.")
    huber_c: float = key(
        0.1, "Constant c of `huber` and `smooth_l1`.", gt=0, needs={"loss_type": ("huber", "smooth_l1")}
    )
