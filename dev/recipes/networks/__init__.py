"""Plain torch networks with the state-dict keys of ComfyUI's networks, so that training does not need ComfyUI."""
