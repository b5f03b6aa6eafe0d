"""SeedSelect: initial noise for rare concepts, found by search and by gradients. Start with select.py."""
