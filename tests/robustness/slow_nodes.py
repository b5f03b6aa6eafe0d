"""Every node with a long computation, on tiny models, called as ComfyUI calls it.

Call a case's ``run`` in inference mode, as ComfyUI does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import folder_paths
import pytest
import torch

from chorus.demo import modules
from chorus.nodes import NODES, face_refiner_train
from chorus.techniques.face_refiner.networks.patch_discriminator import PatchDiscriminatorConfig
from chorus.techniques.face_refiner.training import base as face_refiner_run
from chorus.techniques.seed_select import comfy_sampler, path, select
from chorus.techniques.seed_select.comfy_files import SeedNoise
from chorus.tests.robustness.leak_check import same_bits
from chorus.tests.support import tiny_masked_tokens as tiny
from chorus.tests.support.gradients import tiny_encoder
from chorus.tests.support.head_training import Scaled, latents, train
from chorus.tests.support.heads import apply_head, head_for
from chorus.tests.support.refiner_training import images, tinted
from chorus.tests.support.refiner_training import train as train_refiner
from chorus.tests.support.refiners import OWN, box
from chorus.tests.support.refiners import refiner as face_refiner
from chorus.tests.support.tiny_models import blend, conditioning, defaults, ksample, latent, lora, unet

NODE = {node.define_schema().node_id: node for node in NODES}
WORDS, OTHER_WORDS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30)]


@dataclass(frozen=True)
class Case:
    run: Callable[[], object]  # returns the node's outputs, which the tests compare
    wired: tuple = ()  # the models, VAEs and encoders that the node uses, for LeakCheck
    uses_global_rng: bool = False  # the run changes global random states, see LeakCheck.check
    cancel_returns_best: bool = False  # Cancel returns the best result so far, and the workflow continues
    is_training: bool = False  # Cancel writes the weights trained so far
    slow: bool = False


def sampled(model, **sampling) -> Callable[[], object]:
    return lambda: ksample.__wrapped__(model, *WORDS, latent(1, 8, 8), **{"steps": 3, **sampling})


def two_models() -> Case:
    base, expert = unet(0), unet(1)
    blended, _ = blend(base, expert, *OTHER_WORDS)
    return Case(sampled(blended), (blended, base, expert), True)


def three_models() -> Case:
    """A blend of two different LoRAs on one checkpoint, and of another checkpoint."""
    first = unet(0)
    base, stack, other = lora(first, 1), lora(first, 2), unet(1)
    chained, _ = blend(base, stack, *OTHER_WORDS)
    blended, _ = blend(chained, other, *OTHER_WORDS, mask_mode="soft")
    return Case(sampled(blended), (blended, base, stack, other), True)


def cheap_blend() -> Case:
    """A blend that saves evaluations by crop_margin, refresh and skip_below. The sampler heun makes two calls per step."""
    base, first, second = unet(0), unet(1), unet(2)
    left = (torch.arange(8) < 4).float().expand(1, 8, 8).clone()
    chained, _ = blend(base, first, *OTHER_WORDS, region=left, crop_margin=1, refresh=2)
    blended, _ = blend(chained, second, *OTHER_WORDS, skip_below=0.9, bias=-1.0, expert_cfg=3.0)
    return Case(sampled(blended, sampler="heun", steps=5), (blended, base, first, second), True)


def head() -> Case:
    """A Cas-DM head on a blend."""
    base, expert = unet(0), unet(1)
    blended, _ = blend(base, expert, *OTHER_WORDS)
    with_head = apply_head(blended, head_for(base))
    return Case(sampled(with_head), (with_head, base, expert), True)


def seeds(count=1, **inputs) -> Callable[[], Case]:
    def make() -> Case:
        model, vision = unet(0, latent_format=Scaled), tiny_encoder()
        with torch.inference_mode():
            vae = modules.make_vae(modules.load_autoencoder())
        coarse = torch.rand(count, 3, 5, 4, generator=torch.Generator().manual_seed(4))
        reference = torch.nn.functional.interpolate(coarse, (50, 40), mode="bilinear").movedim(1, -1).contiguous()
        wired = dict(model=model, positive=WORDS[0], negative=WORDS[1], latent_image=latent(height=4, width=4), vae=vae)
        settings = dict(steps=2, cfg=3.0, candidates=2, survivors=0.5, first_steps=1, iterations=1, seed=5)
        node = NODE["SeedSelect"]
        arguments = {**defaults(node), **wired, "references": reference, "clip_vision": vision, **settings, **inputs}

        def run():
            noise, seed, samples, grid, preview, report = node.execute(**arguments).args
            return [noise.noise, seed, samples["samples"], grid, preview, report]

        return Case(run, (model, vae, vision), True, cancel_returns_best=True, slow=True)

    return make


def noise_map() -> Case:
    model, vision = unet(0, latent_format=Scaled), tiny_encoder()
    with torch.inference_mode():
        vae = modules.make_vae(modules.load_autoencoder())
    references = torch.rand(1, 50, 40, 3, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(6))
    wired = dict(model=model, positive=WORDS[0], negative=WORDS[1], latent_image=latent(height=4, width=4), vae=vae)
    wired |= dict(references=references, clip_vision=vision, noise=SeedNoise(noise, 5))
    settings = dict(steps=2, cfg=3.0, patches=2, pairs=5, checks=1, seed=5)
    node = NODE["SeedMap"]
    arguments = {**defaults(node), **wired, **settings}
    return Case(lambda: list(node.execute(**arguments).args), (model, vae, vision), True, True, slow=True)


def grid() -> Case:
    models = unet(0, latent_format=Scaled), unet(1, latent_format=Scaled)
    with torch.inference_mode():
        vae = modules.make_vae(modules.load_autoencoder())
    blended, _ = blend(*models, *OTHER_WORDS)
    node = NODE["BlendGrid"]
    wired = dict(model=blended, positive=WORDS[0], negative=WORDS[1], latent_image=latent(height=4, width=4), vae=vae)
    settings = dict(rows="bias = 0 | 1", columns="", steps=2, cfg=3.0, seed=5)
    arguments = {**defaults(node), **wired, **settings}
    return Case(lambda: list(node.execute(**arguments).args), (blended, *models, vae), True, True, slow=True)


def node_on(name: str, model, **inputs) -> Callable[[], object]:
    return lambda: [getattr(out, "ids", out) for out in tiny.run(NODE[name], model=model, **inputs)]


def tokens_sampled() -> Case:
    model, mask = tiny.tiny_model().model, torch.zeros(1, 32, 24)
    mask[:, 6:19, 5:14] = 1.0
    inputs = dict(positive=tiny.prompt(1), negative=tiny.prompt(2), steps=4, seed=4, batch_size=2)
    return Case(node_on("MaskedTokenSampler", model, **inputs, image=tiny.random_image(), mask=mask), (model,))


def tokens_moved() -> Case:
    model = tiny.tiny_model().model
    model.vq.get_free_memory = lambda device: 1  # 1 byte, so that the VQ-GAN decodes one frame at a time
    inputs = dict(positive=tiny.prompt(1), negative=tiny.prompt(2), steps=3, seed=4, width=24, height=32)
    run = node_on("MaskedTokenVideo", model, **inputs, frames=4, reference_frames=2)
    return Case(run, (model,), cancel_returns_best=True)


def tokens_encoded() -> Case:
    model = tiny.tiny_model().model
    model.vq.get_free_memory = lambda device: 1  # 1 byte, so that the VQ-GAN encodes one image at a time
    return Case(node_on("MaskedTokenEncode", model, image=tiny.random_image(batch=3)), (model,))


def tokens_decoded() -> Case:
    model = tiny.tiny_model().model
    model.vq.get_free_memory = lambda device: 1
    return Case(node_on("MaskedTokenDecode", model, tokens=tiny.tokens(batch=3)), (model,))


def tokens_trained() -> Case:
    model = tiny.tiny_model().model
    inputs = dict(
        images=tiny.random_image(16, 16), positive=tiny.prompt(7, 3), resolution=16, rank=2, alpha=2.0, steps=2
    )

    def run():
        trained, losses, report = tiny.run(NODE["TrainMaskedTokenLora"], model=model, learning_rate=1e-2, **inputs)
        return [trained.weights, losses, report]

    return Case(run, (model,), is_training=True, slow=True)


def head_trained() -> Case:
    model, vision = unet(0, latent_format=Scaled), tiny_encoder()
    with torch.inference_mode():
        vae = modules.make_vae(modules.load_autoencoder())
    arguments = dict(
        steps=3, metric="clip_vision", vae=vae, clip_vision=vision, crop=16, validation_fraction=0.0, cached_steps=1
    )

    def run():
        trained = train.__wrapped__(model, latents(2, 8, (4, 4)), **arguments)
        return [trained.head.weights, trained.loss_map, trained.report]

    return Case(run, (model, vae, vision), True, is_training=True, slow=True)


def refiner_trained(pairing: str) -> Callable[[], Case]:
    def make() -> Case:
        vision, source = tiny_encoder(), images(3)
        arguments = dict(pairing=pairing, steps=2, metric="clip_vision", clip_vision=vision, architecture="residual")

        def run():
            trained = train_refiner.__wrapped__(source, tinted(source), **arguments)
            return [trained.refiner.patcher.model.state_dict(), trained.loss_map, trained.report]

        return Case(run, (vision,), True, is_training=True, slow=True)

    return make


def faces() -> Case:
    """Two faces in each of two images, refined one at a time, with the identity guard of an encoder."""
    model, vision = face_refiner(OWN), tiny_encoder()
    model.patcher.get_free_memory = lambda device: 1
    image = torch.rand(2, 48, 64, 3, generator=torch.Generator().manual_seed(3))
    boxes = [[box(8, 8, 20, 20), box(36, 16, 20, 24)]] * 2
    node = NODE["FaceRefiner"]
    arguments = {**defaults(node), "image": image, "refiner": model, "bboxes": boxes, "clip_vision": vision}
    arguments |= dict(identity_guard=0.05)
    return Case(lambda: list(node.execute(**arguments).args), (model.patcher, vision))


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
    "blend with region, crop, refresh, skip": cheap_blend,
    "Cas-DM head on a blend": head,
    "SeedSelect search": seeds(),
    "SeedSelect optimize": seeds(mode="optimize"),
    "SeedSelect search+optimize": seeds(mode="search+optimize"),
    "SeedSelect inversion": seeds(start="inversion", candidates=1),
    "SeedSelect centroid": seeds(2, start="centroid", mode="optimize"),
    "SeedMap": noise_map,
    "BlendGrid": grid,
    "MaskedTokenSampler": tokens_sampled,
    "MaskedTokenVideo": tokens_moved,
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
    """Replace ComfyUI's folders by empty folders. Returns the output folder."""
    for kind in ("input", "output", "temp"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return tmp_path / "output"


@pytest.fixture
def small(monkeypatch) -> None:
    """Set small networks and few steps where a node has no widget for them."""
    monkeypatch.setitem(face_refiner_train.ARCHITECTURES, "residual", OWN)
    monkeypatch.setattr(face_refiner_run, "PatchDiscriminatorConfig", partial(PatchDiscriminatorConfig, ndf=8))
    monkeypatch.setattr(comfy_sampler, "INVERSION_STEPS", 3)
    cache: list = []  # computing a centroid takes a second, and every run needs the same centroids

    def centroid(noises):
        for arguments, result in cache:
            if same_bits(arguments, list(noises)):
                return result
        cache.append(([x.clone() for x in noises], path.norm_aware_centroid(noises)))
        return cache[-1][1]

    monkeypatch.setattr(select, "norm_aware_centroid", centroid)
