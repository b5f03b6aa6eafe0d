"""Training of the demo checkpoints, run with ``python run.py train-demo``."""
