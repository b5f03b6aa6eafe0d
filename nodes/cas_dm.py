"""A learned head that repaints a model's x0 at every step, under any sampler.

Cas-DM (arXiv 2401.02414), a reconstruction: the paper has no public code.
"""

import logging
from functools import partial

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..techniques.cas_dm.comfy_files import fingerprint_head, head_files, read_head, save_head, validate_head
from ..techniques.cas_dm.comfy_hook import CASTING, MadeFor, add_head, check_fits
from ..techniques.cas_dm.mix import refine
from ..techniques.cas_dm.network import Head, to_file
from .checked_inputs import checks_inputs
from .sockets import CasDMHeadSocket

log = logging.getLogger("comfyui-chorus")

PREFIX = "cas_dm/head"


def made_for(head: Head) -> MadeFor:
    facts = head.facts
    return MadeFor(facts.latent_format, head.config.channels, facts.prediction, facts.cfg)


@checks_inputs
class LoadCasDMHead(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadCasDMHead",
            display_name="Load Cas-DM Head",
            category="chorus",
            description="Reads a head for Cas-DM Head from models/cas_dm or the output folder.",
            search_aliases=["Cas-DM", "x0 refiner", "load head"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=head_files(),
                    tooltip="A .safetensors of models/cas_dm, or one that Save Cas-DM Head wrote. It fits models of the"
                    " latent space and the kind of prediction that it was trained on.",
                )
            ],
            outputs=[CasDMHeadSocket.Output("head", display_name="head", tooltip="For Cas-DM Head.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        return validate_head(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str | float:
        return fingerprint_head(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(read_head(file))


@checks_inputs
class SaveCasDMHead(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveCasDMHead",
            display_name="Save Cas-DM Head",
            category="chorus/train",
            description="Writes a head with what it was trained on into the output folder, where Load Cas-DM Head finds it.",
            search_aliases=["Cas-DM", "export head"],
            is_output_node=True,
            inputs=[
                CasDMHeadSocket.Input("head", tooltip="From Train Cas-DM Head."),
                io.String.Input(
                    "filename_prefix",
                    default=PREFIX,
                    tooltip="Below the output folder. A number follows; no file is overwritten.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, head: Head, filename_prefix: str) -> io.NodeOutput:
        path = save_head(*to_file(head), filename_prefix)
        log.info("SaveCasDMHead: %s", path)
        return io.NodeOutput()


@checks_inputs
class CasDMHead(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CasDMHead",
            display_name="Cas-DM Head",
            category="chorus",
            description=(
                "Lets a small trained network repaint what the model predicts, step by step, inside any sampler (Cas-DM)."
                " The model itself stays as it is. Chain several."
            ),
            search_aliases=["Cas-DM", "x0 refiner", "LPIPS", "dual output diffusion"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that the head was trained on, or one near it. It may carry LoRAs, a blend or other"
                    " heads, which act first; put this after Saliency Noise Blend.",
                ),
                CasDMHeadSocket.Input("head", tooltip="From Load Cas-DM Head or Train Cas-DM Head."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the head's change. 0 is the model alone, exactly. Useful: 0.5 to 1.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the sampling the head begins; before, it costs nothing.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the sampling the head ends. Not above start_percent: never, exactly.",
                ),
            ],
            outputs=[io.Model.Output("model", display_name="model")],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, head: Head, strength: float, start_percent: float, end_percent: float
    ) -> io.NodeOutput:
        wanted = made_for(head)
        if strength == 0.0:
            check_fits(model, wanted)
            return io.NodeOutput(model.clone())
        by_strength = partial(refine, strength=strength)
        return io.NodeOutput(add_head(model, head.network(CASTING), by_strength, wanted, start_percent, end_percent))


NODES: list[type[io.ComfyNode]] = [LoadCasDMHead, SaveCasDMHead, CasDMHead]
