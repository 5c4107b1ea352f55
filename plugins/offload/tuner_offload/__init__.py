"""offload (being built)."""
