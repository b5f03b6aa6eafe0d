"""The recipes that made the weights: `python run.py train-demo --old [names]`. Never imported by the pack itself."""
