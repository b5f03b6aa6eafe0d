"""A process of ComfyUI with given start options. Runs SeedSelect, the blend, a head, a refiner and the token sampler.

``python start_options.py FILE OPTION...`` writes the results, a dictionary of tensors, to FILE.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PARTS = ("search", "optimize", "blend", "head", "refiner", "tokens")


def start(options):
    """Make this pack and ComfyUI importable, and start ComfyUI as a library with ``options``."""
    spec = importlib.util.spec_from_file_location("chorus_run", ROOT / "run.py")
    sys.modules["chorus_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["chorus_run"])
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = ["main.py", *options]
    import comfy.options

    comfy.options.enable_args_parsing()
    if "--deterministic" in options:
        torch.use_deterministic_algorithms(True, warn_only=True)  # as main.py does
    torch.set_num_threads(1)
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)


def call(node, **inputs):
    widgets = {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}
    return node.execute(**{**widgets, **inputs}).args


@torch.inference_mode()
def results(parts=PARTS):
    """The results of the nodes on the demo checkpoints as {name: tensor}; all latents are 16 by 16."""
    import comfy.sample
    import nodes as comfy_nodes

    from chorus.nodes import cas_dm, demo, face_refiner, masked_tokens, saliency_noise_blend, seed_select
    from chorus.nodes.masked_token_model import LoadMaskedTokenModel

    model, clip, vae = call(demo.ChorusDemoCheckpoint, name="general")
    expert, _, _ = call(demo.ChorusDemoCheckpoint, name="expert-animals")

    def encode(text):
        return comfy_nodes.CLIPTextEncode().encode(clip, text)[0]

    def sample(model):
        return comfy_nodes.KSampler().sample(model, 5, 4, 4.0, "euler", "normal", *words, latent)[0]["samples"]

    words = encode("a carrot on blue"), encode("")
    latent = comfy_nodes.EmptyLatentImage().generate(128, 128, 1)[0]
    references = call(demo.ChorusDemoReferences, concept="carrot")[0]
    plain = sample(model)
    image = comfy_nodes.VAEDecode().decode(vae, {"samples": plain})[0]
    out = {"plain": plain, "image": image}
    seeds = dict(
        model=model,
        positive=words[0],
        negative=words[1],
        latent_image=latent,
        references=references,
        vae=vae,
        clip_vision=call(demo.ChorusDemoVision)[0],
        steps=4,
        cfg=4.0,
        seed=3,
        iterations=1,
        candidates=4,
    )
    for mode in set(parts) & {"search", "optimize"}:
        noise, seed, samples, *_, report = call(seed_select.SeedSelect, mode=mode, **seeds)
        zeros = torch.zeros_like(samples["samples"])
        out |= {f"{mode} noise": noise.generate_noise({"samples": zeros}), f"{mode} samples": samples["samples"]}
        if mode == "optimize":
            scores = re.search(r"score ([\d.]+) to ([\d.]+)", report)
            out["optimize start"] = comfy.sample.prepare_noise(zeros, seeds["seed"])
            out["scores"] = torch.tensor([float(scores[1]), float(scores[2])])
        if mode == "search":
            again = comfy_nodes.common_ksampler(model, seed, 4, 4.0, "euler", "normal", *words, latent)
            out |= {"search seed": torch.tensor(seed), "search again": again[0]["samples"]}
    if "blend" in parts:
        blended, _ = call(saliency_noise_blend.SaliencyNoiseBlend, model=model, expert=expert, mask_mode="soft")
        out["blend"] = sample(blended)
    if "head" in parts:
        head = call(cas_dm.LoadCasDMHead, file="chorus-demo-general.safetensors")[0]
        out["head"] = sample(call(cas_dm.CasDMHead, model=model, head=head)[0])
    if "refiner" in parts:
        schema = face_refiner.LoadFaceRefiner.define_schema()
        name = next(o for i in schema.inputs for o in i.options if "chorus-demo" in o)
        refiner = call(face_refiner.LoadFaceRefiner, file=name)[0]
        out["refiner"] = call(face_refiner.FaceRefiner, image=image, refiner=refiner)[0]
    if "tokens" in parts:
        folders = next(i for i in LoadMaskedTokenModel.define_schema().inputs if i.id == "model_folder").options
        tokens, text = call(LoadMaskedTokenModel, model_folder=next(f for f in folders if "chorus-demo" in f))
        prompts = [comfy_nodes.CLIPTextEncode().encode(text, t)[0] for t in ("a carrot on blue", "")]
        wired = dict(
            model=tokens, positive=prompts[0], negative=prompts[1], seed=3, steps=1, width=128, height=128
        )  # more steps would amplify every changed token
        made, ids, _ = call(masked_tokens.MaskedTokenSampler, **wired)
        out |= {"tokens image": made, "tokens": ids.ids}
    return out


if __name__ == "__main__":
    path, *given = sys.argv[1:]
    chosen = [g for g in given if g in PARTS] or PARTS
    start([g for g in given if g not in PARTS])
    torch.save(results(chosen), path)
