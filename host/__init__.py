"""Adapters to ComfyUI that several techniques share."""
