"""The example workflows of MaskedTokenSampler."""

from __future__ import annotations

from .workflow import BLUE, Workflow


class TokenWorkflow(Workflow):
    """With the pack's small masked token model in its first column."""

    def __init__(self, title: str, note: str):
        super().__init__(title, note)
        self.model = self.node("LoadMaskedTokenModel", 0, {"model_folder": "chorus-demo"}, color=BLUE)

    def prompts(self, text: str, title: str = "Prompt") -> tuple[int, int]:
        return self.text(text, self.model, title), self.text("", self.model, "Negative")

    def tokens(
        self, prompts: tuple[int, int], column: int, title: str, model: int | None = None, wires=None, **widgets
    ):
        """A sampler of 64 x 64 pixels; ``model`` is a node with a MASKED_TOKEN_MODEL, if not the first."""
        wires = {
            "model": (self.model if model is None else model, "MASKED_TOKEN_MODEL"),
            "positive": (prompts[0], "CONDITIONING"),
            "negative": (prompts[1], "CONDITIONING"),
            **(wires or {}),
        }
        common = {
            "seed": 7,
            "control_after_generate": "fixed",
            "width": 64,
            "height": 64,
            "batch_size": 4,
            "feather": 2,
        }
        return self.node("MaskedTokenSampler", column, {**common, **widgets}, title, wires, color=BLUE)

    def half(self, column: int, x: int, y: int, width: int, height: int, title: str) -> int:
        """A mask of 64 x 64 pixels with a rectangle."""
        nothing = self.node("SolidMask", column, {"value": 0.0, "width": 64, "height": 64}, "Nothing")
        part = self.node("SolidMask", column, {"value": 1.0, "width": width, "height": height}, "A part")
        wires = {"destination": (nothing, "MASK"), "source": (part, "MASK")}
        return self.node("MaskComposite", column, {"x": x, "y": y, "operation": "add"}, title, wires)


def text_to_image() -> Workflow:
    w = TokenWorkflow(
        "Masked tokens",
        "# Masked tokens\n\nA picture as 256 words of a visual vocabulary: at first all are unknown; every step predicts all of"
        " them at once and keeps some (aMUSEd). Twelve steps are enough.\n\n`order` decides which tokens stay: the ones the"
        " model is surest of (*confidence*, the paper), or points that spread evenly (*halton*).\n\nThis is the small model"
        " that comes with the pack. For aMUSEd itself choose its folder in *Load Masked Token Model*; the help page says"
        " where to get it.",
    )
    prompts = w.prompts("a rainbow on blue")
    for order in ("confidence", "halton"):
        w.grid((w.tokens(prompts, 2, order.capitalize(), order=order), "IMAGE"), order, 3)
    return w


def inpainting() -> Workflow:
    w = TokenWorkflow(
        "Inpaint with masked tokens",
        "# Inpaint with masked tokens\n\nTokens under the mask are generated anew, all others stay. Every pixel outside the"
        " mask comes back exactly as it was, and `feather` mixes a soft seam inside it.\n\nA picture is painted first; then its"
        " right half is painted again with another prompt. Below, the picture is padded: the same sampler paints what lies"
        " beyond its edge.\n\n`denoise` under 1 keeps a part of the tokens under the mask.",
    )
    scene = w.prompts("a cat left of an apple on blue", "Prompt of the scene")
    draft = w.tokens(scene, 2, "A picture", batch_size=1)
    picture = {"image": (draft, "IMAGE")}
    other = w.prompts("a cat left of a tree on blue", "Prompt of the right half")
    mask = w.half(2, 32, 0, 32, 64, "The right half")
    half = w.tokens(other, 3, "The right half again", wires={**picture, "mask": (mask, "MASK")}, schedule="linear")
    pad = w.node(
        "ImagePadForOutpaint", 2, {"left": 0, "top": 0, "right": 32, "bottom": 0, "feathering": 0}, wires=picture
    )
    beyond = {"image": (pad, "IMAGE"), "mask": (pad, "MASK")}
    wide = w.tokens(scene, 3, "Beyond the edge", wires=beyond, schedule="linear", feather=0)
    w.grid((draft, "IMAGE"), "picture", 4, columns=1)
    w.grid((half, "IMAGE"), "right half", 4)
    w.grid((wide, "IMAGE"), "beyond the edge", 4, width=96)
    return w


def style() -> Workflow:
    w = TokenWorkflow(
        "Style from one picture",
        "# Style from one picture\n\nA masked token model learns a style from a single picture in minutes (StyleDrop's idea,"
        " aMUSEd's recipe): a LoRA on its attention.\n\nThe picture here is a cat in negative colours, which the model has never"
        " seen. The LoRA then draws a dog that way: compare with and without, same prompt, same seeds. A model as small as"
        " this one learns the colours, hardly more.\n\nFor aMUSEd: 1500 to 2000 steps at batch 1, learning rate 4e-4 (256) or"
        " 1e-3 with alpha 1 (512). *Save Masked Token LoRA* keeps it.",
    )
    expert = w.checkpoint("expert-animals")
    say = w.text("a cat on white", expert, "Prompt of the picture")
    nothing = w.text("", expert, "Negative")
    sampler = w.sample((expert, "MODEL"), say, nothing, w.latent(1), 3, "The picture", 2)
    pictures = w.node("VAEDecode", 3, wires={"samples": (sampler, "LATENT"), "vae": (expert, "VAE")})
    picture = w.node("ImageInvert", 3, title="In negative colours", wires={"image": (pictures, "IMAGE")})
    told = w.prompts("a cat on white", "What the picture shows")
    wires = {
        "model": (w.model, "MASKED_TOKEN_MODEL"),
        "images": (picture, "IMAGE"),
        "positive": (told[0], "CONDITIONING"),
    }
    widgets = {"rank": 8, "alpha": 8.0, "steps": 80, "batch_size": 4, "learning_rate": 0.0015, "seed": 1}
    training = w.node("TrainMaskedTokenLora", 4, widgets, wires=wires, color=BLUE)
    wires = {"model": (w.model, "MASKED_TOKEN_MODEL"), "lora": (training, "MASKED_TOKEN_LORA")}
    styled = w.node("LoadMaskedTokenLora", 5, {"strength": 1.3}, wires=wires, color=BLUE)
    prompts = w.prompts("a dog on white", "Prompt of other pictures")
    w.grid((w.tokens(prompts, 6, "Without the style"), "IMAGE"), "without", 7)
    w.grid((w.tokens(prompts, 6, "With the style", model=styled), "IMAGE"), "with", 7)
    w.grid((picture, "IMAGE"), "the picture", 7, columns=1)
    w.node("SaveMaskedTokenLora", 5, {}, wires={"lora": (training, "MASKED_TOKEN_LORA")}, color=BLUE)
    return w


def pinned_tokens() -> Workflow:
    w = TokenWorkflow(
        "Pinned tokens",
        "# Pinned tokens\n\nTokens that are wired into the sampler stay, whatever the seed: *Masked Token Edit* frees the ones"
        " under a mask, the rest is pinned. So a draft you like stays, and only its right half is drawn again, four times.\n\n"
        "*Save Masked Tokens* keeps a draft; *Load Masked Tokens* brings it back.",
    )
    prompts = w.prompts("a cat left of a tree on blue")
    draft = w.tokens(prompts, 2, "Draft", batch_size=1)
    mask = w.half(2, 32, 0, 32, 64, "The right half")
    wires = {"tokens": (draft, "TOKENS"), "mask": (mask, "MASK")}
    edit = w.node("MaskedTokenEdit", 3, {}, "Free the right half", wires, color=BLUE)
    again = w.tokens(prompts, 4, "Other right halves", wires={"tokens": (edit, "TOKENS")}, seed=100)
    w.grid((draft, "IMAGE"), "draft", 5, columns=1)
    w.grid((again, "IMAGE"), "right half again", 5)
    w.node("SaveMaskedTokens", 3, {}, wires={"tokens": (draft, "TOKENS")}, color=BLUE)
    return w


WORKFLOWS = [text_to_image(), inpainting(), style(), pinned_tokens()]
