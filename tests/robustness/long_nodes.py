"""Every node that works for long, on tiny models: what it is given, and how it runs as the host runs it.

Call a case's ``run`` in inference mode, as the host does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import folder_paths
import pytest
import torch

from chorus.demo import modules
from chorus.demo.latent import ChorusDemoLatent
from chorus.nodes import NODES, face_refiner_train
from chorus.techniques.face_refiner.networks.patch_discriminator import PatchDiscriminatorConfig
from chorus.techniques.face_refiner.training import base as face_refiner_run
from chorus.techniques.seed_select import comfy_sampler, path, select
from chorus.tests.cas_dm.test_comfy_training import latents, train
from chorus.tests.face_refiner.test_comfy_nodes import refiner as face_refiner
from chorus.tests.face_refiner.test_comfy_training import images, tinted
from chorus.tests.face_refiner.test_comfy_training import train as train_refiner
from chorus.tests.robustness.remains import same_bits
from chorus.tests.support import tiny_masked_tokens as tiny
from chorus.tests.support.gradients import tiny_encoder
from chorus.tests.support.heads import head_for, put
from chorus.tests.support.refiners import OWN, box
from chorus.tests.support.tiny_models import blend, conditioning, defaults, ksample, latent, lora, unet

NODE = {node.define_schema().node_id: node for node in NODES}
WORDS, OTHER_WORDS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30)]


@dataclass(frozen=True)
class Case:
    run: Callable[[], object]  # what comes out of the node, to compare
    wired: tuple = ()  # models, VAEs, encoders
    draws: bool = False  # from the process's generators; see Remains.check
    cancel_keeps: bool = False  # the best so far, and goes on
    learns: bool = False  # Cancel writes what was learned
    slow: bool = False


def sampled(model, **sampling) -> Callable[[], object]:
    return lambda: ksample.__wrapped__(model, *WORDS, latent(1, 8, 8), **{"steps": 3, **sampling})


def two_models() -> Case:
    base, expert = unet(0), unet(1)
    blended, _ = blend(base, expert, *OTHER_WORDS)
    return Case(sampled(blended), (blended, base, expert), True)


def three_models() -> Case:
    """Two stacks of LoRAs on one checkpoint, and another checkpoint."""
    first = unet(0)
    base, stack, other = lora(first, 1), lora(first, 2), unet(1)
    chained, _ = blend(base, stack, *OTHER_WORDS)
    blended, _ = blend(chained, other, *OTHER_WORDS, mask_mode="soft")
    return Case(sampled(blended), (blended, base, stack, other), True)


def savings() -> Case:
    """A region and its crop, refresh and skip, two predictions a step."""
    base, painter, rare = unet(0), unet(1), unet(2)
    left = (torch.arange(8) < 4).float().expand(1, 8, 8).clone()
    chained, _ = blend(base, painter, *OTHER_WORDS, region=left, crop_margin=1, refresh=2)
    blended, _ = blend(chained, rare, *OTHER_WORDS, skip_below=0.9, bias=-1.0, expert_cfg=3.0)
    return Case(sampled(blended, sampler="heun", steps=5), (blended, base, painter, rare), True)


def head() -> Case:
    """A Cas-DM head on a blend."""
    base, expert = unet(0), unet(1)
    blended, _ = blend(base, expert, *OTHER_WORDS)
    worn = put(blended, head_for(base))
    return Case(sampled(worn), (worn, base, expert), True)


class Scaled(ChorusDemoLatent):
    scale_factor = 0.5


def seeds(count=1, **inputs) -> Callable[[], Case]:
    def make() -> Case:
        model, vision = unet(0, latent_format=Scaled), tiny_encoder()
        with torch.inference_mode():
            vae = modules.make_vae(modules.load_vae_module())
        coarse = torch.rand(count, 3, 5, 4, generator=torch.Generator().manual_seed(4))
        reference = torch.nn.functional.interpolate(coarse, (50, 40), mode="bilinear").movedim(1, -1).contiguous()
        wired = dict(model=model, positive=WORDS[0], negative=WORDS[1], latent_image=latent(height=4, width=4), vae=vae)
        settings = dict(steps=2, cfg=3.0, candidates=2, survivors=0.5, first_steps=1, iterations=1, seed=5)
        node = NODE["SeedSelect"]
        given = {**defaults(node), **wired, "references": reference, "clip_vision": vision, **settings, **inputs}

        def run():
            noise, seed, samples, grid, preview, report = node.execute(**given).args
            return [noise.noise, seed, samples["samples"], grid, preview, report]

        return Case(run, (model, vae, vision), True, cancel_keeps=True, slow=True)

    return make


def node_on(name: str, model, **inputs) -> Callable[[], object]:
    return lambda: [getattr(out, "ids", out) for out in tiny.run(NODE[name], model=model, **inputs)]


def tokens_sampled() -> Case:
    model, mask = tiny.tiny_model().model, torch.zeros(1, 32, 24)
    mask[:, 6:19, 5:14] = 1.0
    inputs = dict(positive=tiny.prompt(1), negative=tiny.prompt(2), steps=4, seed=4, batch_size=2)
    return Case(node_on("MaskedTokenSampler", model, **inputs, image=tiny.picture(), mask=mask), (model,))


def tokens_encoded() -> Case:
    model = tiny.tiny_model().model
    model.vq.get_free_memory = lambda device: 1  # one picture at a time
    return Case(node_on("MaskedTokenEncode", model, image=tiny.picture(batch=3)), (model,))


def tokens_decoded() -> Case:
    model = tiny.tiny_model().model
    model.vq.get_free_memory = lambda device: 1
    return Case(node_on("MaskedTokenDecode", model, tokens=tiny.tokens(batch=3)), (model,))


def tokens_trained() -> Case:
    model = tiny.tiny_model().model
    inputs = dict(images=tiny.picture(16, 16), positive=tiny.prompt(7, 3), resolution=16, rank=2, alpha=2.0, steps=2)

    def run():
        learned, losses, report = tiny.run(NODE["TrainMaskedTokenLora"], model=model, learning_rate=1e-2, **inputs)
        return [learned.weights, losses, report]

    return Case(run, (model,), learns=True, slow=True)


def head_trained() -> Case:
    model, vision = unet(0, latent_format=Scaled), tiny_encoder()
    with torch.inference_mode():
        vae = modules.make_vae(modules.load_vae_module())
    given = dict(
        steps=3, metric="clip_vision", vae=vae, clip_vision=vision, crop=16, validation_fraction=0.0, cached_steps=1
    )

    def run():
        found = train.__wrapped__(model, latents(2, 12, (4, 4)), **given)
        return [found.head.weights, found.loss_map, found.report]

    return Case(run, (model, vae, vision), True, learns=True, slow=True)


def refiner_trained(pairing: str) -> Callable[[], Case]:
    def make() -> Case:
        vision, source = tiny_encoder(), images(3)
        given = dict(pairing=pairing, steps=2, metric="clip_vision", clip_vision=vision, architecture="residual")

        def run():
            found = train_refiner.__wrapped__(source, tinted(source), **given)
            return [found.refiner.patcher.model.state_dict(), found.loss_map, found.report]

        return Case(run, (vision,), True, learns=True, slow=True)

    return make


def faces() -> Case:
    """Two faces in each of two pictures, one at a time, held by an encoder."""
    model, vision = face_refiner(OWN), tiny_encoder()
    model.patcher.get_free_memory = lambda device: 1
    image = torch.rand(2, 48, 64, 3, generator=torch.Generator().manual_seed(3))
    boxes = [[box(8, 8, 20, 20), box(36, 16, 20, 24)]] * 2
    node = NODE["FaceRefiner"]
    given = {**defaults(node), "image": image, "refiner": model, "bboxes": boxes, "clip_vision": vision}
    given |= dict(identity_guard=0.05)
    return Case(lambda: list(node.execute(**given).args), (model.patcher, vision))


def realism() -> Case:
    vision, generator = tiny_encoder(), torch.Generator().manual_seed(1)
    sets = [[torch.rand(20, 32, 32, 3, generator=generator)] for _ in range(3)]
    node = NODE["FaceRealismScore"]
    return Case(lambda: list(node.execute(sets[0], sets[1], [vision], source=sets[2], blocks=[4]).args), (vision,))


def pairs() -> Case:
    generator = torch.Generator().manual_seed(2)
    source, target = (torch.rand(3, 6, 5, 3, generator=generator) for _ in range(2))
    node = type("Node", (NODE["SaveTrainingPairs"],), {"hidden": None})

    def run():
        shown = node.execute(source=[source], target=[target], folder=["pairs"], prompt=["a face"]).ui["images"]
        folder = Path(folder_paths.get_output_directory())
        return [(folder / one["subfolder"] / one["filename"]).read_bytes() for one in shown]

    return Case(run)


CASES = {
    "blend of 2": two_models,
    "blend of 3": three_models,
    "blend with region, crop, refresh, skip": savings,
    "Cas-DM head on a blend": head,
    "SeedSelect search": seeds(),
    "SeedSelect optimize": seeds(mode="optimize"),
    "SeedSelect search+optimize": seeds(mode="search+optimize"),
    "SeedSelect inversion": seeds(start="inversion", candidates=1),
    "SeedSelect centroid": seeds(2, start="centroid", mode="optimize"),
    "MaskedTokenSampler": tokens_sampled,
    "MaskedTokenEncode": tokens_encoded,
    "MaskedTokenDecode": tokens_decoded,
    "TrainMaskedTokenLora": tokens_trained,
    "TrainCasDMHead": head_trained,
    "TrainFaceRefiner paired": refiner_trained("paired"),
    "TrainFaceRefiner unpaired": refiner_trained("unpaired"),
    "FaceRefiner": faces,
    "FaceRealismScore": realism,
    "SaveTrainingPairs": pairs,
}


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """Empty folders in place of the host's; its output folder is returned."""
    for kind in ("input", "output", "temp"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return tmp_path / "output"


@pytest.fixture
def small(monkeypatch) -> None:
    """Few weights and steps where the nodes have no widget for it."""
    monkeypatch.setitem(face_refiner_train.ARCHITECTURES, "residual", OWN)
    monkeypatch.setattr(face_refiner_run, "PatchDiscriminatorConfig", partial(PatchDiscriminatorConfig, ndf=8))
    monkeypatch.setattr(comfy_sampler, "INVERSION_STEPS", 3)
    known: list = []  # centroids take a second each, and are of the same noises in every run

    def centroid(noises):
        for asked, found in known:
            if same_bits(asked, list(noises)):
                return found
        known.append(([x.clone() for x in noises], path.norm_aware_centroid(noises)))
        return known[-1][1]

    monkeypatch.setattr(select, "norm_aware_centroid", centroid)
