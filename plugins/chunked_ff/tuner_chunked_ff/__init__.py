"""chunked_ff (being built)."""
