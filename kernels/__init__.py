"""Fused operations, one folder each: ``reference.py`` is the definition (of ``linear`` it is torch's), the others are fast."""
