"""The loaders of masked token models, part by part, and of their LoRAs."""

import json
import random

import safetensors.torch
import torch

from chorus.techniques.masked_tokens import lora as loras
from chorus.techniques.masked_tokens.comfy_files import read_clip, read_networks
from chorus.tests.support import masked_token_folder, tiny_masked_tokens

from .loader import Loader, finite, node
from .mutations import damaged_bytes, other_json
from .pickled import dangerous


class Transformer(Loader):
    """The folder of a masked token model; cases are its transformer and the config of that."""

    names = ("transformer", "vqvae")
    part, kept = "transformer", ("vqvae",)

    def __init__(self, home):
        super().__init__(home)
        self.folder = home / "models/masked_token" / f"tiny-{self.part}"
        own = masked_token_folder
        small = own.TRANSFORMER | {"num_res_blocks": 1, "num_hidden_layers": 1}
        all_weights = {"transformer": (own.transformer_weights, small), "vqvae": (own.vq_weights, own.VQ)}
        for part, (make, config) in all_weights.items():
            weights = make(config)
            own.write_part(self.folder, part, weights, config)
            if part == self.part:
                self.weights, self.config = weights, json.dumps(config)

    def write(self, rng):
        write_part(self, rng, masked_token_folder.WEIGHTS[self.part])

    def load(self):
        model = read_networks(self.folder, "clip-l")
        uvit, vq = model.transformer.model, model.vq.model
        finite([*uvit.state_dict().values(), *vq.state_dict().values()])
        c = uvit.config
        assert 0 < model.codebook <= model.mask_id and 1 <= c.sample_size <= 4096
        with torch.inference_mode():
            text, pooled = torch.zeros(1, 2, c.encoder_hidden_size), torch.zeros(1, c.cond_embed_dim)
            logits = uvit(
                torch.zeros(1, 2, 2, dtype=torch.int64),
                uvit.condition(text.to(model.dtype), pooled, torch.zeros(1, 5)),
            )
            assert logits.shape == (1, model.codebook, 2, 2)
            assert vq.decode(torch.zeros(1, 2, 2, dtype=torch.int64)).shape[0] == 1


class VQ(Transformer):
    """As Transformer; cases are its VQ-GAN and the config of that."""

    part, kept = "vqvae", ("transformer",)


class TextEncoder(Loader):
    """The text encoder of a masked token folder."""

    names = ("text_encoder",)
    part = "text_encoder"

    def __init__(self, home):
        super().__init__(home)
        self.folder = home / "models/masked_token" / "tiny-text"
        config = masked_token_folder.TEXT | {"num_hidden_layers": 3}
        self.weights = {k: w.half() for k, w in masked_token_folder.text_encoder(config).state_dict().items()}
        self.config = json.dumps(config)
        masked_token_folder.write_part(self.folder, self.part, self.weights, config)

    def write(self, rng):
        write_part(self, rng, masked_token_folder.WEIGHTS[self.part], 0.75)

    def load(self):
        clip, width = read_clip(self.folder, self.folder / self.part / "model.safetensors")
        states, pooled = clip.encode_from_tokens(clip.tokenize("a"), return_pooled=True)
        assert states.shape[-1] == pooled.shape[-1] == width
        finite(clip.cond_stage_model.state_dict().values())


def write_part(loader, rng: random.Random, file: str, share: float = 0.5) -> None:
    """Weights as they should be and another config, or the other way round; ``share``: of the former."""
    folder, config = loader.folder / loader.part, loader.config
    weights = folder / file
    if rng.random() < share:
        if getattr(loader, "untouched", None) != weights:
            safetensors.torch.save_file({k: w.contiguous() for k, w in loader.weights.items()}, weights)
            loader.untouched = weights
        data = damaged_bytes(rng, config.encode()) if rng.random() < 0.15 else other_json(rng, config).encode()
        if rng.random() < 0.02:
            data = dangerous(rng, {}, loader.marker)
        (folder / "config.json").write_bytes(data)
    else:
        loader.untouched = None
        (folder / "config.json").write_text(config)
        weights.write_bytes(loader.content(rng, loader.weights, {}))


class Lora(Loader):
    # the node's own check is about the model too, and names no file
    names = ("case.safetensors", "the LoRA does not fit this model")

    def __init__(self, home):
        super().__init__(home)
        self.model = tiny_masked_tokens.tiny_model().model
        self.shapes = {k: w.shape for k, w in self.model.transformer.model.state_dict().items()}
        modules_ = [k.removesuffix(".weight") for k in self.shapes if k.endswith(("to_q.weight", "to_v.weight"))]
        self.samples = []
        for alphas in ((8.0, 8.0), (8.0, 4.0)):
            weights = {}
            for name, alpha in zip(modules_, [*alphas, *alphas]):
                out, width = self.shapes[f"{name}.weight"]
                weights[name] = loras.LoraWeights(torch.randn(2, width), torch.randn(out, 2), alpha)
            self.samples.append(loras.to_file(loras.Lora(weights, {"steps": "5", "base": "x"})))

    def write(self, rng):
        (self.home / "models/loras/case.safetensors").write_bytes(self.content(rng, *rng.choice(self.samples)))

    def load(self):
        inputs = dict(model=self.model, lora_name="case.safetensors", strength=1.0, alpha=0.0)
        _, lora = node("LoadMaskedTokenLora", **inputs)
        loras.check_fits(lora, self.shapes)
        for pair in lora.weights.values():
            finite([pair.up, pair.down, pair.scale])
        assert lora.steps >= 0
