"""Training of face refiners, on paired and on unpaired images."""
