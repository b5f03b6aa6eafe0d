"""Development: benchmarks, recipes of the demo weights, tools of run.py. Not packed in releases."""
