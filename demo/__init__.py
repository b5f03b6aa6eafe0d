"""Small trained checkpoints that come with the pack, and the recipes that made them."""
