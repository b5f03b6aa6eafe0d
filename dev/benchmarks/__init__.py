"""Benchmark scripts, one per claim. Each prints its results and writes them to results/ with machine and versions."""
