"""The five techniques, one folder each. Files named comfy_*.py are adapters to ComfyUI, the others are pure torch."""
