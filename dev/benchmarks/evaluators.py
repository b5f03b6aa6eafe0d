"""Two evaluators of images with one concept each: the image-text encoder, and a classifier trained independently."""

import numpy as np
import torch

from ...demo.modules import load_vision
from ..old_world.concept_network import load_concept_classifier as load_classifier
from ..old_world.encoder import seen_by
from ..old_world.evaluate import ranks_of

PASS = 64  # images per batch


class Evaluators:
    """The encoder and the classifier."""

    def __init__(self):
        self.vision, self.classifier = load_vision(), load_classifier()

    def measure(self, images: torch.Tensor, concepts: torch.Tensor) -> dict[str, np.ndarray | torch.Tensor]:
        """Features and hits of images [N, 64, 64, 3] in 0..1 with the concepts ``concepts`` [N].

        "encoder features" is the embedding, "encoder layers" the concatenated layers. "classifier" and "encoder" are 1
        for every image whose concept the evaluator recognises.
        """
        rows = []
        for part in images.movedim(-1, 1).split(PASS):
            layers, embedding = seen_by(self.vision.model, 2 * part - 1)
            pooled = self.classifier.blocks(2 * part - 1).mean((2, 3))
            rows.append((embedding, layers, pooled, self.classifier.head(pooled).argmax(1)))
        embeddings, layers, pooled, predicted = (torch.cat(column) for column in zip(*rows))
        return {
            "encoder features": embeddings,
            "encoder layers": layers,
            "classifier features": pooled,
            "classifier": (predicted == concepts).double().numpy(),
            "encoder": (ranks_of(self.vision, images, concepts)[0] == 0).double().numpy(),
        }
