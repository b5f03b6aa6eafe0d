"""What the pictures of the help pages show of faces, pairs and their score; see help_workflows.py."""

from __future__ import annotations

import json

from PIL import Image, ImageChops

from .help_graph import Graph, Node, Panel
from .help_workflows import MARK, ONE_STEP, checkpoint, paint, part

FACE_PAIRS = "chorus-demo faces"
FACES = "chorus-demo-faces.safetensors"
PAIR = ["One step", "Refined", "Twenty steps by the checkpoint that it was distilled from"]


def fast_and_slow(g: Graph, prompt: str, seed=3, batch: int = 4) -> tuple[Node, Node]:
    """Pictures of a one-step checkpoint, and of its teacher by the same prompt and noise."""
    fast, teacher = checkpoint(g, "general-1-step"), checkpoint(g)
    return paint(g, fast, fast, prompt, seed, batch, **ONE_STEP), paint(g, teacher, teacher, prompt, seed, batch)


def face_refiner(g: Graph):
    fast, slow = fast_and_slow(g, "a man left of a woman on blue")
    loaded, mask = g.add("LoadFaceRefiner", file=FACES), part(g, 0, 32)
    refined = g.add("FaceRefiner", image=fast, refiner=loaded, mask=mask, padding=0.0, feather=4, color_lock=False)
    [before, after, best] = (
        panel.shows for [panel] in g.shoot([[Panel("", n)] for n in (fast, refined["image"], slow)])
    )
    changed = [ImageChops.difference(a, b).point(lambda value: 6 * value) for a, b in zip(before, after)]
    columns = {PAIR[0]: before, "The left half refined": after, "What changed, 6 times": changed, "Twenty steps": best}
    return [[Panel(name if k == 1 else "", [shown[k]]) for name, shown in columns.items()] for k in (1, 2, 3)]


def load_face_refiner(g: Graph):
    fast, slow = fast_and_slow(g, "a ghost on purple")
    refined = g.add("FaceRefiner", image=fast, refiner=g.add("LoadFaceRefiner", file=FACES), color_lock=False)
    names = [PAIR[0], "Refined by the network that was loaded", PAIR[2]]
    return g.shoot([[Panel(name, shows)] for name, shows in zip(names, (fast, refined["image"], slow))])


def trained_refiner(g: Graph) -> Node:
    """Train Face Refiner as in its example workflow."""
    folder = g.add("LoadTrainingPairs", folder=FACE_PAIRS)
    wires = {"source": folder["source"], "target": folder["target"], "clip_vision": g.add("ChorusDemoVision")}
    settings = {"steps": 60, "batch_size": 8, "learning_rate": 0.001, "crop": 64, "average": 0.9}
    weights = {"metric_weight": 4.0, "grad_weight": 0.2, "l1_weight": 1.0}
    return g.add("TrainFaceRefiner", **wires, **settings, **weights)


def train_face_refiner(g: Graph):
    training = trained_refiner(g)
    fast, slow = fast_and_slow(g, "a ghost on purple")
    refined = g.add("FaceRefiner", image=fast, refiner=training, color_lock=False)
    names = [PAIR[0], "Refined by the network that was trained, for 60 steps", PAIR[2]]
    return g.shoot([[Panel(name, shows)] for name, shows in zip(names, (fast, refined["image"], slow))])


def save_face_refiner(g: Graph):
    training = trained_refiner(g)
    g.add("SaveFaceRefiner", refiner=training, filename_prefix=f"face_refiner/{MARK}")
    prompt = "a ghost on purple"
    refined = g.add("FaceRefiner", image=fast_and_slow(g, prompt)[0], refiner=training)
    rows = g.shoot([[Panel("Refined by the network that was trained", refined["image"])]])
    h = g.another()
    file = h.saved("LoadFaceRefiner", MARK)
    refined = h.add("FaceRefiner", image=fast_and_slow(h, prompt)[0], refiner=h.add("LoadFaceRefiner", file=file))
    return rows + h.shoot([[Panel(f"Refined by the network from {file}", refined["image"])]])


def prompt_combinations(g: Graph):
    general = checkpoint(g)
    template, variables = "a {who} on {colour}", "who = cat | koala\ncolour = red | blue"
    nodes = [
        g.add("PromptCombinations", template=template, variables=variables, index=index, first_seed=7)
        for index in range(4)
    ]
    pictures = [paint(g, general, general, n["prompt"], n["seed"], 1) for n in nodes]
    said = g.read(*(n[output] for n in nodes for output in ("prompt", "seed")))
    panels = [
        Panel(f"index {k}\n{prompt}\nseed {seed}", picture)
        for k, (picture, [prompt], [seed]) in enumerate(zip(pictures, said[::2], said[1::2]))
    ]
    words = Panel(f"template: {template}\nvariables: {variables.replace(chr(10), '; ')}")
    return [[words], *g.shoot([panels])]


def save_training_pairs(g: Graph):
    folder = f"training_pairs_{MARK}"
    for prompt in ("a ghost on purple", "a robot on green"):
        fast, slow = fast_and_slow(g, prompt, batch=2)
        g.add("SaveTrainingPairs", source=fast, target=slow, prompt=prompt, folder=folder)
    g.run()
    saved = g.base / "output" / folder
    lines = [json.loads(line) for line in (saved / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        [
            Panel(
                f"{side}/{line['number']:05}.png\n{line['prompt']}",
                [Image.open(saved / side / f"{line['number']:05}.png")],
            )
            for line in lines
        ]
        for side in ("source", "target")
    ]


def load_training_pairs(g: Graph):
    read = g.add("LoadTrainingPairs", folder=FACE_PAIRS, first=8, count=4)
    [prompts] = g.read(read["prompt"])
    rows = []
    for side in ("source", "target"):
        ((panel,),) = g.shoot([[Panel("", read[side])]])
        rows.append([Panel(f"{side}\n{prompt}", [one]) for prompt, one in zip(prompts, panel.shows)])
    return rows


def face_realism_score(g: Graph):
    pairs = g.add("LoadTrainingPairs", folder=FACE_PAIRS)
    refined = g.add("FaceRefiner", image=pairs["source"], refiner=g.add("LoadFaceRefiner", file=FACES))
    wires = {"refined": refined["image"], "target": pairs["target"], "source": pairs["source"]}
    scored = g.add("FaceRealismScore", **wires, clip_vision=g.add("ChorusDemoVision"))
    [[report]] = g.read(scored["report"])
    sets = {"source": pairs["source"], "refined": refined["image"], "target": pairs["target"]}
    rows = g.shoot([[Panel(f"{name}: 5 of 128", wire, 2, 5)] for name, wire in sets.items()])
    return [*rows, [Panel(f"report\n{report}")]]


PICTURES = {
    "FaceRefiner": face_refiner,
    "LoadFaceRefiner": load_face_refiner,
    "TrainFaceRefiner": train_face_refiner,
    "SaveFaceRefiner": save_face_refiner,
    "PromptCombinations": prompt_combinations,
    "SaveTrainingPairs": save_training_pairs,
    "LoadTrainingPairs": load_training_pairs,
    "FaceRealismScore": face_realism_score,
}
