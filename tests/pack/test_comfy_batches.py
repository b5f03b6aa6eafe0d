"""A batch of three images with different masks, boxes, prompts and sizes of faces equals three runs of one image.

Image k of a batch has the random numbers that ComfyUI defines: the noise of LatentFromBatch for samplers, and seed + k
where a node of the pack has its own seed. Models are small and random.
"""

import dataclasses
import functools

import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch

from chorus.nodes import NODES
from chorus.nodes.face_refiner import FaceRefiner
from chorus.nodes.masked_token_editing import MaskedTokenDecode, MaskedTokenEdit, MaskedTokenEncode
from chorus.nodes.masked_tokens import MaskedTokenSampler
from chorus.nodes.seed_map import CombineNoise
from chorus.techniques.face_refiner.networks.resnet import ResnetConfig
from chorus.tests.support import tiny_masked_tokens as tiny
from chorus.tests.support.heads import apply_head, head_for
from chorus.tests.support.refiners import OWN, RESNET, box, refiner
from chorus.tests.support.tiny_models import blend, conditioning, defaults, in_inference_mode, ksample, unet, view

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 3
ROUNDING = 5e-4  # relative to the norm of the result
KINDS = {"IMAGE", "MASK", "LATENT", "TOKENS", "BOUNDING_BOX,SEGS"}  # sockets whose values may be batches
# nodes that look at a batch as one
BY_NATURE = {
    "SeedMap": "all references together define one concept; latent_image must be a single latent",
    "SeedSelect": "all references together define one concept; latent_image must be a single latent",
    "BlendGrid": "latent_image must be a single latent",
    "FaceRealismScore": "the distance of two sets of images",
    "TrainCasDMHead": "a training on all latents",
    "TrainFaceRefiner": "a training on all images",
    "TrainMaskedTokenLora": "a training on all images",
    "MaskedTokenVideo": "the images are the frames of one video",
    "SaveTrainingPairs": "writes each image to its own file; see test_comfy_pairs",
    "SaveMaskedTokens": "writes all token grids to one file; see test_comfy_token_files",
}


def random(*shape, seed=0):
    return torch.rand(COUNT, *shape, generator=torch.Generator().manual_seed(seed))


def rows(values, chosen):
    """The ``chosen`` images of a batch: a tensor, or a list with one entry per image."""
    return values[chosen] if isinstance(values, torch.Tensor) else [values[k] for k in chosen]


IMAGES = random(48, 64, 3)
MASKS = torch.zeros(COUNT, 48, 64)
MASKS[0, 4:24, 6:30] = 1.0
MASKS[2, 10:40, 10:20] = MASKS[2, 20:30, 40:60] = 0.7
BOXES = [[box(8, 8, 20, 20), box(30, 6, 14, 30), box(2, 2, 3, 3)], [box(70, 0, 9, 9)], [box(20, 20, 25, 21)]]


class Vision:
    """An image encoder: the mean colours of the quarters of an image."""

    def encode_image(self, x):
        return {"image_embeds": torch.nn.functional.adaptive_avg_pool2d(x.movedim(-1, 1), 2).flatten(1)}


def refined(config=RESNET, boxes=None, masks=None, **inputs):
    """Face Refiner on the chosen images: the images, the mask and the crops of each image."""
    model = dataclasses.replace(refiner(config), dtype=torch.float32)

    @in_inference_mode
    def run(chosen):
        given = {**defaults(FaceRefiner), "image": IMAGES[chosen], "refiner": model, "seed": chosen[0], **inputs}
        if boxes is not None:
            given["bboxes"] = rows(boxes, chosen)
        if masks is not None:
            given["mask"] = masks[chosen]
        image, mask, _, _ = FaceRefiner.execute(**given).args
        return image, mask

    return run


TOKEN_IMAGES, TOKEN_MASKS = random(32, 24, 3, seed=3), torch.zeros(COUNT, 32, 24)
TOKEN_MASKS[0, 4:20, :12] = TOKEN_MASKS[2, 16:, 8:] = 1.0
PINS = tiny.tokens(batch=COUNT, seed=8)
PINS = PINS.with_ids(PINS.ids.where(random(8, 6, seed=9) < 0.3, torch.tensor(tiny.MASK)))
WORDS = [tiny.prompt(k, length=7)[0] for k in range(COUNT)]
MODEL = tiny.tiny_model().model


def generated(image=None, mask=None, pins=None, **inputs):
    """Masked Token Sampler on the chosen images, prompts and tokens: images and ids."""

    def run(chosen):
        given = {"image": image, "mask": mask}
        given = {name: value[chosen] for name, value in given.items() if value is not None}
        if pins is not None:
            given["tokens"] = pins.with_ids(pins.ids[chosen])
        words = dict(positive=rows(WORDS, chosen), negative=tiny.prompt(20))
        size = dict(width=24, height=32, steps=4, seed=chosen[0])
        images, ids, _ = tiny.run(MaskedTokenSampler, model=MODEL, **size, **words, **given, **inputs)
        return images, ids.ids

    return run


def encoded(chosen):
    return (tiny.run(MaskedTokenEncode, model=MODEL, image=TOKEN_IMAGES[chosen])[0].ids,)


def decoded(chosen):
    grids = tiny.tokens(batch=COUNT)
    return tiny.run(MaskedTokenDecode, model=MODEL, tokens=grids.with_ids(grids.ids[chosen]))


def edited(chosen):
    grids, source = tiny.tokens(batch=COUNT), tiny.tokens(batch=COUNT, seed=4)
    given = {name: one.with_ids(one.ids[chosen]) for name, one in {"tokens": grids, "source": source}.items()}
    return (tiny.run(MaskedTokenEdit, mask=TOKEN_MASKS[chosen], **given)[0].ids,)


REGIONS = random(12, 10, seed=5)
REGIONS[0], REGIONS[1, :6] = 0.0, 0.0
PROMPTS, EXPERT_PROMPTS = ((conditioning(i), conditioning(i + 1)) for i in (10, 30))
START = {"samples": torch.zeros(COUNT, 4, 12, 10), "batch_index": list(range(COUNT))}


network = functools.cache(unet)  # by its seed


def sampled(model, chosen):
    """KSampler on the ``chosen`` latents of a batch, as LatentFromBatch selects them."""
    part = {"samples": START["samples"][chosen], "batch_index": [START["batch_index"][k] for k in chosen]}
    return ksample(model, *PROMPTS, part)


def blended(with_region=True, shown=False, **inputs):
    """KSampler with a blend of two experts, one of which has a region for each image."""

    def run(chosen):
        regional = {"region": REGIONS[chosen]} if with_region else {}
        first = blend(network(0), network(1), *EXPERT_PROMPTS, **regional, **inputs)[0]
        model, trace = blend(first, network(2), *EXPERT_PROMPTS, **inputs)
        out = sampled(model, chosen)
        if not shown:
            return (out,)
        sheets, mask, _ = view(trace, {"samples": out})
        # the masks: the line above them has the number of the sample, and rounding moves leads between the bars below
        return sheets[:, 40:220], mask

    return run


def with_head(chosen):
    model = network(0)
    return (sampled(apply_head(model, head_for(model)), chosen),)


def combined(chosen):
    part = {"samples": START["samples"][chosen], "batch_index": [START["batch_index"][k] for k in chosen]}
    noises = [custom.RandomNoise.execute(seed).args[0] for seed in (5, 6)]
    return (CombineNoise.execute(*noises, MASKS[chosen], 0.7).args[0].generate_noise(part),)


FAITHFUL = {"config": ResnetConfig(ngf=4, blocks=2, dropout=True), "faithful": True}
CASES = {
    "FaceRefiner, boxes": refined(boxes=BOXES),
    "FaceRefiner, boxes, none for some": refined(OWN, boxes=[BOXES[0], None, BOXES[2]]),
    "FaceRefiner, largest face": refined(boxes=BOXES, faces="largest", color_lock=False),
    "FaceRefiner, masks": refined(masks=MASKS),
    "FaceRefiner, boxes and masks": refined(OWN, boxes=BOXES, masks=MASKS),
    "FaceRefiner, whole images": refined(OWN),
    "FaceRefiner, structure guard": refined(boxes=BOXES, identity_guard=0.01),
    "FaceRefiner, vision guard": refined(boxes=BOXES, identity_guard=0.001, clip_vision=Vision()),
    "FaceRefiner, faithful with boxes": refined(**FAITHFUL, boxes=BOXES),
    "FaceRefiner, faithful with masks": refined(**FAITHFUL, masks=MASKS),
    "FaceRefiner, faithful on whole images": refined(**FAITHFUL),
    "MaskedTokenSampler, prompts": generated(),
    "MaskedTokenSampler, images": generated(TOKEN_IMAGES, denoise=0.5),
    "MaskedTokenSampler, masks": generated(TOKEN_IMAGES, TOKEN_MASKS),
    "MaskedTokenSampler, masks with denoise": generated(TOKEN_IMAGES, TOKEN_MASKS, denoise=0.5, schedule="linear"),
    "MaskedTokenSampler, tokens": generated(pins=PINS, order="halton"),
    "MaskedTokenSampler, images, masks and tokens": generated(TOKEN_IMAGES, TOKEN_MASKS, PINS),
    "MaskedTokenEncode": encoded,
    "MaskedTokenDecode": decoded,
    "MaskedTokenEdit": edited,
    "SaliencyNoiseBlend, hard": blended(),
    "SaliencyNoiseBlend, soft": blended(mask_mode="soft"),
    "SaliencyNoiseBlend, forced": blended(region_mode="force"),
    "SaliencyNoiseBlend, shares": blended(with_region=False, expert_share=0.3, mask_momentum=0.5),
    "SaliencyNoiseBlend, skipping": blended(skip_below=0.5),
    "SaliencyNoiseBlend, refresh": blended(refresh=2),
    "SaliencyNoiseBlend, mask_refresh": blended(mask_refresh=2),
    "SaliencyNoiseBlend, mask_refresh with skipping": blended(mask_refresh=2, skip_below=0.5),
    # without the empty region of image 0: all sheets of a batch have the same panels
    "SaliencyBlendView": blended(with_region=False, shown=True),
    "CasDMHead": with_head,
    "CombineNoise": combined,
}


@pytest.mark.parametrize("case", CASES)
def test_batch_equals_runs_of_one_image(case):
    run = CASES[case]
    together = run([0, 1, 2])
    for k in range(COUNT):
        alone = run([k])
        assert all(len(part) == 1 for part in alone) and all(len(part) == COUNT for part in together)
        for found, expected in zip(together, alone, strict=True):
            # networks round differently on one image and on three; sampling amplifies the difference
            error = (found[k] - expected[0]).double().norm() / expected[0].double().norm().clamp(min=1.0)
            assert error < ROUNDING, f"image {k}, {found.shape}: {error:.2g}"
    first = together[0].float()
    assert not torch.equal(first[0], first[2])


def test_every_node_that_takes_images_is_tested():
    takes = {
        node.define_schema().node_id
        for node in NODES
        if any(i.get_io_type() in KINDS for i in node.define_schema().inputs)
    }
    tested = {case.split(",")[0] for case in CASES}
    assert takes - tested == set(BY_NATURE)
    assert tested - takes == {"CasDMHead"}  # it takes latents through the sampler
