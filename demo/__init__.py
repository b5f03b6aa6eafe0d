"""Small trained checkpoints that ship with the pack, and the code that loads them."""
