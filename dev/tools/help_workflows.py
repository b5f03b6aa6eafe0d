"""What the pictures of the help pages show: for each node a small workflow, and how its pictures are laid out.

Each function gets an empty Graph and gives rows of Panels with their pictures.
"""

from __future__ import annotations

from .help_graph import Graph, Node, Panel

SHARP = {"sampler_name": "dpmpp_2m", "scheduler": "karras"}
PLAIN = {"sampler_name": "euler", "scheduler": "normal"}
ONE_STEP = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
RARE, FIRST = "carrot", 1008
MARK = "help"  # in the name of every file that is saved


def paint(g: Graph, model: Node, checkpoint: Node, prompt, seed=7, batch: int = 4, **settings) -> Node:
    """Pictures of ``model`` by a prompt, of 64 x 64 pixels; ``checkpoint`` has the text encoder and the VAE."""
    positive, negative = (g.add("CLIPTextEncode", clip=checkpoint, text=text) for text in (prompt, ""))
    empty = g.add("EmptyLatentImage", width=64, height=64, batch_size=batch)
    given = {"steps": 20, "cfg": 4.0, **PLAIN, **settings}
    latent = g.add(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=empty, seed=seed, **given
    )
    return g.add("VAEDecode", samples=latent, vae=checkpoint)


def checkpoint(g: Graph, name: str = "general") -> Node:
    return g.add("ChorusDemoCheckpoint", name=name)


def part(g: Graph, x: int, width: int) -> Node:
    """A mask of 64 x 64 pixels: a part of its width."""
    nothing, some = (g.add("SolidMask", value=v, width=w, height=64) for v, w in ((0.0, 64), (1.0, width)))
    return g.add("MaskComposite", destination=nothing, source=some, x=x, y=0, operation="add")


# fusion


def blended(g: Graph, prompt: str, **widgets) -> tuple[Node, Node, Node]:
    """The general checkpoint, the expert for animals, and the first with the second blended in."""
    general, expert = checkpoint(g), checkpoint(g, "expert-animals")
    own, none = (g.add("CLIPTextEncode", clip=expert, text=text) for text in (prompt, ""))
    wires = {"model": general, "expert": expert, "positive": own, "negative": none}
    return general, expert, g.add("SaliencyNoiseBlend", **wires, label="animals", **widgets)


def saliency_noise_blend(g: Graph):
    prompt = "a koala below a rainbow on green"
    general, expert, blend = blended(g, prompt)
    ways = {
        "The general model alone": general,
        "Both, blended at every step": blend,
        "The expert for animals alone": expert,
    }
    return g.shoot([[Panel(name, paint(g, model, general, prompt, **SHARP))] for name, model in ways.items()])


def saliency_blend_view(g: Graph):
    prompt = "a koala below a rainbow on green"
    general, _, blend = blended(g, prompt)
    picture = paint(g, blend, general, prompt, batch=1, **SHARP)
    samples = g.prompt[picture.id]["inputs"]["samples"]
    view = g.add("SaliencyBlendView", trace=blend, samples=samples)
    pictures = [Panel("The blended picture", picture), Panel("output mask: the expert's share", mask_of(g, view), 12)]
    return g.shoot([pictures, [Panel("output image: who painted where, step by step", view, 0.8)]])


def mask_of(g: Graph, node: Node) -> Node:
    return g.add("MaskToImage", mask=node)


# seeds


def select(g: Graph, mode: str, sign: str = RARE, seed: int = FIRST, **widgets) -> tuple[Node, Node, Node]:
    """The checkpoint, the references, Seed Select."""
    general = checkpoint(g)
    positive, negative = (g.add("CLIPTextEncode", clip=general, text=text) for text in (f"a {sign}", ""))
    references = g.add("ChorusDemoReferences", sign=sign)
    wires = {"model": general, "positive": positive, "negative": negative, "vae": general, "references": references}
    wires["latent_image"] = g.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    wires["clip_vision"] = g.add("ChorusDemoVision")
    return general, references, g.add("SeedSelect", **wires, mode=mode, seed=seed, cfg=4.0, **PLAIN, **widgets)


def from_noise(g: Graph, noise: Node, general: Node, prompt: str) -> Node:
    """A picture by SamplerCustomAdvanced, which takes a noise in place of a seed."""
    positive, negative = (g.add("CLIPTextEncode", clip=general, text=text) for text in (prompt, ""))
    sampled = g.add(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=g.add("CFGGuider", model=general, positive=positive, negative=negative, cfg=4.0),
        sampler=g.add("KSamplerSelect", sampler_name="euler"),
        sigmas=g.add("BasicScheduler", model=general, scheduler="normal", steps=20, denoise=1.0),
        latent_image=g.add("EmptyLatentImage", width=64, height=64, batch_size=1),
    )
    return g.add("VAEDecode", samples=sampled["output"], vae=general)


def seed_select(g: Graph):
    general, references, searched = select(g, "search", candidates=64)
    *_, both = select(g, "search+optimize", iterations=8, optimize_steps=10)
    first = paint(g, general, general, f"a {RARE}", FIRST, 1)
    found = (g.add("VAEDecode", samples=node, vae=general) for node in (searched, both))
    return g.shoot(
        [
            [Panel("references", references)],
            [Panel(f"Seed {FIRST} as it comes", first), *map(Panel, ("mode search", "mode search+optimize"), found)],
        ]
    )


def save_seed(g: Graph):
    general, _, found = select(g, "search+optimize", iterations=8, optimize_steps=10)
    g.add("SaveSeed", noise=found, filename_prefix=f"seeds/{MARK}")
    start = paint(g, general, general, f"a {RARE}", found["seed"], 1)
    made = g.add("VAEDecode", samples=found, vae=general)
    rows = g.shoot([[Panel("Its integer seed alone", start), Panel("What Seed Select made of it", made)]])
    h = g.another()
    noise = h.add("LoadSeed", file=h.saved("LoadSeed", MARK))
    again = h.shoot([[Panel("The saved file, loaded again", from_noise(h, noise, checkpoint(h), f"a {RARE}"))]])
    return [rows[0] + again[0]]


def load_seed(g: Graph):
    general = checkpoint(g)
    sources = {
        "The noise that was loaded": g.add("LoadSeed", file=f"chorus-demo {RARE}"),
        "A random noise": g.add("RandomNoise", noise_seed=FIRST),
    }
    prompts = [f"a {RARE}", f"a {RARE} on blue", f"a {RARE} on yellow"]
    return g.shoot(
        [
            [Panel(f"{name}\n{prompt}", from_noise(g, noise, general, prompt)) for prompt in prompts]
            for name, noise in sources.items()
        ]
    )


# heads of Cas-DM

HEAD = "chorus-demo-general.safetensors"


def cas_dm_head(g: Graph):
    general, prompt = checkpoint(g), "a rocket on grey"
    loaded = g.add("LoadCasDMHead", file=HEAD)
    half, whole = (g.add("CasDMHead", model=general, head=loaded, strength=s) for s in (0.5, 1.0))
    ways = [("Five steps", general, 5), ("Five steps, strength 0.5", half, 5), ("Five steps, strength 1", whole, 5)]
    ways.append(("Twenty steps", general, 20))
    return g.shoot([[Panel(name, paint(g, model, general, prompt, steps=n))] for name, model, n in ways])


def load_cas_dm_head(g: Graph):
    general = checkpoint(g)
    headed = g.add("CasDMHead", model=general, head=g.add("LoadCasDMHead", file=HEAD))
    rows = []
    for name, model in (("Without a head", general), ("With the head", headed)):
        prompts = ("an apple on grey", "a rocket on grey", "a bell on grey", "a tree on grey")
        rows += [[Panel(f"{name}\n{prompt}", paint(g, model, general, prompt, 3, 1, steps=5)) for prompt in prompts]]
    return g.shoot(rows)


def trained_head(g: Graph) -> tuple[Node, Node]:
    """The checkpoint, Train Cas-DM Head: shorter than in its example workflow, and by squares alone."""
    general = checkpoint(g)
    signs = g.add("ChorusDemoReferences", sign="all signs")
    training = g.add(
        "TrainCasDMHead",
        model=general,
        samples=g.add("VAEEncode", pixels=signs, vae=general),
        positive=g.add("CLIPTextEncode", clip=general, text=signs["prompt"]),
        negative=g.add("CLIPTextEncode", clip=general, text=""),
        vae=general,
        cfg=4.0,
        metric="none",
        steps=60,
        batch_size=4,
        learning_rate=0.002,
        average=0.9,
        held_out=0.01,
    )
    return general, training


def train_cas_dm_head(g: Graph):
    general, training = trained_head(g)
    headed = g.add("CasDMHead", model=general, head=training)
    ways = {"Eight steps, without a head": general, "Eight steps, with the head that was trained": headed}
    return g.shoot([[Panel(name, paint(g, m, general, f"a {RARE}", steps=8))] for name, m in ways.items()])


def save_cas_dm_head(g: Graph):
    general, training = trained_head(g)
    g.add("SaveCasDMHead", head=training, filename_prefix=f"cas_dm/{MARK}")
    headed = g.add("CasDMHead", model=general, head=training)
    rows = g.shoot([[Panel("With the head that was trained", paint(g, headed, general, f"a {RARE}", steps=8))]])
    h = g.another()
    general, file = checkpoint(h), h.saved("LoadCasDMHead", MARK)
    headed = h.add("CasDMHead", model=general, head=h.add("LoadCasDMHead", file=file))
    return rows + h.shoot([[Panel(f"With the head from {file}", paint(h, headed, general, f"a {RARE}", steps=8))]])


# what comes with the pack


def demo_checkpoint(g: Graph):
    kinds = {
        "general": {},
        "expert-animals": {},
        "general-4-steps": {**ONE_STEP, "steps": 4},
        "general-1-step": ONE_STEP,
    }
    rows = []
    for name, settings in kinds.items():
        model = checkpoint(g, name)
        steps = settings.get("steps", 20)
        about = f"{name}: {steps} {'step' if steps == 1 else 'steps'}, cfg {settings.get('cfg', 4.0):g}"
        rows.append([Panel(about, paint(g, model, model, "a pig on blue", 5, **settings), 2)])
    return g.shoot(rows)


def demo_vision(g: Graph):
    widgets = {"candidates": 6, "first_steps": 20, "grid_size": 6, "appearance_weight": 0.0}
    _, references, ranked = select(g, "search", "tiger", 0, **widgets)
    said = "Six seeds of 'a tiger', ranked by how far the encoder finds them from the pictures above"
    return g.shoot([[Panel("What they are compared with", references, 2)], [Panel(said, ranked["grid"], 1)]])


def demo_references(g: Graph):
    signs = ("carrot", "tiger", "umbrella")
    return g.shoot([[Panel(sign, g.add("ChorusDemoReferences", sign=sign))] for sign in signs])


PICTURES = {
    "SaliencyNoiseBlend": saliency_noise_blend,
    "SaliencyBlendView": saliency_blend_view,
    "SeedSelect": seed_select,
    "SaveSeed": save_seed,
    "LoadSeed": load_seed,
    "CasDMHead": cas_dm_head,
    "LoadCasDMHead": load_cas_dm_head,
    "TrainCasDMHead": train_cas_dm_head,  # before the saver: what it learned is still known
    "SaveCasDMHead": save_cas_dm_head,
    "ChorusDemoCheckpoint": demo_checkpoint,
    "ChorusDemoVision": demo_vision,
    "ChorusDemoReferences": demo_references,
}
