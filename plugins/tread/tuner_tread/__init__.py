"""tread (being built)."""
