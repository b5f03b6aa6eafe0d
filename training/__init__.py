"""Loops, losses and statistics that the training nodes, the recipes and the benchmarks share."""
