"""ComfyUI's nodes that take a MODEL and return one, found in its registry, with inputs for small models."""

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import folder_paths
import nodes
import safetensors.torch
import torch

from chorus.tests.families.catalogue import FAMILIES, UNET
from chorus.tests.families.family import Family, image, random, text, video
from chorus.tests.families.outcome import NotBuilt
from chorus.tests.families.tiny_vae import tiny_vae
from chorus.tests.support.tiny_models import in_inference_mode

# a UNet with attention at the full size of the latent, because several nodes patch this attention
ATTENTION = Family(
    name="SD15 with attention",
    config={**UNET, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1]},
    prompt=text(64),
    latent=image(4, 16, 16),
)
TRIED = (ATTENTION, *(FAMILIES[name] for name in ("Flux", "WAN21_T2V", "SD3", "Lumina2")))  # tried in this order


@dataclass(frozen=True, kw_only=True)
class Use:
    """How a node is tried.

    ``inputs``: values of inputs whose defaults have no effect on a small model. ``family``: the family of the models;
    None: the first of ``TRIED`` on which the node has an effect. ``latent()``: a LATENT in place of the family's.
    ``reason``: the reason why the node is not tried; "" if it is tried.
    """

    inputs: dict = field(default_factory=dict)
    family: str | None = None
    latent: Callable | None = None
    steps: int = 2
    reason: str = ""


def use(family=None, latent=None, steps=2, **inputs):
    return Use(inputs=inputs, family=family, latent=latent, steps=steps)


def masked():
    mask = torch.linspace(0, 1, 16).expand(1, 1, 16, 16).clone()
    return {"samples": random(5, 1, 4, 16, 16), "noise_mask": mask}


FROM_THE_START = dict(start_percent=0.0, end_percent=1.0)
USES = {
    "APG": use(momentum=0.5),
    "CFGOverride": use(cfg=1.5),
    "ChromaRadianceOptions": use("ChromaRadiance", force_sequential_txt_ids=True),
    "ContextWindowsManual": use(context_length=8, context_overlap=2, dim=2),
    "DifferentialDiffusion": use(latent=masked),
    "EasyCache": use(reuse_threshold=5.0, steps=4, **FROM_THE_START),
    "FluxKVCache": use("Flux2 reference image"),
    "FreSca": use(freq_cutoff=3, scale_low=1.5),
    "HiDreamO1PatchSeamSmoothing": use("HiDreamO1", start_percent=0.0),
    "HyperTile": use(tile_size=32, swap_size=1),
    "LazyCache": use(reuse_threshold=5.0, steps=4, **FROM_THE_START),
    "LTXVContextWindows": use("LTXV", video(128, 4, 4, 4), context_length=9, context_overlap=1),
    "MiniMaxH3SigmaShift": use("MiniMaxH3", shift_video=5.0),
    "ModelComputeDtype": use(dtype="bf16"),
    "ModelNoiseScale": use("Flux", noise_scale=0.8),
    "ModelSamplingContinuousV": use(sigma_max=80.0),
    "ModelSamplingDiscrete": use(sampling="v_prediction"),
    "ModelSamplingLTXV": use("LTXV"),
    "NAGuidance": use("Flux", nag_scale=50.0, nag_alpha=1.0, nag_tau=10.0),
    "PatchModelAddDownscale": use(block_number=1, **FROM_THE_START),
    "ScaleROPE": use("Flux", scale_x=1.5, shift_y=2.0),
    "SkipLayerGuidanceDiT": use("Flux", double_layers="0", single_layers="0", **FROM_THE_START),
    "SkipLayerGuidanceDiTSimple": use("Flux", double_layers="0", single_layers="0"),
    "SkipLayerGuidanceSD3": use("SD3", layers="0", **FROM_THE_START),
    "TomePatchModel": use(ratio=0.5),
    "TorchCompileModel": Use(reason="compiling takes minutes without a GPU"),
    "UNetCrossAttentionMultiply": use(q=1.5, out=1.2),
    "UNetSelfAttentionMultiply": use(q=1.5, out=1.2),
    "UNetTemporalAttentionMultiply": use("SVD_img2vid", self_temporal=1.5, cross_temporal=1.5),
    "WanContextWindowsManual": use("WAN21_T2V", video(16, 4), context_length=5, context_overlap=1),
}


def use_of(name: str) -> Use:
    """How the node ``name`` is tried. Merging nodes get a model with few weights, because they merge weight by weight."""
    few_weights = name.startswith("ModelMerge") and name not in ("ModelMergeBlocks", "ModelMergeSD1")
    return USES.get(name, use("LTXV") if few_weights else Use())


@functools.cache
def model_nodes():
    """The classes of all nodes that take a MODEL and return one, by id, without those of this pack."""
    asyncio.run(nodes.init_builtin_extra_nodes())
    found = {}
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        takes = any(kind[0] == "MODEL" for kind in inputs_of(node).values())
        if takes and "MODEL" in [str(kind) for kind in node.RETURN_TYPES]:
            found[name] = node
    return dict(sorted(found.items()))


def inputs_of(node):
    kinds = node.INPUT_TYPES()
    return {**kinds.get("required", {}), **kinds.get("optional", {})}


class Node:
    """A node with inputs for the models of ``family``. Errors (NotBuilt): an input for which there is no small value."""

    def __init__(self, name: str, family: Family, folder) -> None:
        self.name, self.family, self.folder = name, family, folder
        self.node = model_nodes()[name]
        self.use = use_of(name)
        if self.use.reason:
            raise NotBuilt(self.use.reason)

    @in_inference_mode
    def __call__(self, model):
        """``model`` after the node."""
        inputs = dict(self.use.inputs)
        optional = self.node.INPUT_TYPES().get("optional", {})
        for key, kind in inputs_of(self.node).items():
            if key not in inputs and (kind[0] == "MODEL" or key not in optional):
                inputs[key] = self._value(key, kind, model, inputs)
        found = getattr(self.node(), self.node.FUNCTION)(**inputs)
        return (found if isinstance(found, tuple) else found.args)[0]

    def _value(self, key, kind, model, inputs):
        kind, options = kind[0], kind[1] if len(kind) > 1 and isinstance(kind[1], dict) else {}
        if kind == "MODEL":
            return model if model not in inputs.values() else self.family.model(2)
        if self.name.startswith("ModelMerge") and kind == "FLOAT":
            return 0.5
        if (given := self._file(key)) is not None:
            return given
        if "default" in options:
            return options["default"]
        if isinstance(kind, list) or "options" in options:
            return (kind if isinstance(kind, list) else options["options"])[0]
        makers = {
            "LORA_MODEL": lambda: lora(self.family.model(0)),
            "CONDITIONING": lambda: self.family.conditioning(50),
            "LATENT": self.family.latent,
            "VAE": lambda: tiny_vae(self.family.latent()["samples"].shape[1]),
            "LATENT_OPERATION": lambda: (
                nodes.NODE_CLASS_MAPPINGS["LatentOperationSharpen"].execute(1, 1.0, 1.0).args[0]
            ),
            "CLIP": lambda: None,
            "IMAGE": lambda: torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(6)),
        }
        if str(kind) not in makers:
            raise NotBuilt(f"the tests have no small {kind} for this node")
        return makers[str(kind)]()

    def _file(self, key):
        """Name of a small file, written to the folder whose files the input ``key`` lists. None: it lists no files."""
        if key == "lora_name":
            return self._written(
                "loras", "tiny.safetensors", lambda path: safetensors.torch.save_file(lora(self.family.model(0)), path)
            )
        if key == "hypernetwork_name":
            return self._written("hypernetworks", "tiny.pt", lambda path: torch.save(hypernetwork(), path))
        return None

    def _written(self, kind, name, write):
        path = self.folder / kind / name
        path.parent.mkdir(exist_ok=True)
        write(str(path))
        if str(path.parent) not in folder_paths.get_folder_paths(kind):
            folder_paths.add_model_folder_path(kind, str(path.parent), is_default=True)
        folder_paths.filename_list_cache.pop(kind, None)
        return name


def lora(model, rank=2):
    """A LoRA of the linear layers whose names contain "attn", with key names that ComfyUI's loader reads."""
    weights = {}
    for index, (key, w) in enumerate(model.model.state_dict().items()):
        if key.startswith("diffusion_model.") and "attn" in key and key.endswith(".weight") and w.ndim == 2:
            name = key.removesuffix(".weight")
            weights[f"{name}.lora_up.weight"] = random(index, w.shape[0], rank)
            weights[f"{name}.lora_down.weight"] = random(index + 1000, rank, w.shape[1]) / w.shape[1] ** 0.5
    return weights


def hypernetwork(width=64):
    def layer(seed):
        return {"linear.0.weight": random(seed, width, width) / width**0.5, "linear.0.bias": torch.zeros(width)}

    settings = dict(activation_func="linear", is_layer_norm=False, use_dropout=False, activate_output=False)
    return {width: [layer(1), layer(2)], **settings, "last_layer_dropout": False}
