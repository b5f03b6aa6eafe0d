"""The example workflows of Saliency Noise Blend."""

from __future__ import annotations

from .workflow import Workflow


def plain_fusion() -> Workflow:
    w = Workflow(
        "Plain fusion",
        "# Plain fusion\n\nTwo checkpoints paint one image. **general** knows every sign in Noto style, **expert-animals**"
        " only animals, in Twemoji style.\n\n*Saliency Noise Blend* asks both at every step and gives each position to the"
        " model whose prompt pulls harder there. Same prompt, same seed: compare the fused pictures with each model"
        " alone.\n\nThe view on the right shows who painted where.\n\nTry: `bias` for more or less of the expert.",
    )
    general, expert = w.checkpoint("general"), w.checkpoint("expert-animals")
    prompt = "a koala below a rainbow on green"
    positive, negative = w.text(prompt, general, "Prompt, general"), w.text("", general, "Negative, general")
    own, own_negative = w.text(prompt, expert, "Prompt, expert"), w.text("", expert, "Negative, expert")
    latent = w.latent()
    blend = w.blend((general, "MODEL"), expert, own, own_negative, label="animals")
    alone = w.sample((general, "MODEL"), positive, negative, latent, 7, "General alone")
    fused = w.sample((blend, "model"), positive, negative, latent, 7, "Fused")
    other = w.sample((expert, "MODEL"), own, own_negative, latent, 7, "Expert alone")
    w.save(alone, general, "general")
    w.save(fused, general, "fused")
    w.save(other, expert, "expert")
    w.view(blend, fused, 6)
    return w


def three_models() -> Workflow:
    w = Workflow(
        "Three models",
        "# Three models\n\nBlends chain like LoRAs: the second *Saliency Noise Blend* takes the MODEL of the first, and all"
        " three models compete for every position at once.\n\nThe third model here is the general checkpoint again with a"
        " prompt of its own; a model that is wired in twice costs a larger batch, not a second run.\n\nSettings marked in"
        " the tooltips as joint are taken from the last node of the chain.",
    )
    general, expert = w.checkpoint("general"), w.checkpoint("expert-animals")
    positive = w.text("a pig above a cloud on yellow", general, "Prompt of the scene")
    negative = w.text("", general, "Negative")
    animal = w.text("a pig above a cloud on yellow", expert, "Prompt, animals")
    thing = w.text("a rainbow on yellow", general, "Prompt, third model")
    latent = w.latent()
    first = w.blend((general, "MODEL"), expert, animal, negative, label="animals")
    second = w.blend((first, "model"), general, thing, negative, label="rainbow")
    fused = w.sample((second, "model"), positive, negative, latent, 3, "Three models")
    w.save(fused, general, "three models")
    w.view(second, fused)
    return w


def region() -> Workflow:
    w = Workflow(
        "Region mask",
        "# Region mask\n\nA mask tells where the expert may paint. `compete`: saliency still decides inside the region, and a"
        " grey mask weakens the expert softly. `force`: the expert owns the region exactly.\n\nAny mask will do: drawn,"
        " loaded, a segmentation, another saliency map. It is resized to the latent.\n\nAn empty region switches the expert"
        " off and costs nothing.",
    )
    general, expert = w.checkpoint("general"), w.checkpoint("expert-animals")
    positive = w.text("a cow left of an apple on grey", general, "Prompt, general")
    negative = w.text("", general, "Negative")
    animal = w.text("a cow left of an apple on grey", expert, "Prompt, expert")
    latent = w.latent()
    whole = w.node("SolidMask", 1, {"value": 0.0, "width": 64, "height": 64}, "The whole picture")
    left = w.node("SolidMask", 1, {"value": 1.0, "width": 32, "height": 64}, "The left half")
    wires = {"destination": (whole, "MASK"), "source": (left, "MASK")}
    mask = w.node("MaskComposite", 2, {"x": 0, "y": 0, "operation": "add"}, "Region", wires)
    free = w.blend((general, "MODEL"), expert, animal, negative, 2, mask, label="animals", region_mode="compete")
    forced = w.blend((general, "MODEL"), expert, animal, negative, 2, mask, label="animals", region_mode="force")
    sampler = w.paint(free, positive, negative, latent, 5, general, "compete")
    w.paint(forced, positive, negative, latent, 5, general, "force")
    w.view(free, sampler, 6)
    return w


def cross_domain() -> Workflow:
    w = Workflow(
        "Two styles",
        "# Two styles (cross-domain)\n\nOne prompt, two checkpoints that draw it differently. The window decides what each"
        " gives: with `end_percent` 0.4 the expert helps with the layout and the general model finishes the details alone"
        " (the paper's lion); with `start_percent` 0.15 the general model lays out and both paint after that (the paper's"
        " bee).\n\nOutside its window the expert costs nothing: the report counts the evaluations saved.",
    )
    general, expert = w.checkpoint("general"), w.checkpoint("expert-animals")
    prompt = "a dog above an egg on blue"
    positive, negative = w.text(prompt, general, "Prompt, general"), w.text("", general, "Negative")
    own = w.text(prompt, expert, "Prompt, expert")
    latent = w.latent()
    early = w.blend((general, "MODEL"), expert, own, negative, label="animals, early", end_percent=0.4)
    late = w.blend((general, "MODEL"), expert, own, negative, label="animals, late", start_percent=0.15)
    first = w.paint(early, positive, negative, latent, 11, general, "expert early")
    second = w.paint(late, positive, negative, latent, 11, general, "expert late")
    w.view(early, first, 6)
    w.view(late, second, 6)
    return w


def recontextualization() -> Workflow:
    w = Workflow(
        "One model, two prompts",
        "# One model, two prompts (recontextualization)\n\nThe base and the expert are the same checkpoint; only their prompts"
        " differ: one says the subject, the other the subject in its surroundings. Each position follows the prompt that"
        " matters more there.\n\nThe paper does this with a DreamBooth checkpoint: 'a photo of [] dog' and 'a photo of []"
        " dog on the beach'.\n\nBoth prompts run in one batch, so this costs a larger batch, not a second model.",
    )
    general = w.checkpoint("general")
    subject = w.text("a crab", general, "Prompt: the subject")
    scene = w.text("a crab on yellow fading to blue", general, "Prompt: with surroundings")
    negative = w.text("", general, "Negative")
    latent = w.latent()
    blend = w.blend((general, "MODEL"), general, scene, negative, label="surroundings")
    alone = w.sample((general, "MODEL"), scene, negative, latent, 9, "Surroundings alone")
    fused = w.sample((blend, "model"), subject, negative, latent, 9, "Both prompts")
    w.save(alone, general, "one prompt")
    w.save(fused, general, "two prompts")
    w.view(blend, fused, 6)
    return w


def faster_fusion() -> Workflow:
    w = Workflow(
        "Faster fusion",
        "# Faster fusion\n\nAn expert need not be asked at every step. With `refresh` 3 it runs in every third one, and its"
        " difference to the base is carried on in between: of 20 evaluations 7 are left. Same prompt, same seed: compare"
        " the two.\n\nMore ways to save, in the node's advanced inputs: `crop` asks the expert only around its region or"
        " where it painted last, `skip_below` lets it leave when it paints next to nothing. A window (`start_percent`,"
        " `end_percent`) saves what lies outside it.\n\nBENCHMARKS.md has a table of cost against fidelity.",
    )
    general, expert = w.checkpoint("general"), w.checkpoint("expert-animals")
    prompt = "a dog above an egg on blue"
    positive, negative = w.text(prompt, general, "Prompt, general"), w.text("", general, "Negative")
    own = w.text(prompt, expert, "Prompt, expert")
    latent = w.latent()
    for refresh, title in ((1, "every step"), (3, "every third step")):
        blend = w.blend((general, "MODEL"), expert, own, negative, label="animals", refresh=refresh)
        w.view(blend, w.paint(blend, positive, negative, latent, 11, general, title), 6)
    return w


WORKFLOWS = [plain_fusion(), three_models(), region(), cross_domain(), recontextualization(), faster_fusion()]
