"""CasDMHead (Cas-DM): a small head that corrects x0 where a perceptual metric counts. Start with mix.py."""
