"""The example workflows of Seed Select."""

from __future__ import annotations

from .workflow import BLUE, SAMPLER, Workflow

SIGN, PROMPT, FIRST = "carrot", "a carrot", 1008
SAMPLING = {**SAMPLER, "sampler_name": "euler", "scheduler": "normal"}


class SeedWorkflow(Workflow):
    """With the general checkpoint, a prompt that names a rare sign, and one empty latent."""

    def __init__(self, title: str, note: str):
        super().__init__(title, note)
        self.general = self.checkpoint("general")
        self.positive = self.text(PROMPT, self.general, "Prompt")
        self.negative = self.text("", self.general, "Negative")
        self.one = self.latent(1)

    def select(self, mode: str, column: int = 2, **widgets) -> int:
        references = self.node("ChorusDemoReferences", 1, {"sign": SIGN}, color=BLUE)
        vision = self.node("ChorusDemoVision", 1, {}, color=BLUE)
        self.grid((references, "IMAGE"), "references", column + 1)
        wires = {
            "model": (self.general, "MODEL"),
            "positive": (self.positive, "CONDITIONING"),
            "negative": (self.negative, "CONDITIONING"),
            "latent_image": (self.one, "LATENT"),
            "references": (references, "IMAGE"),
            "vae": (self.general, "VAE"),
            "clip_vision": (vision, "CLIP_VISION"),
        }
        # the page names the seed's control by its default, which is to leave the seed as it is
        widgets = {"mode": mode, "seed": FIRST, "fixed": "fixed", **SAMPLING, **widgets}
        return self.node("SeedSelect", column, widgets, wires=wires, color=BLUE)

    def plain(self, title: str, column: int, seed: int = FIRST, wires: dict | None = None) -> int:
        """KSampler."""
        common = {
            "model": (self.general, "MODEL"),
            "positive": (self.positive, "CONDITIONING"),
            "negative": (self.negative, "CONDITIONING"),
            "latent_image": (self.one, "LATENT"),
        }
        widgets = {"seed": seed, "control_after_generate": "fixed", **SAMPLING}
        return self.node("KSampler", column, widgets, title, {**common, **(wires or {})})

    def advanced(self, title: str, column: int, noise, positive: int | None = None) -> int:
        """SamplerCustomAdvanced from ``noise``, (node, output)."""
        guider = self.node(
            "CFGGuider",
            column,
            {"cfg": SAMPLING["cfg"]},
            wires={
                "model": (self.general, "MODEL"),
                "positive": (self.positive if positive is None else positive, "CONDITIONING"),
                "negative": (self.negative, "CONDITIONING"),
            },
        )
        sampler = self.node("KSamplerSelect", column, {"sampler_name": SAMPLING["sampler_name"]})
        sigmas = self.node(
            "BasicScheduler",
            column,
            {"scheduler": SAMPLING["scheduler"], "steps": SAMPLING["steps"], "denoise": 1.0},
            wires={"model": (self.general, "MODEL")},
        )
        wires = {
            "noise": noise,
            "guider": (guider, "GUIDER"),
            "sampler": (sampler, "SAMPLER"),
            "sigmas": (sigmas, "SIGMAS"),
            "latent_image": (self.one, "LATENT"),
        }
        return self.node("SamplerCustomAdvanced", column, title=title, wires=wires)

    def picture(self, sampler: int, name: str, column: int) -> None:
        """Decode and save, enlarged with its pixels kept square."""
        image = self.node("VAEDecode", column, wires={"samples": (sampler, "LATENT"), "vae": (self.general, "VAE")})
        self.grid((image, "IMAGE"), name, column, columns=1)

    def shown(self, select: int, output: str, column: int, name: str) -> None:
        self.node("SaveImage", column, {"filename_prefix": name}, name, {"images": (select, output)}, height=320)


def search() -> Workflow:
    w = SeedWorkflow(
        "Rare sign by search",
        f"# A rare sign by search\n\nThe checkpoint has hardly seen a *{SIGN}* in training, and many seeds fail."
        " *Seed Select* looks for one that does not: 64 seeds get four steps, the best of them more, and the last all steps. What"
        " is best, four reference pictures say. That costs a third of 64 whole pictures.\n\nIts `seed` goes into a plain"
        " *KSampler*, which gives the same picture, bit for bit. Left: the first seed, as it comes.\n\nLook at `grid` and set"
        " `pick` if you like another one better.",
    )
    select = w.select("search", candidates=64, grid_size=8)
    first = w.plain("The first seed", 3)
    found = w.plain("The seed that was found", 3, wires={"seed": (select, "seed")})
    w.picture(first, "first seed", 4)
    w.picture(found, "found seed", 4)
    w.shown(select, "grid", 5, "candidates")
    w.node("PreviewAny", 3, {}, "Report", {"source": (select, "report")}, height=240)
    return w


def optimize() -> Workflow:
    w = SeedWorkflow(
        "Rare sign by optimising the noise",
        "# A rare sign by optimising the noise\n\nThe best of 16 seeds becomes the start. From there the gradient of the distance"
        " to four reference pictures, through the whole sampling, moves the noise until the picture fits. The model is not"
        " changed.\n\nNo integer seed gives such a noise: `noise` goes into *SamplerCustomAdvanced* with the same settings."
        " *Save Seed* keeps it.\n\n`optimize_steps` 10 lets a shorter sampling stand for the whole one: half the time. Mode"
        " *optimize* starts from `seed` itself; from a hopeless start it may please the encoder more than the eye.\n\nThe first"
        " picture is the start, as its seed gives it.",
    )
    select = w.select("search+optimize", iterations=8, optimize_steps=10)
    start = w.plain("The start", 3, wires={"seed": (select, "seed")})
    noise = w.advanced("From the optimised noise", 3, (select, "noise"))
    w.picture(start, "start", 4)
    w.picture(noise, "optimised", 4)
    w.shown(select, "preview", 5, "scores")
    w.node("SaveSeed", 3, {}, wires={"noise": (select, "noise")}, color=BLUE)
    w.node("PreviewAny", 3, {}, "Report", {"source": (select, "report")}, height=200)
    return w


def saved() -> Workflow:
    w = SeedWorkflow(
        "Saved seed",
        "# A saved seed\n\n*Load Seed* brings back a noise that was found for a rare sign; this one comes with the pack. With the"
        " prompt and settings that it was found for it gives that picture again, and with another prompt near it, a variation"
        " of it.\n\nThe two on the right start from an ordinary random noise, with the same prompts.",
    )
    on_blue = w.text(f"{PROMPT} on blue", w.general, "Prompt of a variation")
    noise = w.node("LoadSeed", 1, {"file": f"chorus-demo {SIGN}"}, color=BLUE)
    random = w.node("RandomNoise", 1, {"noise_seed": FIRST, "control_after_generate": "fixed"})
    for source, output, name in ((noise, "noise", "saved"), (random, "NOISE", "random")):
        column = 2 if name == "saved" else 4
        w.picture(w.advanced(f"From the {name} noise", column, (source, output)), name, column + 1)
        other = w.advanced(f"Variation, {name} noise", column, (source, output), on_blue)
        w.picture(other, f"{name}, on blue", column + 1)
    return w


WORKFLOWS = [search(), optimize(), saved()]
