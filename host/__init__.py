"""The only room that talks to ComfyUI's internals."""
