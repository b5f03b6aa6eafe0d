"""Plain torch modules with the state-dict keys of the host's networks, so that they train without the host."""
