"""Nodes LoadCasDMHead, SaveCasDMHead and CasDMHead: a trained head refines a model's x0 at every step of any sampler.

Reconstructs Cas-DM (arXiv 2401.02414), a paper without public code.
"""

import logging
from functools import partial

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..techniques.cas_dm.comfy_files import FILES, read_head, save_head
from ..techniques.cas_dm.comfy_hook import CASTING, HeadTarget, add_head, check_compatible
from ..techniques.cas_dm.mix import refine
from ..techniques.cas_dm.network import Head, to_file
from .checked_inputs import checks_inputs
from .file_widgets import filename_prefix
from .sockets import CasDMHeadSocket

log = logging.getLogger("comfyui-chorus")

PREFIX = "cas_dm/head"


def target_of(head: Head) -> HeadTarget:
    """The kind of model that ``head`` was trained on."""
    facts = head.facts
    return HeadTarget(facts.latent_format, head.config.channels, facts.prediction, facts.cfg)


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
                    options=FILES.names(),
                    tooltip="A .safetensors file in models/cas_dm, or one that Save Cas-DM Head wrote. It fits models with the"
                    " latent space and the kind of prediction that it was trained on.",
                )
            ],
            outputs=[CasDMHeadSocket.Output("head", display_name="head", tooltip="For Cas-DM Head.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return FILES.validate(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str | float:
        return FILES.fingerprint(file)

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
            description="Saves a head and the facts of its training to the output folder, where Load Cas-DM Head finds it.",
            search_aliases=["Cas-DM", "export head"],
            is_output_node=True,
            inputs=[
                CasDMHeadSocket.Input("head", tooltip="From Train Cas-DM Head."),
                filename_prefix(PREFIX),
            ],
            outputs=[CasDMHeadSocket.Output("head", display_name="head", tooltip="The saved head.")],
        )

    @classmethod
    def execute(cls, head: Head, filename_prefix: str) -> io.NodeOutput:
        path = save_head(*to_file(head), filename_prefix)
        log.info("SaveCasDMHead: %s", path)
        return io.NodeOutput(head)


@checks_inputs
class CasDMHead(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CasDMHead",
            display_name="Cas-DM Head",
            category="chorus",
            description=(
                "Refines the model's prediction at every step of any sampler with a small trained network, the head (Cas-DM)."
                " The model itself is not changed. Several heads can be chained."
            ),
            search_aliases=["Cas-DM", "x0 refiner", "LPIPS", "dual output diffusion", "sharper images", "chorus"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that the head was trained on, or a fine-tune of it. Its LoRAs, blend and other heads act"
                    " first; put this node after Saliency Noise Blend.",
                ),
                CasDMHeadSocket.Input("head", tooltip="From Load Cas-DM Head or Train Cas-DM Head."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the head's change is applied. 0 is exactly the model alone. Useful: 0.5 to 1.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Sampling percent at which the head starts. Before that it costs nothing.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Sampling percent at which the head stops. If it is not above start_percent, the head is off.",
                ),
            ],
            outputs=[io.Model.Output("model", display_name="model")],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, head: Head, strength: float, start_percent: float, end_percent: float
    ) -> io.NodeOutput:
        target = target_of(head)
        if strength == 0.0:
            check_compatible(model, target)
            return io.NodeOutput(model.clone())
        refine_by_strength = partial(refine, strength=strength)
        network = head.network(CASTING)
        return io.NodeOutput(add_head(model, network, refine_by_strength, target, start_percent, end_percent))


NODES: list[type[io.ComfyNode]] = [LoadCasDMHead, SaveCasDMHead, CasDMHead]
