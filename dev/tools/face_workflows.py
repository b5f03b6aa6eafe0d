"""The example workflows of Face Refiner: use, pairs, training, score."""

from __future__ import annotations

from .workflow import BLUE, Workflow

HEAD = "chorus-demo-faces.safetensors"
FACE_PAIRS = "chorus-demo faces"
FAST = "general-1-step"  # the checkpoint whose faces are refined, a student of general
STUDENT = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
TEACHER = {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}
FEW, MANY = "one step", f"{TEACHER['steps']} steps"
COST = 2 * TEACHER["steps"] // STUDENT["steps"]  # guidance asks the model twice
DETECTOR = {
    "name": "mediapipe_face_fp32.safetensors",
    "url": "https://huggingface.co/Comfy-Org/mediapipe/resolve/main/detection/mediapipe_face_fp32.safetensors",
    "directory": "detection",
}


class FaceWorkflow(Workflow):
    def load_head(self, column: int) -> int:
        return self.node("LoadFaceRefiner", column, {"file": HEAD}, color=BLUE)

    def refine(self, image, head, column: int, mask=None, **widgets) -> int:
        """Face Refiner; ``image``, ``head`` and ``mask`` are (node, output)."""
        wires = {"image": image, "refiner": head} | ({"mask": mask} if mask else {})
        return self.node("FaceRefiner", column, widgets, wires=wires, width=310, color=BLUE)

    def report(self, node: int, column: int, height: int = 220) -> int:
        return self.node("PreviewAny", column, {}, "Report", {"source": (node, "report")}, height=height)


class TwoModels(FaceWorkflow):
    """With the few-step checkpoint and the one it was distilled from, which paint the same prompts from the same noise."""

    def __init__(self, title: str, note: str):
        super().__init__(title, note)
        self.student, self.teacher = self.checkpoint(FAST), self.checkpoint("general")

    def prompts(self, positive: str, pictures: int, column: int = 1) -> None:
        """``positive`` is empty where it comes by wire."""
        self.positive = self.text(positive, self.teacher, "Prompt", column)
        self.negative = self.text("", self.teacher, "Negative", column)
        self.empty = self.latent(pictures, column)

    def sheets(self, painted: int, refined: int, name: str, teacher: int, column: int) -> None:
        """The student's pictures, those of Face Refiner as ``name``, the teacher's."""
        self.grid((painted, "IMAGE"), FEW, column)
        self.grid((refined, "image"), name, column)
        self.grid((teacher, "IMAGE"), MANY, column)

    def paint(self, model: int, seed, column: int) -> int:
        """Pictures of ``self.student`` or ``self.teacher``, each sampled as it is meant to be; ``seed`` as in ``sample``."""
        settings, name = (STUDENT, FEW) if model == self.student else (TEACHER, f"{MANY} with guidance")
        wires = (model, "MODEL"), self.positive, self.negative, self.empty
        sampler = self.sample(*wires, seed, name, column, **settings)
        return self.node("VAEDecode", column, wires={"samples": (sampler, "LATENT"), "vae": (model, "VAE")})


def boxes() -> Workflow:
    w = FaceWorkflow(
        "Refine faces",
        "# Refine faces\n\nComfyUI's own MediaPipe nodes find the faces of a photograph or of your picture; *Face Refiner* passes each"
        " through a light network and puts back what it changed. All other pixels stay as they are, bit for bit.\n\n**Needs**"
        f" `{DETECTOR['name']}` in `models/detection` (huggingface.co/Comfy-Org/mediapipe) and a head for photographs in"
        " `models/face_refiner`: one that you trained, or a generator of CycleGAN, pix2pix or CUT. The head that comes with the"
        " pack knows emoji only; it holds the place.\n\n`num_faces` 0 takes all faces, `detector_variant` *full* finds"
        " small ones. The report has a line for each face. Too much? Lower `strength`, or set `identity_guard` to 0.1.",
    )
    picture = w.node("LoadImage", 0, {"image": "example.png"})
    detector = w.node("LoadMediaPipeFaceLandmarker", 1, {"model_name": DETECTOR["name"]}, models=[DETECTOR])
    wires = {"face_detection_model": (detector, "FACE_DETECTION_MODEL"), "image": (picture, "IMAGE")}
    found = w.node("MediaPipeFaceLandmarker", 1, {"num_faces": 0}, wires=wires)
    head = w.load_head(1)
    refined = w.refine((picture, "IMAGE"), (head, "refiner"), 2)
    w.links.append([found, "bboxes", refined, "bboxes"])
    w.report(refined, 2)
    w.node("PreviewImage", 3, {}, "The faces, refined", {"images": (refined, "crops")}, height=260)
    w.node("SaveImage", 3, {"filename_prefix": "refined"}, "Refined", {"images": (refined, "image")}, height=330)
    return w


def mask() -> Workflow:
    w = TwoModels(
        "Refine faces by mask",
        f"# Refine faces by mask\n\n`{FAST}` was distilled from the general checkpoint. The mask chooses the left face of each picture,"
        " and *Face Refiner* brings it nearer to what the teacher paints."
        f"\n\nSheets: {FEW}; the left faces refined; the teacher, {MANY} from the same noise with guidance, {COST} times the work."
        " Look at the right faces of the second sheet: they are those of the first, bit for bit.\n\nThen move the mask (`x` of *MaskComposite*:"
        " 32), try `strength` 0.5 and `color_lock`, or leave the mask unwired: the whole picture is refined.\n\n**Your"
        " checkpoints**: wire your picture and a head trained for it (*Train a face refiner*); set `size`, if need be, to what faces"
        " measured there, and `padding` to how much there was around them.",
    )
    w.prompts("a man left of a woman on blue", 6)
    painted = w.paint(w.student, 3, 2)
    none = w.node("SolidMask", 1, {"value": 0.0, "width": 64, "height": 64}, "No face")
    half = w.node("SolidMask", 1, {"value": 1.0, "width": 32, "height": 64}, "A half")
    wires = {"destination": (none, "MASK"), "source": (half, "MASK")}
    left = w.node("MaskComposite", 2, {"x": 0, "y": 0, "operation": "add"}, "The left half", wires)
    head = w.load_head(2)
    refined = w.refine((painted, "IMAGE"), (head, "refiner"), 3, (left, "MASK"), padding=0.0, feather=4)
    w.report(refined, 3)
    teacher = w.paint(w.teacher, 3, 2)
    w.sheets(painted, refined, "left faces refined", teacher, 4)
    return w


def pairs() -> Workflow:
    w = TwoModels(
        "Build training pairs",
        "# Build training pairs\n\nA face refiner learns from pairs: what the fast model paints, and what its teacher paints of the same"
        " prompt and noise. No photographs, nothing to annotate.\n\nEvery run takes the next prompt of *Prompt Combinations*"
        " (`index` goes up by itself) and adds four pairs to `output/training_pairs`. Enter 60 beside *Run* for 240 pairs; 250"
        " runs have every prompt once. Stop when you like: the next run goes on, nothing is overwritten. (`index` counts what"
        " was queued; set it back by the runs that you cancelled, or leave them out.)\n\n*Train a face refiner* reads them: choose"
        " `training_pairs [output]` there. Some hundred pairs show whether it learns, thousands are better.\n\n**Your"
        " checkpoints**: load both, set each sampler to what its model wants (the seed comes by wire), the size in *Empty Latent"
        " Image*, and write a template for faces that fill the picture. Set `first_seed` anew for another data set.",
    )
    template = "a {tone} {who} on {colour}\n{face} on {colour}"
    variables = (
        "tone = light | medium | dark\nwho = baby | girl | man | woman | grandpa | santa\n"
        "face = a clown | a robot | a ghost | an alien | a skull | a smiley | a devil\n"
        "colour = black | grey | red | orange | yellow | green | blue | purple | pink | brown"
    )
    widgets = {"template": template, "variables": variables}
    prompts = w.node("PromptCombinations", 1, widgets, width=320, height=420, color=BLUE)
    w.prompts("", 4, column=2)
    w.links.append([prompts, "prompt", w.positive, "text"])
    seed = (prompts, "seed")
    source, target = w.paint(w.student, seed, 3), w.paint(w.teacher, seed, 3)
    wires = {"source": (source, "IMAGE"), "target": (target, "IMAGE"), "prompt": (prompts, "prompt")}
    w.node("SaveTrainingPairs", 4, {}, wires=wires, height=300, color=BLUE)
    w.grid((source, "IMAGE"), "source", 4)
    w.grid((target, "IMAGE"), "target", 4)
    return w


def train() -> Workflow:
    w = TwoModels(
        "Train a face refiner",
        f"# Train a face refiner\n\nIt learns from *{FACE_PAIRS}*, 128 pairs that come with the pack, what separates `{FAST}` from its"
        f" teacher, and is used at once on pictures that it has not seen.\n\nSheets: {FEW}; refined; the teacher's. This is a taste of"
        " half a minute: look at eyes and outlines, and expect no new faces. The report says whether it learned, and how near"
        " held-out pictures came to the teacher's. The head that comes with the pack took far longer and more pairs.\n\n**Your"
        " pairs**: build them (*Build training pairs*), press R, choose the folder; set `crop` (advanced) to 256 or the side of your faces, `steps` to"
        " 2000 and more, `batch_size` to 4 or what fits, `learning_rate` to 0.0002. Wire a CLIP Vision of yours or set `metric` to"
        " *lpips vgg*. *Cancel* keeps what was learned.",
    )
    vision = w.node("ChorusDemoVision", 0, {}, color=BLUE)
    folder = w.node("LoadTrainingPairs", 1, {"folder": FACE_PAIRS}, color=BLUE)
    wires = {"source": (folder, "source"), "target": (folder, "target"), "clip_vision": (vision, "CLIP_VISION")}
    widgets = {"steps": 60, "batch_size": 8, "learning_rate": 0.001, "crop": 64, "preview_every": 20, "average": 0.9}
    # as the head that comes with the pack: the fast pictures are blurred, and GRAD at its full weight would keep them so
    widgets |= {"metric_weight": 4.0, "grad_weight": 0.2, "l1_weight": 1.0}
    training = w.node("TrainFaceRefiner", 2, widgets, wires=wires, width=310, color=BLUE)
    w.prompts("a ghost on purple", 6)
    painted, teacher = w.paint(w.student, 5, 3), w.paint(w.teacher, 5, 3)
    refined = w.refine((painted, "IMAGE"), (training, "refiner"), 4)
    w.node("SaveFaceRefiner", 3, {}, wires={"refiner": (training, "refiner")}, color=BLUE)
    w.report(training, 3, height=260)
    w.node("LossGraphNode", 4, {}, wires={"loss": (training, "loss_map")}, height=300)
    w.sheets(painted, refined, "refined", teacher, 5)
    return w


def score() -> Workflow:
    w = FaceWorkflow(
        "Score a face refiner",
        "# Score a face refiner\n\nIs a head worth its time? `FaceRealismScore` compares sets: how far the fast pictures are from the"
        " teacher's, how far the refined ones are, and how much of the distance is closed (*FIDdiff*; above 0 is better), with"
        " its interval. The head has not seen these pairs.\n\nSheets: 16 of the pairs, as source, refined, target.\n\nTry `strength` 0.5,"
        " or the head you trained.\n\n**Your head**: choose it in *Load Face Refiner* and pairs that it did not learn from in both *Load Training"
        " Pairs* (`first` leaves out those of the training). Numbers compare only for the same encoder and the same number of"
        " pictures; take hundreds, and more than the encoder has features.",
    )
    vision = w.node("ChorusDemoVision", 0, {}, color=BLUE)
    head = w.load_head(0)
    every = w.node("LoadTrainingPairs", 1, {"folder": FACE_PAIRS}, "All pairs", color=BLUE)
    some = w.node("LoadTrainingPairs", 1, {"folder": FACE_PAIRS, "count": 16}, "16 to look at", color=BLUE)
    refined = w.refine((every, "source"), (head, "refiner"), 2)
    wires = {"refined": (refined, "image"), "target": (every, "target"), "source": (every, "source")}
    wires["clip_vision"] = (vision, "CLIP_VISION")
    scored = w.node("FaceRealismScore", 3, {}, wires=wires, color=BLUE)
    w.report(scored, 3, height=300)
    shown = w.refine((some, "source"), (head, "refiner"), 2)
    for pictures, name in (((some, "source"), "source"), ((shown, "image"), "refined"), ((some, "target"), "target")):
        w.grid(pictures, name, 4, columns=4)
    return w


WORKFLOWS = [boxes(), mask(), pairs(), train(), score()]
