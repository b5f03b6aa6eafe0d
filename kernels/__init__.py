"""Fused operations, one folder each.

In each folder, ``reference.py`` defines the operation, and the other files compute the same result faster. ``linear``
has no such file: its definition is ``F.linear``.
"""
