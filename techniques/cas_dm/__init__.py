"""CasDMHead (Cas-DM): a small network, trained with a perceptual metric, corrects a model's x0. Start with mix.py."""
