"""wan (being built)."""
