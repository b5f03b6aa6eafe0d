"""FaceRefiner, with load and save: a light network restores face detail lost in distillation (after arXiv 2505.02255)."""

import logging
from typing import Any

import torch
from comfy.clip_vision import ClipVisionModel
from comfy_api.latest import io
from torch import Tensor

from ..common.masks import connected
from ..host.files import workflow_metadata
from ..host.images import embeddings
from ..techniques.face_refiner.boxes import (
    CHOICES,
    choose,
    faces_in,
    faces_of_mask,
    missed,
    only_areas,
    per_image,
    without_faces,
)
from ..techniques.face_refiner.comfy_files import FILES, load_refiner, save_refiner
from ..techniques.face_refiner.comfy_model import FaceRefinerModel, RefinerRun
from ..techniques.face_refiner.identity import feature_guard, structure_guard
from ..techniques.face_refiner.refine import (
    FaceRefinerSettings,
    Refined,
    check_images,
    check_mask,
    describe,
    refine_boxes,
    refine_mask,
    refine_whole,
)
from .checked_inputs import checks_inputs
from .file_widgets import filename_prefix
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
                "Loads a light image-to-image network: a generator of CycleGAN, pix2pix or CUT, or one trained with this"
                " pack. The architecture is read from the weights."
            ),
            search_aliases=["CycleGAN", "pix2pix", "CUT", "face restore"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=FILES.names(),
                    tooltip="A .pth or .safetensors file in models/face_refiner, or one that Save Face Refiner wrote.",
                ),
                io.String.Input(
                    "generator",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Name of the generator, if a file holds several, such as netG_A2B. Empty: the only one.",
                ),
            ],
            outputs=[FaceRefinerSocket.Output("refiner", display_name="refiner")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return FILES.validate(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None, generator: str | None = "") -> str | float:
        return FILES.fingerprint(file)

    @classmethod
    def execute(cls, file: str, generator: str | None = "") -> io.NodeOutput:
        return io.NodeOutput(load_refiner(file, generator or ""))


@checks_inputs
class SaveFaceRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveFaceRefiner",
            display_name="Save Face Refiner",
            category="chorus",
            description="Saves a face refiner to the output folder as safetensors, with a new number each time.",
            search_aliases=["export face refiner", "CycleGAN", "pix2pix"],
            is_output_node=True,
            inputs=[
                FaceRefinerSocket.Input("refiner", tooltip="From Load Face Refiner or Train Face Refiner."),
                filename_prefix(FILES.example),
            ],
            outputs=[FaceRefinerSocket.Output("refiner", display_name="refiner", tooltip="The saved refiner.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, refiner: FaceRefinerModel, filename_prefix: str) -> io.NodeOutput:
        saved = save_refiner(refiner, filename_prefix, workflow_metadata(cls.hidden))
        return io.NodeOutput(refiner, ui={"face_refiner": [saved]})


@checks_inputs
class FaceRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaceRefiner",
            display_name="Face Refiner",
            category="chorus",
            description=(
                "Refines faces in one pass of a light network. Connect bboxes (Detect Face Landmarks), a mask, or neither"
                " for the whole image. All other pixels stay unchanged, bit for bit."
            ),
            search_aliases=[
                "fix faces",
                "face detailer",
                "face restore",
                "plastic skin",
                "ADetailer",
                "CycleGAN",
                "pix2pix",
                "chorus",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The images, RGB."),
                FaceRefinerSocket.Input("refiner", tooltip="From Load Face Refiner or Train Face Refiner."),
                BoxesSocket.Input(
                    "bboxes",
                    optional=True,
                    # without forceInput, ComfyUI's web page adds widgets for the values of one box
                    extra_dict={"forceInput": True},
                    tooltip="Boxes of the faces: from Detect Face Landmarks (MediaPipe), SDPose Face Bounding Boxes, or any"
                    " other node; or the SEGS of Impact Pack's detectors. Without a face the image is returned unchanged.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Pixels where it is 0 are not changed. Without bboxes, each connected area is refined as a face.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the network's change is applied. 0: none.",
                ),
                io.Float.Input(
                    "padding",
                    default=0.25,
                    min=0.0,
                    max=1.5,
                    step=0.01,
                    tooltip="Margin on each side of a box, as a fraction of its longer side. Useful: 0.1 to 0.6.",
                ),
                io.Int.Input(
                    "feather",
                    default=16,
                    min=0,
                    max=256,
                    tooltip="Width in pixels of the soft edge, inside the padded box or the mask.",
                ),
                io.Boolean.Input(
                    "color_lock",
                    default=True,
                    tooltip="Keep the image's colours and large-scale shading; change only finer detail.",
                ),
                io.Float.Input(
                    "identity_guard",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="Largest allowed distance between a face before and after refining. A change beyond this limit"
                    " is reduced to the limit. 0: no limit. With clip_vision: 1 - cosine of the embeddings (useful: 0.02 to 0.2); without: 1 - SSIM"
                    " (0.02 to 0.3).",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Image encoder for identity_guard. Without it, identity_guard uses SSIM.",
                ),
                io.Combo.Input(
                    "faces",
                    options=list(CHOICES),
                    default="all",
                    advanced=True,
                    tooltip="Faces, or areas of the mask, to refine in each image: all, the largest, or the one at face_index.",
                ),
                io.Int.Input(
                    "face_index",
                    default=0,
                    min=-64,
                    max=64,
                    advanced=True,
                    tooltip="Number of the face in the detector's order, from 0; -1 is the last. Areas of a mask are numbered from"
                    " the largest. Used only if faces is set to index.",
                ),
                io.Int.Input(
                    "min_face",
                    default=8,
                    min=1,
                    max=1024,
                    advanced=True,
                    tooltip="Smallest face to refine, in pixels: a face is left unchanged if the shorter side of its box is"
                    " below this value.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=2048,
                    step=8,
                    advanced=True,
                    tooltip="Side in pixels to which faces are scaled for the network. 0: the size that it was trained at. If"
                    " neither bboxes nor mask is connected, the image is not scaled.",
                ),
                io.Boolean.Input(
                    "faithful",
                    default=False,
                    advanced=True,
                    tooltip="Run as in pix2pix's test code: with dropout, and normalisation by the statistics of each face.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Seed of the dropout, if faithful is on; face j of image i uses seed + i + j.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image"),
                io.Mask.Output(
                    "mask",
                    display_name="mask",
                    tooltip="Where the image was changed: the weight of the refined pixels.",
                ),
                io.Image.Output(
                    "crops",
                    display_name="crops",
                    tooltip="The refined faces at the network's size; one black image if no face was refined.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Box, applied strength, change and distance of each face."
                ),
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
        check_images(image)
        settings = FaceRefinerSettings(
            size=size or refiner.size,
            multiple=refiner.multiple,
            min_side=refiner.min_side,
            strength=strength,
            padding=padding,
            feather=feather,
            color_lock=color_lock,
            identity_limit=identity_guard,
            min_face=min_face,
        )
        refine = RefinerRun(refiner, seed if faithful else None)
        guard = (
            structure_guard
            if clip_vision is None
            else feature_guard(lambda x: embeddings(clip_vision, x.movedim(1, -1)))
        )
        mask, notes = connected(mask, (image.shape[1], image.shape[2]))
        if mask is not None:
            check_mask(mask, image)
        if bboxes is not None:
            found = faces_in(per_image(bboxes, *image.shape[:3]), *image.shape[1:3])
            chosen = choose(found, faces, face_index)
            refined = refine_boxes(image, chosen, refine, settings, mask, guard)
            notes += (
                [*without_faces(found, len(image)), *missed(found, faces, face_index)]
                if found
                else ["no face: the image is unchanged"]
            )
        elif mask is not None:
            found = faces_of_mask(mask, len(image))
            chosen = choose(found, faces, face_index)
            # a crop may contain parts of other areas, which must not change unless they are chosen
            chosen_mask = mask if faces == "all" else only_areas(mask, chosen)
            refined = refine_mask(image, chosen, refine, settings, chosen_mask, guard)
            notes += missed(found, faces, face_index) if found else ["the mask is 0 everywhere: the image is unchanged"]
        else:
            refined = refine_whole(image, refine, settings, guard)
            if faces != "all":
                notes.append(f"faces {faces}: not used, because the whole image is refined without bboxes and mask")
        return outputs(refined, [f"{refiner}", *notes], settings.size)


def outputs(refined: Refined, lines: list[str], size: int) -> io.NodeOutput:
    """The outputs of Face Refiner; ``lines`` begin its report. Logs a warning for each face with a non-finite result."""
    for record in refined.records:
        if "NaN" in record.note:
            log.warning("FaceRefiner: %s", describe([record]))
    crops = refined.crops if len(refined.crops) else torch.zeros(1, size, size, 3)
    return io.NodeOutput(
        refined.images, refined.mask, crops, "\n".join(filter(None, [*lines, describe(refined.records)]))
    )


NODES: list[type[io.ComfyNode]] = [LoadFaceRefiner, SaveFaceRefiner, FaceRefiner]
