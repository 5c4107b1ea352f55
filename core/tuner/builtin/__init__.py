"""Plugins that come with the core and are loaded, listed and left out like any other."""

BUILTINS = {
    "adapter_formats": "tuner.builtin.adapter_formats:AdapterFormatsPlugin",
    "checkpointing": "tuner.builtin.checkpointing:CheckpointingPlugin",
    "data_report": "tuner.builtin.data_report:DataReportPlugin",
    "datasets": "tuner.builtin.datasets:DatasetsPlugin",
    "ema": "tuner.builtin.ema:EmaPlugin",
    "encoding": "tuner.builtin.encoding:EncodingPlugin",
    "epochs": "tuner.builtin.epochs:EpochsPlugin",
    "exact_attention": "tuner.builtin.exact_attention:ExactAttentionPlugin",
    "full": "tuner.builtin.full:FullPlugin",
    "gradient_release": "tuner.builtin.gradient_release:GradientReleasePlugin",
    "lora": "tuner.builtin.lora:LoraPlugin",
    "metrics": "tuner.builtin.metrics:MetricsPlugin",
    "noise_levels": "tuner.builtin.noise_levels:NoiseLevelsPlugin",
    "optimizers": "tuner.builtin.optimizers:OptimizersPlugin",
    "pending": "tuner.builtin.pending:PendingPlugin",
    "planner": "tuner.builtin.planner:PlannerPlugin",
    "prior_preservation": "tuner.builtin.prior:PriorPreservationPlugin",
    "sampling": "tuner.builtin.sampling:SamplingPlugin",
    "save_points": "tuner.builtin.save_points:SavePointsPlugin",
    "sharding": "tuner.builtin.sharding:ShardingPlugin",
    "sources": "tuner.builtin.sources:SourcesPlugin",
    "status": "tuner.builtin.status:StatusPlugin",
    "trackers": "tuner.builtin.trackers:TrackersPlugin",
    "watchdog": "tuner.builtin.watchdog:WatchdogPlugin",
}
"""Plugin name to ``module:Class``."""
