"""What the demo's image encoder sees, for metrics and evaluators."""

from ...training.metrics import join_features


def seen_by(encoder, pixels):
    """Of ``pixels`` [B, 3, 64, 64] in -1..1: its layers [B, D] as the training nodes join them, and its embedding [B, 64]."""
    _, layers, embedding, _ = encoder(pixel_values=pixels, intermediate_output="all")
    return join_features([*layers.unbind(1), embedding]), embedding
