"""Evaluators of images: the image-text encoder, a classifier that is trained independently, and template matching.

The classifier is trained on canvases with one concept, and no training and no score uses it. Template matching compares
an image with the emoji themselves and needs no training. For images of pairs, the classifier sees a crop around the
concept in one half of the image, in which the other half is replaced by the background.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...demo.concepts import COLORS, STYLES, load_concepts
from ...demo.modules import load_vision
from ...training.metrics import join_features
from ..recipes.classifier import named
from ..recipes.lists import RELATIONS
from ..recipes.scenes import SIZE, SIZES_ALONE, SIZES_PAIR, region_of
from ..recipes.seeds import load_classifier
from ..recipes.sprites import Sprites
from ..recipes.vision import SCALE, names

PASS = 64  # images per batch
HALVES = ("left", "right", "upper", "lower")
# indices of HALVES: where a relation places the first and the second concept
PLACES = {"left of": (0, 1), "right of": (1, 0), "above": (2, 3), "below": (3, 2)}
COARSE = 4  # side in pixels of a position of the template matching
SIZES = {"alone": (*SIZES_ALONE, 96), "pair": (*SIZES_PAIR, 60)}  # 96 and 60 are excluded from training
LEAST_EXPLAINED = 0.2  # a template that explains a smaller share of a half's contents does not count as found
LEAST_VISIBLE = 0.02  # a half in which a smaller share of the pixels differs from the background is empty
CONTRAST = 0.12  # difference from the background, from which on a pixel belongs to a concept
FRAME = 1.5  # side of the classifier's crop, relative to the larger side of the concept's bounding box


class Evaluators:
    """The encoder and the classifier, for images with one concept each."""

    def __init__(self) -> None:
        self.vision, self.classifier = load_vision(), load_classifier().cpu()

    @torch.no_grad()
    def measure(self, images: Tensor, concepts: Tensor) -> dict[str, np.ndarray | Tensor]:
        """Features and hits of images [N, 128, 128, 3] in 0..1 with the concepts ``concepts`` [N].

        "encoder features" is the embedding, "encoder layers" the concatenated layers. "classifier" and "encoder" are 1
        for every image whose concept the evaluator recognises.
        """
        rows = []
        for part in images.movedim(-1, 1).split(PASS):
            _, layers, embedding, _ = self.vision.model(pixel_values=2 * part - 1, intermediate_output="all")
            pooled = self.classifier.blocks(2 * part - 1).mean((2, 3))
            layers = join_features([*layers.unbind(1), embedding])
            rows.append((embedding, layers, pooled, self.classifier.head(pooled).argmax(1)))
        embeddings, layers, pooled, predicted = (torch.cat(column) for column in zip(*rows))
        recognised = self.vision.similarity(images, names()).argmax(1)
        return {
            "encoder features": embeddings,
            "encoder layers": layers,
            "classifier features": pooled,
            "classifier": (predicted == concepts).double().numpy(),
            "encoder": (recognised == concepts).double().numpy(),
        }


def numbers_of(concepts: Sequence[str]) -> Tensor:
    """The class numbers [B] of concepts by name."""
    index = {concept.name: n for n, concept in enumerate(load_concepts())}
    return torch.tensor([index[name] for name in concepts])


def backgrounds(images: Tensor) -> Tensor:
    """The backgrounds [N, 128, 128, 3] of images of this shape in 0..1.

    Of all plain colours and gradients of the canvases, it is the one that agrees with the most pixels, shifted by the
    mean difference of these pixels.
    """
    colors = torch.tensor(list(COLORS.values())) / 255
    ramp = torch.linspace(0, 1, SIZE)[None, None, :, None]
    known = (colors[:, None, None] * (1 - ramp) + colors[None, :, None] * ramp).flatten(0, 1)  # [100, S, 3]
    found = []
    for part in images.split(PASS):
        rows = part[:, 2::COARSE, 2::COARSE]
        apart = (rows[:, None] - known[None, :, 2::COARSE, None]).abs().amax(-1)
        best = (apart < 0.5 * CONTRAST).flatten(2).sum(2).argmax(1)
        agree = apart[torch.arange(len(part)), best] < 0.5 * CONTRAST
        background = known[best]
        differences = (rows - background[:, 2::COARSE, None]) * agree[..., None]
        shift = differences.sum((1, 2)) / agree.sum((1, 2))[:, None].clamp(min=1)
        found.append((background + shift[:, None]).clamp(0, 1)[:, :, None].expand_as(part))
    return torch.cat(found)


@dataclass
class Matches:
    """The best templates in R regions of N images: the whole image, or its HALVES.

    ``explained`` [N, R, styles, concepts] is the share of the region's contents (its squared differences from the
    background) that the best template of each style and concept explains. ``places`` [N, R, styles, concepts, 2] is
    the upper left pixel (x, y) of this template.
    """

    explained: Tensor
    places: Tensor

    def concepts(self) -> Tensor:
        """The concept [N, R] of the best template; -1 if it explains less than LEAST_EXPLAINED."""
        score, concept = self.explained.amax(2).max(2)
        return torch.where(score >= LEAST_EXPLAINED, concept, -1)

    def styles(self, concepts: Tensor) -> Tensor:
        """The style [N, R] of the concepts [N]: the style of the concept's best template."""
        return self._of(concepts).argmax(2)

    def scores(self) -> Tensor:
        """The share [N, R] that the best template explains."""
        return self.explained.flatten(2).amax(2)

    def _of(self, concepts: Tensor) -> Tensor:
        index = concepts[:, None, None, None].expand(*self.explained.shape[:3], 1)
        return self.explained.gather(3, index)[..., 0]


class Templates:
    """All emoji in both styles and all skin tones, at the sizes of canvases with one concept or with a pair.

    An image is background + (emoji - coverage x background) at some position. For every template and every position,
    the explained part of the contents is 2 <contents, template> - |template|², the decrease of the squared difference
    if the template is drawn there. Images and templates are compared at a resolution of ``COARSE`` pixels.
    """

    def __init__(self, kind: str = "pair") -> None:
        concepts, sizes = load_concepts(), SIZES[kind]
        self.kind, self.side = kind, max(sizes) // COARSE
        self.room = self.side - min(sizes) // COARSE  # added on the right and below, where small emoji have more places
        found, self.owners = [], []  # templates [4, side, side]; style and concept of each
        for s, style in enumerate(STYLES):
            sprites = Sprites(style)
            for n, concept in enumerate(concepts):
                for tone in ("", *concept.tones):
                    for size in sizes:
                        found.append(self._template(sprites.get(n, tone, size)))
                        self.owners.append(s * len(concepts) + n)
        self.kernels, self.owners = torch.stack(found), torch.tensor(self.owners)
        colors, coverage = self.kernels[:, :3].flatten(2), self.kernels[:, 3:].flatten(2)
        self.squares = colors.square().sum((1, 2)), (colors * coverage).sum(2), coverage.square().sum((1, 2))
        self.kernels[:, 3] *= -1

    def _template(self, sprite: np.ndarray) -> Tensor:
        small = F.avg_pool2d(torch.tensor(sprite).movedim(2, 0)[None] / 255, COARSE)[0]
        room = self.side - small.shape[-1]
        return F.pad(small, (0, room, 0, room))

    @torch.no_grad()
    def match(self, images: Tensor) -> Matches:
        """The matches in images [N, 128, 128, 3] in 0..1: in HALVES for pairs, else in the whole image."""
        parts = [self._match(part, backgrounds(part)) for part in images.split(16)]
        return Matches(torch.cat([p.explained for p in parts]), torch.cat([p.places for p in parts]))

    def _match(self, images: Tensor, background: Tensor) -> Matches:
        image, behind = (F.avg_pool2d(x.movedim(3, 1), COARSE) for x in (images, background))
        contents = image - behind
        energy = contents.square().sum(1)
        layers = F.pad(torch.cat([contents, (contents * behind).sum(1, keepdim=True)], 1), (0, self.room) * 2)
        explained = 2 * F.conv2d(layers, self.kernels) - self._sizes(behind, layers.shape[-1] - self.side + 1)
        found = [self._best(explained, energy, *region) for region in self._regions(explained.shape[-1])]
        return Matches(*(torch.stack(column, 1) for column in zip(*found)))

    def _sizes(self, behind: Tensor, places: int) -> Tensor:
        """|template|² [N, templates, rows, 1] on the background at each row's centre."""
        rows = (torch.arange(places) + self.side // 2).clamp(max=behind.shape[2] - 1)
        color = behind[:, :, rows, 0]  # [N, 3, rows]
        squares, mixed, coverage = self.squares
        size = squares[:, None] - 2 * torch.einsum("tc,ncr->ntr", mixed, color)
        return (size + coverage[:, None] * color.square().sum(1)[:, None])[..., None]

    def _regions(self, places: int) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """The rows and columns of each region's upper left corners, and those of the region itself.

        At most a quarter of a template may be in the other half.
        """
        half, quarter = SIZE // COARSE // 2, self.side // 4
        everything, whole = slice(0, places), slice(0, 2 * half)
        if self.kind == "alone":
            return [((everything, everything), (whole, whole))]
        starts = slice(0, quarter + 1), slice(half - quarter, places)
        halves = slice(0, half), slice(half, 2 * half)
        columns = [((everything, start), (whole, part)) for start, part in zip(starts, halves)]
        return columns + [((start, everything), (part, whole)) for start, part in zip(starts, halves)]

    def _best(
        self, explained: Tensor, energy: Tensor, corners: tuple[slice, slice], region: tuple[slice, slice]
    ) -> tuple[Tensor, Tensor]:
        """``explained`` and ``places`` of ``Matches`` for one region."""
        part = explained[:, :, corners[0], corners[1]]
        best, place = part.flatten(2).max(2)  # [N, templates]
        owners, count = self.owners.expand_as(best), len(STYLES) * len(load_concepts())
        top = torch.full((len(best), count), -math.inf).scatter_reduce(1, owners, best, "amax")
        winner = torch.where(best == top.gather(1, owners), place, -1)
        place = torch.full((len(best), count), -1).scatter_reduce(1, owners, winner, "amax")
        columns = part.shape[-1]
        x, y = place % columns + corners[1].start, place // columns + corners[0].start
        contents = energy[:, region[0], region[1]].sum((1, 2)).clamp(min=1e-3)
        shape = (len(best), len(STYLES), -1)
        return (top / contents[:, None]).view(shape), COARSE * torch.stack([x, y], -1).view(*shape, 2)


def half_crops(images: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Square crops [N, 4, 128, 128, 3] around the concepts in HALVES, and whether [N, 4] a half shows anything.

    A crop has the framing of a canvas with one concept. The other half of the image is replaced by the background.
    """
    crops, shown = [], []
    differs = (images - background).abs().amax(-1) > CONTRAST
    for image, behind, mask in zip(images, background, differs):
        for relation, n in (("left of", 0), ("left of", 1), ("above", 0), ("above", 1)):
            x0, y0, x1, y1 = region_of(relation, n, SIZE)
            alone, inside = behind.clone(), torch.zeros_like(mask)
            alone[y0:y1, x0:x1], inside[y0:y1, x0:x1] = image[y0:y1, x0:x1], mask[y0:y1, x0:x1]
            shown.append(bool(inside.sum() >= LEAST_VISIBLE * inside.numel() / 2))
            crops.append(_framed(alone, inside) if shown[-1] else alone)
    shape = len(images), len(HALVES)
    return torch.stack(crops).unflatten(0, shape), torch.tensor(shown).view(shape)


def _framed(image: Tensor, mask: Tensor) -> Tensor:
    """The square around the bounding box of ``mask`` [128, 128], resized to the size of the image [128, 128, 3]."""
    rows, columns = (mask.sum(axis).float() for axis in (1, 0))
    # a row or column with a single stray pixel does not extend the box
    (top, bottom), (left, right) = (_extent(counts) for counts in (rows, columns))
    side = FRAME * max(bottom - top, right - left)
    centre = torch.tensor([left + right, top + bottom]) / 2
    theta = torch.zeros(1, 2, 3)
    theta[0, 0, 0] = theta[0, 1, 1] = side / SIZE
    theta[0, :, 2] = 2 * centre / SIZE - 1
    grid = F.affine_grid(theta, (1, 3, SIZE, SIZE), align_corners=False)
    found = F.grid_sample(image.movedim(2, 0)[None], grid, padding_mode="border", align_corners=False)
    return found[0].movedim(0, 2)


def _extent(counts: Tensor) -> tuple[int, int]:
    places = (counts >= min(2, float(counts.max()))).nonzero()[:, 0]
    return int(places[0]), int(places[-1]) + 1


class PairEvaluators:
    """Two evaluators of images with two concepts: the classifier, with styles by the encoder, and template matching."""

    def __init__(self) -> None:
        self.vision, self.classifier, self.templates = load_vision(), load_classifier().cpu(), Templates("pair")
        self.styled = self.vision.text_embeds([name for style in STYLES for name in names(style)])

    def measure(
        self, images: Tensor, subjects: Sequence[str], others: Sequence[str], relations: Sequence[str], style: str
    ) -> dict[str, dict[str, np.ndarray]]:
        """{evaluator: {metric: bool [N]}} of images [N, 128, 128, 3]: see ``hits``."""
        subject, other = numbers_of(subjects), numbers_of(others)
        wanted = STYLES.index(style)
        return {
            name: hits(concepts, styles == wanted, subject, other, relations)
            for name, (concepts, styles) in self.found(images, subject).items()
        }

    def found(self, images: Tensor, subject: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """{evaluator: (concepts [N, 4] in HALVES, -1 where there is none; styles [N, 4] of the subject there)}"""
        matches = self.templates.match(images)
        return {
            "classifier": self._classify(images, subject),
            "templates": (matches.concepts(), matches.styles(subject)),
        }

    def probability(
        self, images: Tensor, subjects: Sequence[str], others: Sequence[str], relations: Sequence[str], style: str
    ) -> Tensor:
        """The encoder's mean probability [N] of the two concepts where the relations place them.

        The subject's probability is that of its name in ``style`` among all names in all styles, the other concept's
        that of its name among all names.
        """
        places = torch.tensor([PLACES[relation] for relation in relations])
        found = []
        for part, place, *pair in zip(
            *(values.split(PASS) for values in (images, places, numbers_of(subjects), numbers_of(others)))
        ):
            crops, shown = half_crops(part, backgrounds(part))
            rows = torch.arange(len(part))[:, None]
            similarity = SCALE * self._similarity(crops[rows, place])  # [N, 2, styles, concepts]
            of_subject = similarity[:, 0].flatten(1).softmax(1).unflatten(1, similarity.shape[2:])
            of_other = (SCALE * self.vision.similarity(crops[rows[:, 0], place[:, 1]], names())).softmax(1)
            each = [
                of_subject[:, STYLES.index(style)].gather(1, pair[0][:, None])[:, 0],
                of_other.gather(1, pair[1][:, None])[:, 0],
            ]
            found.append((torch.stack(each, 1) * shown[rows, place]).mean(1))
        return torch.cat(found)

    @torch.no_grad()
    def _classify(self, images: Tensor, subject: Tensor) -> tuple[Tensor, Tensor]:
        concepts, styles = [], []
        for part, number in zip(images.split(PASS), subject.split(PASS)):
            crops, shown = half_crops(part, backgrounds(part))
            predicted = named(self.classifier, 2 * crops.flatten(0, 1).movedim(3, 1) - 1).view(shown.shape)
            concepts.append(torch.where(shown, predicted, -1))
            similarity = self._similarity(crops)
            index = number[:, None, None, None].expand(*similarity.shape[:3], 1)
            styles.append(similarity.gather(3, index)[..., 0].argmax(2))
        return torch.cat(concepts), torch.cat(styles)

    def _similarity(self, crops: Tensor) -> Tensor:
        """The encoder's similarities [N, R, styles, concepts] of crops [N, R, 128, 128, 3] and all styled names."""
        embeds = F.normalize(self.vision.encode_image(crops.flatten(0, 1))["image_embeds"].float().cpu(), dim=-1)
        return (embeds @ self.styled.T).view(*crops.shape[:2], len(STYLES), -1)


def hits(
    concepts: Tensor, styled: Tensor, subject: Tensor, other: Tensor, relations: Sequence[str]
) -> dict[str, np.ndarray]:
    """{metric: bool [N]} for concepts [N, 4] in HALVES. ``styled`` [N, 4]: whether the subject has the wanted style.

    "subject": the subject is in some half, in the wanted style. "scene": both concepts are there, side by side or one
    above the other. "both": scene, with the subject in the wanted style. "placed": both, and the concepts are where
    the relation asks.
    """
    rows = torch.arange(len(concepts))
    first, second = concepts == subject[:, None], concepts == other[:, None]
    places = torch.tensor([PLACES[relation] for relation in RELATIONS])
    pairs = first[:, places[:, 0]] & second[:, places[:, 1]]  # [N, relations]
    in_style = pairs & styled[:, places[:, 0]]
    asked = torch.tensor([RELATIONS.index(relation) for relation in relations])
    found = {
        "subject": (first & styled).any(1),
        "scene": pairs.any(1),
        "both": in_style.any(1),
        "placed": in_style[rows, asked],
    }
    return {metric: values.numpy() for metric, values in found.items()}
