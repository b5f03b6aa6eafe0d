"""Fused operations, one folder each: ``reference.py`` says what is computed, the other files compute it fast."""
