"""Plugins that come with the core and are loaded, listed and left out like any other."""

BUILTINS = {
    "full": "tuner.builtin.full:FullPlugin",
    "lora": "tuner.builtin.lora:LoraPlugin",
    "sampling": "tuner.builtin.sampling:SamplingPlugin",
}
"""Plugin name to ``module:Class``."""
