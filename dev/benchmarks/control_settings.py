"""The cheap settings in which controls.py sweeps every numeric widget: SETTINGS by node, CONTROLS by widget.

A setting runs a node on the demo checkpoints with few steps and small images. Its function takes all inputs of the node
and the number of a seed (0, or 1 for another seed) and returns an Outcome.
"""

import functools
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import folder_paths
import nodes as host_nodes
import torch
from comfy_api.latest import io
from torch import Tensor

from ...demo import modules
from ...nodes import NODES
from ...techniques.face_refiner.comfy_training import trained
from ...techniques.face_refiner.networks.residual import RefinerConfig
from ...techniques.face_refiner.networks.unet import UnetConfig
from ...techniques.face_refiner.training.generators import new_generator

ONE_PASS = dict(steps=1)  # with more steps, later tokens depend on a changed token, and the whole image changes
KINDS = ("picture", "area", "number", "time", "selection")


@dataclass(frozen=True)
class Outcome:
    """The result of a run: an image (or any other tensor) to compare, and numbers by name."""

    picture: Tensor | None
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Control:
    """How a widget is swept.

    ``kind`` is what the widget controls: the image (*picture*), the expert's share of it (*area*), a *number*, the
    amount of work (*time*), or the *selection* of one of many equally good results. ``number`` is the name of the
    number in the Outcome by which the effect is measured. If ``number`` is empty, the images are compared, or the CPU
    seconds if ``kind`` is *time*.
    """

    kind: str = "picture"
    number: str = ""
    # further inputs, without which the widget has no effect; a callable is called to compute its input
    inputs: Mapping[str, Any] = field(default_factory=dict)
    at: float | None = None  # the reference, with which other values are compared; None: the default
    # a special value that is not on the scale of the other values, such as 0 to disable a function
    off: float | None = None
    most: float | None = None  # the highest value that is run; higher values only cost more
    log: bool = False  # whether the scale of the widget is logarithmic

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind '{self.kind}' is unknown; use one of {', '.join(KINDS)}")


def numeric_widgets() -> dict[tuple[str, str], io.Int.Input | io.Float.Input]:
    """{(node id, input id): numeric widget} of all nodes, in the order of the schemas."""
    return {
        (schema.node_id, i.id): i
        for schema in (node.define_schema() for node in NODES)
        for i in schema.inputs
        if isinstance(i, (io.Int.Input, io.Float.Input))
    }


NODE = {node.define_schema().node_id: node for node in NODES}


def defaults(id: str) -> dict[str, Any]:
    """The default values of a node's widgets, as ComfyUI passes them."""
    return {i.id: i.default for i in NODE[id].define_schema().inputs if getattr(i, "default", None) is not None}


def execute(id: str, inputs: Mapping[str, Any], lists: bool = False) -> tuple:
    """The outputs of a node. ``lists``: the node takes lists, so every value that is not a list is put into one."""
    given = {k: v if not lists or isinstance(v, list) else [v] for k, v in inputs.items() if v is not None}
    return NODE[id].execute(**given).args


# ---- the demo checkpoints and data, loaded once


@functools.cache
def checkpoint():
    return modules.load_checkpoint("general")


@functools.cache
def expert():
    return modules.load_model("expert-animals")


@functools.cache
def vision():
    return modules.load_vision()


def vae():
    return checkpoint()[2]


@functools.cache
def prompt(text: str):
    clip = checkpoint()[1]
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@functools.cache
def token_model():
    return modules.load_masked_tokens()[0]


@functools.cache
def face_pairs() -> tuple[list[Tensor], list[Tensor]]:
    source, target, _ = modules.load_face_pairs()
    return source[:12], target[:12]


@functools.cache
def rare() -> Tensor:
    return modules.load_references(modules.reference_names()[0])[0]


@functools.cache
def training_latents() -> dict[str, Tensor]:
    pictures, _ = modules.load_references(modules.ALL_CONCEPTS)
    return {"samples": vae().encode(pictures[:40:2])}


def empty(batch: int = 1) -> dict[str, Tensor]:
    return {"samples": torch.zeros(batch, 8, 16, 16)}


def reference_latent() -> dict[str, Tensor]:
    return {"samples": vae().encode(rare()[:1])}


def left_half() -> Tensor:
    return (torch.arange(128) < 64).float().expand(1, 128, 128).clone()


def corner() -> Tensor:
    mask = torch.zeros(1, 128, 128)
    mask[:, :40, :40] = 1.0
    return mask


def sample(model, positive: str, batch: int, steps: int, seed: int, sampler: str = "euler") -> Tensor:
    """Images [batch, 128, 128, 3] of a prompt."""
    words = prompt(positive), prompt("")
    latent = host_nodes.common_ksampler(model, seed, steps, 4.0, sampler, "normal", *words, empty(batch))[0]
    return vae().decode(latent["samples"])


class Watched:
    """Context manager: counts the previews and files of a training that runs inside the block."""

    def __enter__(self):
        self.previews, self.before = 0, len(self.files())
        self.hook = comfy.utils.PROGRESS_BAR_HOOK
        comfy.utils.set_progress_bar_global_hook(self.seen)
        return self

    def seen(self, value: int, total: int, preview: Any, *_: Any, **__: Any) -> None:
        self.previews += preview is not None

    @staticmethod
    def files() -> list[Path]:
        return [p for p in Path(folder_paths.get_output_directory()).rglob("*") if p.is_file()]

    def __exit__(self, *_: Any) -> None:
        comfy.utils.set_progress_bar_global_hook(self.hook)
        self.written = len(self.files()) - self.before

    @property
    def numbers(self) -> dict[str, float]:
        return {"previews": self.previews, "files": self.written}


def found(pattern: str, text: str) -> float:
    """The number in the first group of ``pattern`` in a report; 0 without a match."""
    match = re.search(pattern, text)
    return float(match[1]) if match else 0.0


# ---- a run of each node


def blend(inputs: dict[str, Any], seed: int) -> Outcome:
    if inputs.pop("video", False):
        return blend_of_a_video(inputs, seed)
    model, trace = execute("SaliencyNoiseBlend", {"model": checkpoint()[0], "expert": expert(), **inputs})
    pictures = sample(model, "a dog left of a tree on blue", batch=2, steps=8, seed=seed)
    record = trace.record
    return Outcome(pictures, {"share": 100.0 * float(record.mean_shares()[1].mean()), "evaluations": record.cost[1]})


@functools.cache
def wan():
    """Two small Wan models with random weights, and the prompts of both."""
    from chorus.tests.families.catalogue import FAMILIES

    family = FAMILIES["WAN21_T2V"]
    return family.model(0), family.model(1), family.prompts(10), family.prompts(30)


def blend_of_a_video(inputs: dict[str, Any], seed: int) -> Outcome:
    """*flicker*: positions whose model changes from one frame to the next, in percent. The picture is the latent."""
    base, expert_model, words, (positive, negative) = wan()
    wired = dict(model=base, expert=expert_model, positive=positive, negative=negative)
    model, trace = execute("SaliencyNoiseBlend", {**wired, **inputs})
    latent = {"samples": torch.zeros(1, 16, 9, 16, 16)}
    video = host_nodes.common_ksampler(model, seed, 6, 4.0, "euler", "simple", *words, latent)[0]["samples"]
    mask = torch.stack([trace.record.shares(k)[1] for k in range(len(trace.record.steps))])
    return Outcome(video, {"flicker": 100.0 * float((mask[:, :, 1:] - mask[:, :, :-1]).abs().mean())})


def seed_select(inputs: dict[str, Any], seed: int) -> Outcome:
    wired = dict(model=checkpoint()[0], positive=prompt("a dog on blue"), negative=prompt(""), latent_image=empty())
    wired |= dict(references=rare(), vae=vae(), clip_vision=vision())
    inputs = {**wired, **inputs, "seed": inputs["seed"] + 1000 * seed}
    _, _, samples, grid, _, report = execute("SeedSelect", inputs)
    numbers = {
        "evaluations": found(r": (\d+) of \d+ planned", report),
        "pictures": len(samples["samples"]),
        "grid": grid.shape[1] * grid.shape[2] / 1e4,
    }
    return Outcome(vae().decode(samples["samples"]), numbers)


def random_noise(seed: int) -> Any:
    return custom.RandomNoise.execute(seed).args[0]


def seed_map(inputs: dict[str, Any], seed: int) -> Outcome:
    wired = dict(model=checkpoint()[0], positive=prompt("a dog on blue"), negative=prompt(""), latent_image=empty())
    wired |= dict(references=rare(), vae=vae(), clip_vision=vision(), noise=random_noise(1 + seed))
    image, _, _, report = execute("SeedMap", {**wired, **inputs})
    numbers = {
        "evaluations": found(r"(\d+) model evaluations", report),
        "rows": found(r"map of (\d+) x", report),
    }
    return Outcome(image, numbers)


def combined_noise(inputs: dict[str, Any], seed: int) -> Outcome:
    """*kept*: elements of the first noise, in percent, with a mask that rises from left to right."""
    ramp = torch.linspace(0.0, 1.0, 16).expand(1, 16, 16)
    wired = dict(noise=random_noise(1), other=random_noise(2 + seed), mask=ramp)
    (noise,) = execute("CombineNoise", {**wired, **inputs})
    values, kept = (n.generate_noise(empty()) for n in (noise, wired["noise"]))
    return Outcome(values, {"kept": 100.0 * float((values == kept).double().mean())})


def _blended():
    wired = {"model": checkpoint()[0], "expert": expert()}
    return execute("SaliencyNoiseBlend", {**defaults("SaliencyNoiseBlend"), **STEADY, **wired})[0]


def blend_grid(inputs: dict[str, Any], seed: int) -> Outcome:
    wired = dict(model=_blended(), positive=prompt("a dog left of a tree on blue"), negative=prompt(""))
    sheet, _ = execute(
        "BlendGrid", {**wired, "latent_image": empty(), "vae": vae(), **inputs, "seed": inputs["seed"] + 1000 * seed}
    )
    return Outcome(sheet)


def vary_prompt(inputs: dict[str, Any], seed: int) -> Outcome:
    (varied,) = execute("VaryPrompt", {"conditioning": prompt("a dog on blue"), **inputs})
    words = varied, prompt("")
    latent = host_nodes.common_ksampler(checkpoint()[0], seed, 20, 4.0, "euler", "normal", *words, empty())[0]
    return Outcome(vae().decode(latent["samples"]))


def cas_dm_head(inputs: dict[str, Any], seed: int) -> Outcome:
    head = execute("LoadCasDMHead", {"file": "chorus-demo-general.safetensors"})[0]
    (model,) = execute("CasDMHead", {"model": checkpoint()[0], "head": head, **inputs})
    return Outcome(sample(model, "a rocket on grey", batch=2, steps=12, seed=seed, sampler="euler"))


def train_head(inputs: dict[str, Any], seed: int) -> Outcome:
    wired = dict(model=checkpoint()[0], samples=training_latents(), positive=[prompt("a dog on blue")])
    wired |= dict(negative=[prompt("")])
    inputs = {**wired, **inputs, "seed": inputs["seed"] + seed}
    with Watched() as watched:
        head, losses, report = execute("TrainCasDMHead", inputs, lists=True)
    (model,) = execute("CasDMHead", {**defaults("CasDMHead"), "model": checkpoint()[0], "head": head})
    pictures = sample(model, "a dog on blue", batch=2, steps=3, seed=0, sampler="euler")
    held = found(r"loss on (\d+) validation images", report)
    return Outcome(pictures, watched.numbers | {"steps": len(losses["loss"]), "held out": held})


def masked_tokens(inputs: dict[str, Any], seed: int) -> Outcome:
    wired = dict(model=token_model(), positive=prompt("a dog on blue"), negative=prompt(""))
    image, _, _ = execute("MaskedTokenSampler", {**wired, **inputs, "seed": inputs["seed"] + 1000 * seed})
    count, height, width, _ = image.shape
    variety = float((image.double() - image.double().mean(0)).square().mean().sqrt())
    return Outcome(image, {"pictures": count, "height": height, "width": width, "variety": variety})


def token_video(inputs: dict[str, Any], seed: int) -> Outcome:
    wired = dict(model=token_model(), positive=prompt("a dog on blue"), negative=prompt(""))
    images, _, report = execute("MaskedTokenVideo", {**wired, **inputs, "seed": inputs["seed"] + 1000 * seed})
    count, height, width, _ = images.shape
    generated = sum(int(number) for number in re.findall(r"(\d+) of \d+ tokens generated", report))
    return Outcome(images[-1:], {"frames": count, "height": height, "width": width, "generated tokens": generated})


@functools.cache
def rare_moving() -> Tensor:
    """A video of three frames, in which the first picture of ``rare`` moves to the right."""
    return torch.cat([rare()[:1].roll(8 * t, 2) for t in range(3)])


def styled(model, seed: int = 0) -> Tensor:
    small = dict(width=64, height=64, batch_size=4, **ONE_PASS)
    return masked_tokens({**defaults("MaskedTokenSampler"), **small, "model": model}, seed).picture


def put_lora(inputs: dict[str, Any], seed: int) -> Outcome:
    wired = dict(model=token_model(), lora=one_lora())
    return Outcome(
        styled(execute("LoadMaskedTokenLora", {**defaults("LoadMaskedTokenLora"), **wired, **inputs})[0], seed)
    )


@functools.cache
def one_lora():
    inputs = {**defaults("TrainMaskedTokenLora"), **SETTINGS["TrainMaskedTokenLora"].inputs, "steps": 30}
    return _trained_lora(inputs)[0]


def _trained_lora(inputs: dict[str, Any]) -> tuple:
    wired = dict(model=token_model(), images=rare(), positive=prompt("a dog on blue"))
    return execute("TrainMaskedTokenLora", {**wired, **inputs})


def train_lora(inputs: dict[str, Any], seed: int) -> Outcome:
    with Watched() as watched:
        lora, losses, report = _trained_lora({**inputs, "seed": inputs["seed"] + seed})
    picture = put_lora({"lora": lora}, 0).picture
    weights = found(r": (\d+) weights in", report) / 1000
    return Outcome(picture, watched.numbers | {"steps": len(losses["loss"]), "thousand weights": weights})


def refine_faces(inputs: dict[str, Any], seed: int) -> Outcome:
    """Refines two faces of different sizes in one image. It has no seed; seed 1 returns the unrefined image."""
    source = torch.cat(face_pairs()[0][:2]).movedim(-1, 1)
    picture = torch.full((1, 3, 128, 192), 0.5)
    picture[..., 16:112, 16:112] = torch.nn.functional.interpolate(source[:1], (96, 96), mode="bilinear")
    picture[..., 70:118, 130:178] = torch.nn.functional.interpolate(source[1:], (48, 48), mode="bilinear")
    picture = picture.movedim(1, -1).contiguous()
    if seed:
        return Outcome(picture)
    boxes = [dict(x=28, y=28, width=72, height=72), dict(x=136, y=76, width=36, height=36)]
    if "refiner" not in inputs:
        inputs = inputs | {"refiner": execute("LoadFaceRefiner", {"file": "chorus-demo-faces.safetensors"})[0]}
    image, *_ = execute("FaceRefiner", {"image": picture, "bboxes": boxes, **inputs})
    return Outcome(image)


@torch.inference_mode(False)
def with_dropout():
    """A small random network of pix2pix's architecture, the only one on which FaceRefiner's seed has an effect."""
    network = new_generator(UnetConfig(ngf=4, downs=6, dropout=True), torch.Generator().manual_seed(0))
    return trained(network.state_dict(), {})


@torch.inference_mode(False)
def small_refiner():
    """A small network for the training; the full network takes half a second per step."""
    config = RefinerConfig(widths=(8, 16), blocks=(1, 1), reduction=8)
    return trained(new_generator(config, torch.Generator().manual_seed(0)).state_dict(), {})


def train_refiner(inputs: dict[str, Any], seed: int) -> Outcome:
    source, target = face_pairs()
    wired = dict(source=source, target=target, refiner=small_refiner())
    with Watched() as watched:
        refiner, losses, report = execute(
            "TrainFaceRefiner", {**wired, **inputs, "seed": inputs["seed"] + seed}, lists=True
        )
    picture, *_ = execute(
        "FaceRefiner",
        {**defaults("FaceRefiner"), "image": torch.cat(source[:3]), "refiner": refiner, "color_lock": False},
    )
    held = found(r" on (\d+) (?:and \d+ )?validation (?:pairs|images)", report)
    return Outcome(picture, watched.numbers | {"steps": len(losses["loss"]), "held out": held})


def load_pairs(inputs: dict[str, Any], seed: int) -> Outcome:
    source, *_ = execute("LoadTrainingPairs", {**inputs, "first": inputs["first"] + 3 * seed})
    return Outcome(source[0], {"pairs": len(source)})


def combine_prompts(inputs: dict[str, Any], seed: int) -> Outcome:
    text, number, _ = execute("PromptCombinations", {**inputs, "index": inputs["index"] + seed})
    code = zlib.crc32(f"{text} {number}".encode())
    # the node returns no image; a random vector that depends on the text replaces it
    return Outcome(torch.randn(16, generator=torch.Generator().manual_seed(code)))


def score(inputs: dict[str, Any], seed: int) -> Outcome:
    source, target, _ = modules.load_face_pairs()
    wired = dict(refined=source, target=target, clip_vision=vision())
    _, report = execute("FaceRealismScore", {**wired, **inputs}, lists=True)
    low, high = (float(x) for x in re.search(r"95 %: (\S+) to (\S+)\)", report).groups())
    return Outcome(None, {"interval": high - low})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a node is run."""

    run: Callable[[dict[str, Any], int], Outcome]
    inputs: Mapping[str, Any] = field(default_factory=dict)  # cheaper values in place of the defaults
    unit: str = "of another seed"  # unit of differences between images


TRAINING = dict(steps=20, batch_size=2)
# the recommended blend of saliency_effect.py. With the default masks, which are recomputed in every step, a small
# change of a mask changes all later masks, so the image differs as much as with another seed
STEADY = dict(start_percent=0.05, mask_refresh=20)
SETTINGS = {
    "SaliencyNoiseBlend": Setting(run=blend, inputs=STEADY),
    "SeedSelect": Setting(run=seed_select, inputs=dict(steps=5, candidates=8, first_steps=2, cfg=4.0, iterations=4)),
    "SeedMap": Setting(run=seed_map, inputs=dict(steps=3, cfg=4.0, pairs=8, checks=0)),
    "CombineNoise": Setting(run=combined_noise),
    "BlendGrid": Setting(run=blend_grid, inputs=dict(rows="bias = 0 | 1", columns="", steps=4, cfg=4.0)),
    "VaryPrompt": Setting(run=vary_prompt),
    "CasDMHead": Setting(run=cas_dm_head),
    "TrainCasDMHead": Setting(run=train_head, inputs=TRAINING | dict(cfg=4.0, size="small", metric="l1")),
    "MaskedTokenSampler": Setting(run=masked_tokens, inputs=dict(width=64, height=64, batch_size=2)),
    "MaskedTokenVideo": Setting(run=token_video, inputs=dict(width=64, height=64, frames=3, steps=4, dx=16.0)),
    "LoadMaskedTokenLora": Setting(run=put_lora),
    "TrainMaskedTokenLora": Setting(run=train_lora, inputs=dict(steps=12)),
    "FaceRefiner": Setting(run=refine_faces, unit="of all that it changes"),
    "TrainFaceRefiner": Setting(
        run=train_refiner, inputs=TRAINING | dict(crop=64, metric="l1", learning_rate=1e-3, ema_decay=0.0)
    ),
    "LoadTrainingPairs": Setting(run=load_pairs, inputs=dict(folder=modules.FACE_PAIRS)),
    "PromptCombinations": Setting(
        run=combine_prompts, inputs=dict(template="a {tone} {who}", variables="tone = light | dark\nwho = man | woman")
    ),
    "FaceRealismScore": Setting(run=score),
}

PICTURE = Control()
SEED = Control(kind="selection")
OPTIMIZE = dict(mode="optimize")
FEATURES = dict(metric="clip_vision", vae=vae, clip_vision=vision)
UNPAIRED = dict(pairing="unpaired", crop=32, batch_size=1, steps=10)
RATE = Control(log=True)
FILES = Control(kind="number", number="files", off=0, at=5, most=20)
PREVIEWS = Control(kind="number", number="previews", off=0, at=5, most=20)
STEPS = Control(kind="time", number="steps", at=20, most=80)
BATCH = Control(kind="time", at=2, most=8)

CONTROLS: dict[str, dict[str, Control]] = {
    "SaliencyNoiseBlend": {
        "expert_strength": Control(kind="area", number="share", off=0),
        "bias": Control(kind="area", number="share"),
        "start_percent": Control(at=0.05),
        "end_percent": PICTURE,
        "expert_cfg": Control(off=0, at=4),
        "refresh": Control(kind="time", number="evaluations"),
        "general_strength": Control(kind="area", number="share"),
        "softness": Control(inputs=dict(mask_mode="soft")),
        "blur": PICTURE,
        "skip_below": Control(
            kind="time", number="evaluations", inputs=dict(bias=-1.5, mask_refresh=1), off=0, at=0.05
        ),
        "crop_margin": Control(kind="time", number="evaluations", inputs=dict(region=corner), off=0, at=4),
        "expert_share": Control(kind="area", number="share", off=0, at=0.4),
        "mask_momentum": Control(inputs=dict(mask_refresh=1)),
        "mask_refresh": Control(at=20),
        "temporal_smoothing": Control(kind="number", number="flicker", inputs=dict(video=True)),
    },
    "SeedSelect": {
        "seed": Control(kind="selection", inputs=dict(candidates=1)),
        "candidates": Control(kind="time", number="evaluations", most=32),
        "pick": Control(kind="selection", most=8),
        "count": Control(kind="number", number="pictures", most=8),
        "steps": Control(kind="time", number="evaluations", most=40),
        "cfg": PICTURE,
        "denoise": Control(inputs=dict(latent_image=reference_latent)),
        "iterations": Control(kind="time", number="evaluations", inputs=OPTIMIZE | dict(patience=0), at=4, most=12),
        "learning_rate": Control(inputs=OPTIMIZE, log=True),
        "semantic_weight": Control(inputs=OPTIMIZE),
        "appearance_weight": Control(inputs=OPTIMIZE),
        "first_steps": Control(kind="time", number="evaluations", inputs=dict(steps=12), most=12),
        "survivors": Control(kind="time", number="evaluations", inputs=dict(candidates=16, first_steps=1)),
        "optimized": Control(
            kind="time", number="evaluations", inputs=dict(mode="search+optimize", iterations=1), most=8
        ),
        "optimize_steps": Control(kind="time", number="evaluations", inputs=OPTIMIZE, off=0, at=4, most=12),
        "last_steps": Control(kind="time", inputs=OPTIMIZE, off=0, at=3, most=5),
        "norm_guard": Control(inputs=OPTIMIZE | dict(learning_rate=0.3), off=0),
        "patience": Control(
            kind="time",
            number="evaluations",
            inputs=OPTIMIZE | dict(learning_rate=10.0, iterations=10, norm_guard=0.0),
            off=0,
            at=2,
            most=10,
        ),
        "grid_size": Control(kind="number", number="grid", at=4, most=8),
        "references_used": Control(inputs=OPTIMIZE, off=0, at=3, most=4),
        "share": Control(kind="selection", inputs=dict(shares=1024, candidates=1)),
        "shares": Control(kind="selection", inputs=OPTIMIZE | dict(iterations=0, pick=2)),
        # a single candidate, since another strength can change which one is the best
        "prompt_variation": Control(inputs=dict(candidates=1), at=1.0),
    },
    "SeedMap": {
        "patches": Control(kind="number", number="rows", at=4, most=16),
        "pairs": Control(kind="time", number="evaluations", at=8, most=32),
        "checks": Control(kind="time", number="evaluations", off=0, at=4, most=12),
        "seed": SEED,
        "steps": Control(kind="time", number="evaluations", at=3, most=12),
        "cfg": PICTURE,
        "denoise": Control(inputs=dict(latent_image=reference_latent)),
        "semantic_weight": PICTURE,
        "appearance_weight": PICTURE,
    },
    "CombineNoise": {"threshold": Control(kind="number", number="kept")},
    "BlendGrid": {
        "seed": SEED,
        "steps": Control(kind="time", at=4, most=12),
        "cfg": PICTURE,
    },
    "VaryPrompt": {
        "seed": Control(kind="selection", inputs=dict(strength=1.0)),
        "strength": Control(at=1.0),
        "end_percent": Control(inputs=dict(strength=1.0)),
    },
    "CasDMHead": {"strength": PICTURE, "start_percent": PICTURE, "end_percent": PICTURE},
    "TrainCasDMHead": {
        "cfg": Control(at=4),
        "metric_weight": Control(inputs=FEATURES | dict(steps=10)),
        "steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": RATE,
        "seed": SEED,
        "gradient_accumulation": Control(kind="time", most=8),
        "ema_decay": Control(inputs=dict(steps=100), log=False),
        "crop": Control(kind="time", inputs=FEATURES | dict(steps=10), at=32, most=128),
        "validation_fraction": Control(kind="number", number="held out"),
        "cached_steps": Control(kind="time", off=0, at=5, most=20),
        "checkpoint_every": FILES,
        "preview_every": Control(kind="number", number="previews", inputs=dict(vae=vae), off=0, at=5, most=20),
    },
    "MaskedTokenSampler": {
        "seed": SEED,
        "steps": Control(kind="time", most=32),
        "cfg": Control(off=0, at=3),
        "temperature": Control(kind="number", number="variety", inputs=dict(batch_size=8)),
        "width": Control(kind="number", number="width", at=64, most=256),
        "height": Control(kind="number", number="height", at=64, most=256),
        "batch_size": Control(kind="number", number="pictures", most=8),
        "denoise": Control(inputs=dict(image=rare), at=0.5),
        "aesthetic_score": PICTURE,
        "feather": Control(inputs=dict(image=lambda: rare()[:1], mask=left_half)),
    },
    "MaskedTokenVideo": {
        "seed": SEED,
        "steps": Control(kind="time", most=32),
        "cfg": Control(off=0, at=3, inputs=ONE_PASS),
        "frames": Control(kind="number", number="frames", most=8),
        "dx": Control(at=16, most=64, inputs=dict(frames=2)),
        "dy": Control(at=16, most=64, inputs=dict(frames=2)),
        "strength": Control(inputs=dict(images=rare_moving)),
        "boundary": Control(kind="number", number="generated tokens", most=8),
        "reference_frames": Control(kind="selection"),
        "width": Control(kind="number", number="width", at=64, most=256),
        "height": Control(kind="number", number="height", at=64, most=256),
        "feather": Control(inputs=dict(images=rare_moving, mask=left_half)),
    },
    "LoadMaskedTokenLora": {"strength": PICTURE, "alpha": Control(off=0, at=32)},
    "TrainMaskedTokenLora": {
        "rank": Control(kind="number", number="thousand weights", inputs=dict(steps=2), most=64),
        "alpha": PICTURE,
        "steps": Control(kind="time", number="steps", at=12, most=40),
        "batch_size": Control(kind="time", most=8),
        "learning_rate": RATE,
        "seed": SEED,
        "resolution": Control(kind="time", off=0, at=64, most=128),
        "checkpoint_every": FILES,
        "preview_every": PREVIEWS,
    },
    "FaceRefiner": {
        "strength": PICTURE,
        "padding": PICTURE,
        "feather": PICTURE,
        "identity_guard": Control(inputs=dict(refiner=with_dropout), off=0, at=0.1),
        "face_index": Control(kind="selection", inputs=dict(faces="index")),
        "min_face": Control(most=128),
        "size": Control(off=0, at=128, most=512),
        "seed": Control(kind="selection", inputs=dict(faithful=True, refiner=with_dropout)),
    },
    "TrainFaceRefiner": {
        "metric_weight": PICTURE,
        "steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": RATE,
        "seed": SEED,
        "gradient_accumulation": Control(kind="time", most=8),
        "crop": Control(inputs=dict(resize=256, steps=8), at=64, most=256),
        "resize": Control(off=0, at=64, most=256),
        "grad_weight": PICTURE,
        "l1_weight": PICTURE,
        "gan_weight": PICTURE,
        "cycle_weight": Control(inputs=UNPAIRED),
        "identity_weight": Control(inputs=UNPAIRED),
        # the pool returns earlier images at random, so every pool size returns different ones; the run has 20 images
        "pool_size": Control(kind="selection", inputs=UNPAIRED | dict(steps=20), at=4, most=16),
        "ema_decay": Control(inputs=dict(steps=100)),
        "validation_fraction": Control(kind="number", number="held out"),
        "checkpoint_every": FILES,
        "preview_every": PREVIEWS,
    },
    "LoadTrainingPairs": {
        "first": Control(kind="selection", inputs=dict(count=1), most=95),
        "count": Control(kind="number", number="pairs", off=0, at=4, most=96),
    },
    "PromptCombinations": {
        "index": SEED,
        "first_seed": SEED,
        "share": Control(kind="selection", inputs=dict(shares=1024)),
        "shares": Control(kind="selection", inputs=dict(index=1)),
    },
    # the number of blocks determines which images are in the same block
    "FaceRealismScore": {"blocks": Control(kind="selection", number="interval")},
}
