"""A workflow as a wiring list; build_workflows.py turns it into the file that people open."""

from __future__ import annotations

COLUMN = 340
GREEN, BLUE = ("#232", "#353"), ("#223", "#335")
SAMPLER = {"steps": 20, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}


class Workflow:
    """Nodes in columns and the wires between them."""

    def __init__(self, title: str, note: str):
        self.title, self.nodes, self.links = title, [], []
        self.node("MarkdownNote", 0, widgets={"text": note}, title="Read me", width=300, height=330)

    def node(
        self, kind: str, column: int, widgets: dict | None = None, title: str = "", wires: dict | None = None, **look
    ):
        """Add a node; ``wires`` maps its inputs to (node, output name). Returns its handle.

        ``models``: files that it needs and that do not come with the pack, as the page knows them: name, url, directory.
        """
        handle = len(self.nodes)
        self.nodes.append(
            {"id": handle, "type": kind, "column": column, "widgets": widgets or {}, "title": title, **look}
        )
        for name, (source, output) in (wires or {}).items():
            self.links.append([source, output, handle, name])
        return handle

    @property
    def needs(self) -> list[str]:
        """Files without which it cannot run, from ComfyUI's folder."""
        models = [model for node in self.nodes for model in node.get("models", ())]
        return [f"models/{model['directory']}/{model['name']}" for model in models]

    def spec(self) -> dict:
        count = max(node["column"] for node in self.nodes) + 1
        return {
            "title": self.title,
            "nodes": self.nodes,
            "links": self.links,
            "columns": [column * COLUMN for column in range(count)],
            "needs": self.needs,
        }

    def checkpoint(self, name: str, column: int = 0) -> int:
        return self.node("ChorusDemoCheckpoint", column, {"name": name})

    def text(self, text: str, clip: int, title: str, column: int = 1) -> int:
        look = {"color": GREEN} if text else {}
        return self.node("CLIPTextEncode", column, {"text": text}, title, {"clip": (clip, "CLIP")}, height=110, **look)

    def latent(self, batch: int = 4, column: int = 1) -> int:
        return self.node("EmptyLatentImage", column, {"width": 64, "height": 64, "batch_size": batch})

    def blend(self, model, expert, positive, negative, column: int = 2, region=None, **widgets) -> int:
        """``model`` is (node, output); the others are nodes."""
        wires = {"model": model, "expert": (expert, "MODEL"), "positive": (positive, "CONDITIONING")}
        wires["negative"] = (negative, "CONDITIONING")
        if region is not None:
            wires["region"] = (region, "MASK")
        return self.node("SaliencyNoiseBlend", column, widgets, wires=wires, color=BLUE)

    def sample(self, model, positive, negative, latent, seed, title: str, column: int = 3, **settings) -> int:
        """``seed`` may be wired, as (node, output); ``settings``: where they are others than SAMPLER."""
        wires = {"model": model, "positive": (positive, "CONDITIONING"), "negative": (negative, "CONDITIONING")}
        wires["latent_image"] = (latent, "LATENT")
        if not isinstance(seed, int):
            wires["seed"], seed = seed, 0
        widgets = {"seed": seed, "control_after_generate": "fixed", **SAMPLER, **settings}
        return self.node("KSampler", column, widgets, title, wires)

    def save(self, sampler: int, vae: int, name: str, column: int = 4) -> int:
        """Decode, then ``grid``."""
        pictures = self.node("VAEDecode", column, wires={"samples": (sampler, "LATENT"), "vae": (vae, "VAE")})
        return self.grid((pictures, "IMAGE"), name, column)

    def grid(self, pictures, name: str, column: int, columns: int = 2, width: int = 64) -> int:
        """Lay a batch out in a grid, enlarge it with its pixels kept square, save; ``pictures`` is (node, output)."""
        widgets = {"columns": columns, "cell_width": width, "cell_height": 64, "padding": 2}
        grid = self.node("ImageGrid", column, widgets, wires={"images": pictures})
        large = self.node(
            "ImageScaleBy",
            column,
            {"upscale_method": "nearest-exact", "scale_by": 3.0},
            wires={"image": (grid, "IMAGE")},
        )
        return self.node(
            "SaveImage", column + 1, {"filename_prefix": name}, name, {"images": (large, "IMAGE")}, height=320
        )

    def paint(self, blend: int, positive, negative, latent, seed: int, vae: int, title: str) -> int:
        """Sample a blend and save the pictures under ``title``. Returns the sampler."""
        sampler = self.sample((blend, "model"), positive, negative, latent, seed, title.capitalize())
        self.save(sampler, vae, title)
        return sampler

    def view(self, blend: int, sampler: int, column: int = 5) -> int:
        wires = {"trace": (blend, "trace"), "samples": (sampler, "LATENT")}
        return self.node("SaliencyBlendView", column, wires=wires, width=640, height=330, color=BLUE)
