"""attention (being built)."""
