"""SeedMap and CombineNoise: which parts of a noise carry the concept, and new noises that keep these parts."""

from typing import Any

from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, Sampler
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..host.attachments import Conditioning
from ..host.shape_errors import explain_shape_errors
from ..techniques.seed_select.comfy_combined_noise import CombinedNoise
from ..techniques.seed_select.comfy_files import Noise
from ..techniques.seed_select.comfy_inputs import KSamplerInputs
from ..techniques.seed_select.comfy_sampler import SAMPLERS, SCHEDULERS, ComfySeedSampler
from ..techniques.seed_select.comfy_scoring import ScoringSettings
from ..techniques.seed_select.comfy_seed_map import run_map
from ..techniques.seed_select.noise_patches import SeedMapSettings
from .checked_inputs import checks_inputs


@checks_inputs
class SeedMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedMap",
            display_name="Seed Map",
            category="chorus",
            description=(
                "Shows which parts of a noise carry the concept, as a heat map over the image and as a mask for Combine Noise."
                " Connect the same inputs as those of Seed Select."
            ),
            search_aliases=["SeedMap", "noise map", "heat map", "attribution", "keep the subject", "chorus"],
            inputs=[
                io.Model.Input("model", tooltip="As in Seed Select."),
                io.Conditioning.Input("positive", tooltip="As in Seed Select."),
                io.Conditioning.Input("negative", tooltip="As in Seed Select."),
                io.Latent.Input("latent_image", tooltip="As in Seed Select, with the size of the noise."),
                io.Noise.Input("noise", tooltip="From Seed Select, Load Seed or RandomNoise."),
                io.Image.Input("references", tooltip="As in Seed Select: a batch of images of the concept."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Int.Input(
                    "patches",
                    default=4,
                    min=2,
                    max=64,
                    tooltip="Patches along the longer side. More patches show finer parts, but need more pairs.",
                ),
                io.Int.Input(
                    "pairs",
                    default=24,
                    min=2,
                    max=1024,
                    tooltip="Pairs of images, in which halves of the patches are exchanged. More pairs make the map more certain.",
                ),
                io.Int.Input(
                    "checks",
                    default=4,
                    min=0,
                    max=64,
                    tooltip="Number of other noises in which the marked half of the noise is tried. The report and the sheet show"
                    " the results. 0: no check.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the first other noise, and of the random halves.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="As in Seed Select."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=30.0, step=0.1, tooltip="As in Seed Select."),
                io.Combo.Input("sampler_name", options=SAMPLERS, default="euler", tooltip="As in Seed Select."),
                io.Combo.Input("scheduler", options=SCHEDULERS, default="normal", tooltip="As in Seed Select."),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip="As in Seed Select."),
                io.Float.Input(
                    "semantic_weight", default=10.0, min=0.0, max=100.0, step=0.5, tooltip="As in Seed Select."
                ),
                io.Float.Input(
                    "appearance_weight", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="As in Seed Select."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="As in Seed Select. Needed unless semantic_weight is 0.",
                ),
                io.Sigmas.Input("sigmas", optional=True, tooltip="As in Seed Select."),
                io.Sampler.Input("sampler", optional=True, tooltip="As in Seed Select."),
                io.Guider.Input("guider", optional=True, tooltip="As in Seed Select."),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The image of the noise under the map."),
                io.Mask.Output(
                    "mask",
                    display_name="mask",
                    tooltip="The ranks of the patches, from 0 (lowest) to 1 (highest). The upper half is at least 0.5.",
                ),
                io.Image.Output(
                    "sheet",
                    display_name="sheet",
                    tooltip="The image, the map, the marked half, and the images of the checks.",
                ),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Conditioning,
        negative: Conditioning,
        latent_image: dict[str, Any],
        noise: Noise,
        references: Tensor,
        vae: VAE,
        patches: int,
        pairs: int,
        checks: int,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        semantic_weight: float,
        appearance_weight: float,
        clip_vision: ClipVisionModel | None = None,
        sigmas: Tensor | None = None,
        sampler: Sampler | None = None,
        guider: CFGGuider | None = None,
    ) -> io.NodeOutput:
        inputs = KSamplerInputs(
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent_image,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler_name,
            scheduler=scheduler,
            denoise=denoise,
            seed=noise.seed,
            sigmas=sigmas,
            sampler=sampler,
            guider=guider,
        ).checked()
        settings = SeedMapSettings(pairs=pairs, checks=checks, seed=seed, steps=inputs.steps)
        scoring = ScoringSettings(
            references=references,
            vae=vae,
            clip_vision=clip_vision,
            semantic_weight=semantic_weight,
            appearance_weight=appearance_weight,
        )
        run_sampler = ComfySeedSampler(inputs, scoring)
        with explain_shape_errors("the model"):
            return io.NodeOutput(*run_map(settings, run_sampler, noise, patches))


@checks_inputs
class CombineNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CombineNoise",
            display_name="Combine Noise",
            category="chorus",
            description=(
                "Composes a noise of two: noise where the mask is at least the threshold, and other elsewhere. With the mask"
                " of Seed Map, new images keep what carries the concept."
            ),
            search_aliases=["CombineNoise", "mix noise", "noise composite", "vary the image", "chorus"],
            inputs=[
                io.Noise.Input(
                    "noise",
                    tooltip="The noise to keep, from Seed Select, Load Seed or RandomNoise. A saved noise of one image serves all"
                    " images of a batch.",
                ),
                io.Noise.Input("other", tooltip="The noise elsewhere, for example RandomNoise."),
                io.Mask.Input(
                    "mask",
                    tooltip="Where to keep noise, for example the mask of Seed Map: one of any size, or one for each image.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="noise is kept where the mask is at least this value. With the mask of Seed Map, 0.5 keeps half of the"
                    " patches and 0.75 a quarter. 0: all of noise.",
                ),
            ],
            outputs=[io.Noise.Output("noise", display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise: Noise, other: Noise, mask: Tensor, threshold: float) -> io.NodeOutput:
        return io.NodeOutput(CombinedNoise(noise, other, mask, threshold))


NODES: list[type[io.ComfyNode]] = [SeedMap, CombineNoise]
