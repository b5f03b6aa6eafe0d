"""The example workflows of Cas-DM Head."""

from __future__ import annotations

from .workflow import BLUE, SAMPLER, Workflow

CFG, SEED = 4.0, 7  # the head that comes with the pack was trained with this cfg
SAMPLING = {**SAMPLER, "sampler_name": "euler", "scheduler": "normal", "cfg": CFG}


class HeadWorkflow(Workflow):
    """With the general checkpoint, prompts, and empty latents for samplings with and without a head."""

    def __init__(self, title: str, note: str, prompt: str, pictures: int, column: int = 1):
        super().__init__(title, note)
        self.general = self.checkpoint("general")
        self.positive = self.text(prompt, self.general, "Prompt", column)
        self.negative = self.text("", self.general, "Negative", 1)
        self.empty, self.columns = self.latent(pictures, column), pictures // 2

    def head(self, head, column: int) -> int:
        """Cas-DM Head; ``head`` is (node, output)."""
        return self.node("CasDMHead", column, wires={"model": (self.general, "MODEL"), "head": head}, color=BLUE)

    def paint(self, model, name: str, column: int, steps: int) -> None:
        """Sample ``model``, (node, output); the pictures are saved under ``name``, in two rows."""
        wires = {
            "model": model,
            "positive": (self.positive, "CONDITIONING"),
            "negative": (self.negative, "CONDITIONING"),
            "latent_image": (self.empty, "LATENT"),
        }
        widgets = {"seed": SEED, "control_after_generate": "fixed", **SAMPLING, "steps": steps}
        sampler = self.node("KSampler", column, widgets, name.capitalize(), wires)
        wires = {"samples": (sampler, "LATENT"), "vae": (self.general, "VAE")}
        pictures = self.node("VAEDecode", column + 1, wires=wires)
        self.grid((pictures, "IMAGE"), name, column + 1, self.columns)


def use() -> Workflow:
    w = HeadWorkflow(
        "Cas-DM head",
        "# A Cas-DM head\n\nThe head is a small network, 2 MB, that was trained to see what this checkpoint gets wrong. *Cas-DM"
        " Head* lets it repaint what the model predicts, at every step; the model stays as it is. It works in any sampler.\n\n"
        "All three sheets come from the same prompt and seed: five steps, five steps with the head, twenty steps.\n\nLook at the"
        " backgrounds: the prompt says grey. Five steps leave stains; with the head they are nearer to what twenty steps give."
        " The shapes stay what the model makes of them.\n\nThen try `strength` 0.5, other steps, and prompts such as *a dog on"
        " blue*. Keep `cfg` at 4: the head was trained for it.",
        "a rocket on grey",
        pictures=6,
    )
    load = w.node("LoadCasDMHead", 1, {"file": "chorus-demo-general.safetensors"}, color=BLUE)
    head = w.head((load, "head"), 2)
    w.paint((w.general, "MODEL"), "five steps", 3, steps=5)
    w.paint((head, "model"), "five steps with the head", 3, steps=5)
    w.paint((w.general, "MODEL"), "twenty steps", 3, steps=20)
    return w


def train() -> Workflow:
    w = HeadWorkflow(
        "Train a Cas-DM head",
        "# Train a Cas-DM head\n\nA head learns from pictures what a checkpoint gets wrong about them. Here: 392 signs on"
        " backgrounds that this checkpoint has never seen. It paints its carrots on white; after a minute of training the head"
        " brings the pictures' colours in, and the model is not changed.\n\n**Your pictures**: put a folder of them into ComfyUI's"
        " `input` folder, press R, and wire *Load Image-Text (from Folder)* in place of *Chorus Demo References*. A `.txt`"
        " of the same name holds the prompt of each; without one it is trained with the empty prompt. Set the size in *Upscale"
        " Image* to what your checkpoint paints.\n\n"
        "Look at the report: is the mix nearer to the held-out pictures than the model alone? 120 steps are a"
        " taste; the head that comes with the pack took 1,200 of 32 pictures. *Cancel* keeps what was learned.",
        "a carrot",
        pictures=4,
        column=4,
    )
    vision = w.node("ChorusDemoVision", 0, {}, color=BLUE)
    signs = w.node("ChorusDemoReferences", 1, {"sign": "all signs"}, color=BLUE)
    size = {"upscale_method": "lanczos", "width": 64, "height": 64, "crop": "center"}
    scaled = w.node("ImageScale", 1, size, wires={"image": (signs, "IMAGE")})
    encoded = w.node("VAEEncode", 1, wires={"pixels": (scaled, "IMAGE"), "vae": (w.general, "VAE")})
    wires = {"clip": (w.general, "CLIP"), "text": (signs, "prompt")}
    captions = w.node("CLIPTextEncode", 1, {}, "The captions", wires, height=90)
    wires = {
        "model": (w.general, "MODEL"),
        "samples": (encoded, "LATENT"),
        "positive": (captions, "CONDITIONING"),
        "negative": (w.negative, "CONDITIONING"),
        "vae": (w.general, "VAE"),
        "clip_vision": (vision, "CLIP_VISION"),
    }
    widgets = {"cfg": CFG, "steps": 120, "learning_rate": 0.001, "held_out": 0.02, "preview_every": 40}
    training = w.node("TrainCasDMHead", 2, widgets, wires=wires, width=310, color=BLUE)
    head = w.head((training, "head"), 3)
    w.node("SaveCasDMHead", 3, {}, wires={"head": (training, "head")}, color=BLUE)
    w.node("PreviewAny", 3, {}, "Report", {"source": (training, "report")}, height=320)
    w.node("LossGraphNode", 3, {}, wires={"loss": (training, "loss_map")}, height=300)
    w.paint((w.general, "MODEL"), "without a head", 4, steps=8)
    w.paint((head, "model"), "with the trained head", 4, steps=8)
    return w


WORKFLOWS = [use(), train()]
