"""How the weights of the demo checkpoints are made: ``python run.py train-demo``."""
