"""Subject and reference side by side, compared at every step."""
