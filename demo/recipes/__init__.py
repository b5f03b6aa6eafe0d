"""The recipes that made the weights: `python run.py train-demo [names]`. Never imported by the pack itself."""
