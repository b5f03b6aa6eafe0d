"""The nodes that give faces back what distillation took from them, with a light network (after arXiv 2505.02255)."""

import logging
from typing import Any

import torch
from comfy.clip_vision import ClipVisionModel
from comfy_api.latest import io
from torch import Tensor

from ..host.files import workflow_metadata
from ..host.images import embeddings
from ..techniques.face_refiner.boxes import CHOICES, choose, faces_in, per_image
from ..techniques.face_refiner.comfy_files import (
    FILES,
    fingerprint,
    load_refiner,
    refiner_files,
    save_refiner,
    validate,
)
from ..techniques.face_refiner.comfy_model import FaceRefinerModel, Refining
from ..techniques.face_refiner.identity import feature_guard, structure_guard
from ..techniques.face_refiner.refine import (
    FaceRefinerSettings,
    Refined,
    check_mask,
    check_pictures,
    describe,
    refine_boxes,
    refine_mask,
    refine_whole,
)
from .checked_inputs import checks_inputs
from .sockets import BoxesSocket, FaceRefinerSocket

log = logging.getLogger("comfyui-chorus")


@checks_inputs
class LoadFaceRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadFaceRefiner",
            display_name="Load Face Refiner",
            category="chorus",
            description=(
                "Loads a light image-to-image network: a generator of CycleGAN, pix2pix or CUT, or one that this pack"
                " trained. What it is shows in its weights."
            ),
            search_aliases=["CycleGAN", "pix2pix", "CUT", "face restore"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=refiner_files(),
                    tooltip="A .pth or .safetensors file in models/face_refiner, or one that Save Face Refiner wrote.",
                )
            ],
            outputs=[FaceRefinerSocket.Output("refiner", display_name="refiner")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        return validate(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str | float:
        return fingerprint(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(load_refiner(file))


@checks_inputs
class SaveFaceRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveFaceRefiner",
            display_name="Save Face Refiner",
            category="chorus",
            description="Saves a face refiner to the output folder as safetensors, under a new number each time.",
            is_output_node=True,
            inputs=[
                FaceRefinerSocket.Input("refiner", tooltip="From Train Face Refiner or Load Face Refiner."),
                io.String.Input(
                    "filename_prefix",
                    default=FILES.example,
                    tooltip="Folder and name in the output folder; %year% and the like as in Save Image.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, refiner: FaceRefinerModel, filename_prefix: str) -> io.NodeOutput:
        saved = save_refiner(refiner, filename_prefix, workflow_metadata(cls.hidden))
        return io.NodeOutput(ui={"face_refiner": [saved]})


@checks_inputs
class FaceRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaceRefiner",
            display_name="Face Refiner",
            category="chorus",
            description=(
                "Refines faces in one pass of a light network and puts back only what it changed. Wire bboxes (Detect Face"
                " Landmarks), a mask, or neither for the whole image. All other pixels stay as they are, bit for bit."
            ),
            search_aliases=["face detailer", "face restore", "plastic skin", "ADetailer", "CycleGAN", "pix2pix"],
            inputs=[
                io.Image.Input("image", tooltip="RGB."),
                FaceRefinerSocket.Input("refiner", tooltip="From Load Face Refiner or Train Face Refiner."),
                BoxesSocket.Input(
                    "bboxes",
                    optional=True,
                    extra_dict={"forceInput": True},  # else the page adds widgets for a box
                    tooltip="Where the faces are: from Detect Face Landmarks (MediaPipe), SDPose Face Bounding Boxes, or any"
                    " other boxes. None found: the image comes back as it is.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Nothing changes where it is 0. Without bboxes each of its areas is a face.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the change is added. 0: none.",
                ),
                io.Float.Input(
                    "padding",
                    default=0.25,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Around a box at each side, in parts of its longer side. Useful: 0.1 to 0.6.",
                ),
                io.Int.Input(
                    "feather",
                    default=16,
                    min=0,
                    max=512,
                    tooltip="Width in pixels of the soft edge, inside the padded box or the mask.",
                ),
                io.Boolean.Input(
                    "color_lock",
                    default=True,
                    tooltip="Colours and shading over wide areas stay the image's; only finer detail changes.",
                ),
                io.Float.Input(
                    "identity_guard",
                    default=0.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="A face is changed less until its distance from what it was is within this. 0: no limit. With"
                    " clip_vision 1 - cosine of its embeddings (useful: 0.02 to 0.2), without 1 - SSIM (0.02 to 0.3).",
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="What identity_guard measures with; without it, structure."
                ),
                io.Combo.Input(
                    "faces",
                    options=list(CHOICES),
                    default="all",
                    advanced=True,
                    tooltip="Which faces of each image: all, the largest, or the one of face_index.",
                ),
                io.Int.Input(
                    "face_index",
                    default=0,
                    min=-64,
                    max=64,
                    advanced=True,
                    tooltip="In the detector's order, from 0; -1 is the last. Only for faces: index.",
                ),
                io.Int.Input(
                    "min_face",
                    default=8,
                    min=1,
                    max=4096,
                    advanced=True,
                    tooltip="Faces whose shorter side has fewer pixels stay as they are.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=2048,
                    step=8,
                    advanced=True,
                    tooltip="Side in pixels to which faces are scaled for the network. 0: what it was trained on. The whole"
                    " image keeps its own size.",
                ),
                io.Boolean.Input(
                    "faithful",
                    default=False,
                    advanced=True,
                    tooltip="Compute as pix2pix's own test does, with dropout and each face's own statistics.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Of the dropout that faithful switches on; face i draws from seed + i.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image"),
                io.Mask.Output("mask", display_name="mask", tooltip="Where faces were put back, and how much."),
                io.Image.Output(
                    "crops",
                    display_name="crops",
                    tooltip="The refined faces at the network's scale; black if there is none.",
                ),
                io.String.Output("report", display_name="report", tooltip="What was done to each face, in numbers."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        refiner: FaceRefinerModel,
        strength: float,
        padding: float,
        feather: int,
        color_lock: bool,
        identity_guard: float,
        bboxes: Any = None,
        mask: Tensor | None = None,
        clip_vision: ClipVisionModel | None = None,
        faces: str = "all",
        face_index: int = 0,
        min_face: int = 8,
        size: int = 0,
        faithful: bool = False,
        seed: int = 0,
    ) -> io.NodeOutput:
        check_pictures(image)
        settings = FaceRefinerSettings(
            size=size or refiner.size,
            multiple=refiner.multiple,
            least=refiner.least,
            strength=strength,
            padding=padding,
            feather=feather,
            color_lock=color_lock,
            identity_limit=identity_guard,
            least_face=min_face,
        )
        refine = Refining(refiner, seed if faithful else None)
        guard = (
            structure_guard
            if clip_vision is None
            else feature_guard(lambda x: embeddings(clip_vision, x.movedim(1, -1)))
        )
        if mask is not None:
            mask = mask.reshape(-1, *mask.shape[-2:])
            check_mask(mask, image)
        if bboxes is not None:
            found = choose(faces_in(per_image(bboxes, len(image)), *image.shape[1:3]), faces, face_index)
            refined = refine_boxes(image, found, refine, settings, mask, guard)
        elif mask is not None:
            refined = refine_mask(image, mask, refine, settings, guard)
        else:
            refined = refine_whole(image, refine, settings, guard)
        return outputs(refined, f"{refiner}", settings.size)


def outputs(refined: Refined, name: str, size: int) -> io.NodeOutput:
    for record in refined.records:
        if "NaN" in record.note:
            log.warning("FaceRefiner: %s", describe([record]))
    crops = refined.crops if len(refined.crops) else torch.zeros(1, size, size, 3)
    return io.NodeOutput(refined.images, refined.mask, crops, f"{name}\n{describe(refined.records)}")


NODES: list[type[io.ComfyNode]] = [LoadFaceRefiner, SaveFaceRefiner, FaceRefiner]
