"""SeedSelect: initial noise for what a model rarely generates, found by search and by gradients. Start with select.py."""
