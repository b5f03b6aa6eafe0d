"""Fuzzed loaders of the parts of masked token models, and of their LoRAs."""

import json

import torch
from hypothesis.strategies import SearchStrategy

from chorus.techniques.masked_tokens import lora as loras
from chorus.techniques.masked_tokens.comfy_files import read_clip, read_networks
from chorus.tests.support import masked_token_folder, tiny_masked_tokens

from .loader import Loader, at, check_finite, node
from .mutations import damaged, mixed, other_json, save
from .pickled import dangerous


class Transformer(Loader):
    """A masked token model folder with a damaged transformer or transformer config."""

    names = ("transformer", "vqvae")
    part = "transformer"

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

    def cases(self):
        return cases_of_part(self, masked_token_folder.WEIGHTS[self.part])

    def load(self):
        model = read_networks(self.folder, "clip-l")
        uvit, vq = model.transformer.model, model.vq.model
        check_finite([*uvit.state_dict().values(), *vq.state_dict().values()])
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
    """A masked token model folder with a damaged VQ-GAN or VQ-GAN config."""

    part = "vqvae"


class TextEncoder(Loader):
    """A masked token model folder with a damaged text encoder."""

    names = ("text_encoder",)
    part = "text_encoder"

    def __init__(self, home):
        super().__init__(home)
        self.folder = home / "models/masked_token" / "tiny-text"
        config = masked_token_folder.TEXT | {"num_hidden_layers": 3}
        self.weights = {k: w.half() for k, w in masked_token_folder.text_encoder(config).state_dict().items()}
        self.config = json.dumps(config)
        masked_token_folder.write_part(self.folder, self.part, self.weights, config)

    def cases(self):
        return cases_of_part(self, masked_token_folder.WEIGHTS[self.part], configs=3)

    def load(self):
        clip, width = read_clip(self.folder, self.folder / self.part / "model.safetensors")
        states, pooled = clip.encode_from_tokens(clip.tokenize("a"), return_pooled=True)
        assert states.shape[-1] == pooled.shape[-1] == width
        check_finite(clip.cond_stage_model.state_dict().values())


def cases_of_part(loader, file: str, configs: int = 1) -> SearchStrategy[dict[str, bytes]]:
    """Cases with a changed config or changed weights. Changed configs are ``configs`` times as frequent."""
    folder = (loader.folder / loader.part).relative_to(loader.home)
    config, weights = f"{folder}/config.json", f"{folder}/{file}"
    whole = {config: loader.config.encode(), weights: save({k: w.contiguous() for k, w in loader.weights.items()}, {})}
    others = mixed(
        (41, other_json(loader.config).map(str.encode)),
        (8, damaged(whole[config])),
        (1, dangerous({}, loader.marker)),
    )
    changed = mixed((configs, at(config, others)), (1, at(weights, loader.content(loader.weights, {}))))
    return changed.map(lambda files: {**whole, **files})


class Lora(Loader):
    """LoRA files with PEFT's settings beside them, of which one is damaged."""

    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "use_rslora": False, "alpha_pattern": {"to_q": 4}}

    # the error about a LoRA of another model does not name the file
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
            self.lora = loras.Lora(weights, {"steps": "5", "base": "x"})
            self.samples.append(loras.to_file(self.lora))

    def cases(self):
        weights, settings = "models/loras/case.safetensors", "models/loras/adapter_config.json"
        config = json.dumps(self.config)
        plain = {key: value for key, value in loras.to_file(self.lora)[0].items() if not key.endswith("alpha")}
        whole = {settings: config.encode(), weights: save(plain, {})}
        changed = mixed(
            (5, at(weights, mixed(*((1, self.content(*sample)) for sample in self.samples)))),
            (1, at(settings, mixed((3, other_json(config).map(str.encode)), (1, damaged(config.encode()))))),
        )
        return changed.map(lambda files: {**whole, **files})

    def load(self):
        inputs = dict(model=self.model, lora_name="case.safetensors", strength=1.0, alpha=0.0)
        _, lora = node("LoadMaskedTokenLora", **inputs)
        loras.check_fits(lora, self.shapes)
        for pair in lora.weights.values():
            check_finite([pair.up, pair.down, pair.scale])
        assert lora.steps >= 0
