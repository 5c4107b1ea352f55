"""quantization (being built)."""
