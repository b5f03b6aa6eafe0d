"""All file loaders of the pack, with damaged files for each and checks of the loaded result.

``cases()`` of a Loader generates files, and ``write`` writes the files of one case into ``home``. ``load()`` loads them
as a user does and fails if the result is unusable.
"""

import io
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image

from chorus.demo import modules
from chorus.demo import weights as demo_weights
from chorus.techniques.cas_dm.network import CasDMHeadConfig, HeadFacts, new_head, to_file
from chorus.techniques.face_refiner import comfy_pairs
from chorus.techniques.face_refiner.networks.image_generators import NETWORKS
from chorus.techniques.face_refiner.networks.residual import RefinerConfig
from chorus.techniques.face_refiner.networks.resnet import ResnetConfig
from chorus.techniques.face_refiner.networks.unet import UnetConfig
from chorus.techniques.masked_tokens.tokens import Tokens
from chorus.techniques.seed_select import comfy_files

from .loader import Loader, at, check_finite, generator, node
from .masked_token_loaders import VQ, Lora, TextEncoder, Transformer
from .mutations import damaged, mixed, other_json
from .pickled import dangerous, pth_files


class CasDM(Loader):
    names = ("case.safetensors",)

    def __init__(self, home):
        super().__init__(home)
        config = CasDMHeadConfig(channels=4, widths=(8, 8), embedding=8)
        facts = HeadFacts(
            latent_format="SD15", prediction="eps", cfg=3.0, steps=7, gate=((0.5, 0.25),), details={"host": "1"}
        )
        self.sample = to_file(new_head(config, facts, generator()))

    def cases(self):
        return at("models/cas_dm/case.safetensors", self.content(*self.sample))

    def load(self):
        [head] = node("LoadCasDMHead", file="case.safetensors")
        check_finite(head.weights.values())
        check_finite([head.facts.cfg, *(number for pair in head.facts.gate for number in pair)])
        assert head.facts.steps >= 0
        x = torch.zeros(1, head.config.channels, 4, 4)
        output, _ = head.network()(x, torch.zeros(1), x)
        assert output.shape == x.shape


class Refiner(Loader):
    """Face refiners in safetensors files, one of every supported layout."""

    suffix = ".safetensors"
    configs = (
        ResnetConfig(ngf=4, blocks=1),
        ResnetConfig(ngf=4, blocks=1, norm="batch", dropout=True, blur_down=True, blur_up=True),
        UnetConfig(ngf=2, downs=5),
        RefinerConfig(widths=(8, 8), blocks=(1, 1), reduction=4),
    )

    def __init__(self, home):
        super().__init__(home)
        self.names = (f"case{self.suffix}",)
        self.samples = []
        for config in self.configs:
            weights = NETWORKS[type(config)](config).state_dict()
            self.samples.append(
                {k: torch.randn(w.shape, generator=generator()).abs() * 0.1 for k, w in weights.items()}
            )

    def cases(self):
        contents = [self.files(sample) for sample in self.samples]
        return at(f"models/face_refiner/{self.names[0]}", mixed(*((1, content) for content in contents)))

    def files(self, sample) -> SearchStrategy[bytes]:
        return self.content(sample, {"format": "chorus-face-refiner-1", "size": "32", "network": "x"})

    def load(self):
        [refiner] = node("LoadFaceRefiner", file=self.names[0])
        network = refiner.patcher.model
        check_finite(network.state_dict().values())
        assert 1 <= refiner.size <= 16384 and refiner.multiple <= refiner.min_side <= 4096
        if refiner.min_side <= 64:
            with torch.inference_mode():
                x = torch.zeros(1, 3, refiner.min_side, refiner.min_side)
                assert network.refine(x).shape == x.shape


class RefinerPth(Refiner):
    """.pth files, which may hold pickled code."""

    suffix = ".pth"

    def files(self, sample):
        return pth_files(sample, self.marker)


class Seed(Loader):
    names = ("case.seed.safetensors",)

    def __init__(self, home):
        super().__init__(home)
        noise = torch.randn(1, 4, 6, 5, generator=generator())
        self.sample = {"noise": noise}, {"format": comfy_files.FORMAT, "seed": "5", "score": "0.1", "settings": "{}"}

    def cases(self):
        return at("input/case.seed.safetensors", self.content(*self.sample))

    def load(self):
        [noise] = node("LoadSeed", file="case.seed.safetensors")
        assert 0 <= noise.seed < 2**64
        latent = noise.generate_noise({"samples": torch.zeros(noise.noise.shape)})
        check_finite([latent])


class TokenFile(Loader):
    names = ("case.tokens.safetensors",)

    def __init__(self, home):
        super().__init__(home)
        ids = torch.randint(37, (1, 4, 4), generator=generator())
        self.sample = {"ids": ids}, {"codebook": "37", "mask_id": "39", "downscale": "4", "prompt": "{}"}

    def cases(self):
        return at("input/case.tokens.safetensors", self.content(*self.sample))

    def load(self):
        [tokens] = node("LoadMaskedTokens", file="case.tokens.safetensors")
        assert isinstance(tokens, Tokens) and tokens.unknown.dtype == torch.bool
        tokens.check("the tokens", tokens.codebook, tokens.mask_id, tokens.downscale)
        assert all(0 < side < 2**40 for side in tokens.size)


class Pairs(Loader):
    """A folder of training pairs: its list of prompts and its images."""

    names = ("pairs",)

    def __init__(self, home):
        super().__init__(home)
        self.lines = [json.dumps({"number": n, "prompt": f"p{n}"}) for n in (1, 2)]
        self.list = f"input/pairs/{comfy_pairs.LIST}"
        self.images = {f"input/pairs/{side}/{n:05}.png": png(6 + n, 5, n) for side in comfy_pairs.SIDES for n in (1, 2)}

    def cases(self):
        whole = "".join(f"{line}\n" for line in self.lines).encode()
        lists = mixed(
            (1, damaged(whole)),
            (
                3,
                st.tuples(*map(other_json, self.lines), st.sampled_from(["", "", *self.lines]))
                .map("\n".join)
                .map(str.encode),
            ),
        )
        images = [mixed((1, damaged(data)), (1, other_images(self.marker))) for data in self.images.values()]
        changed = [at(path, content) for path, content in zip(self.images, images)]
        files = mixed((len(changed), at(self.list, lists)), *((1, one) for one in changed))
        return files.map(lambda changed: {self.list: whole, **self.images, **changed})

    def load(self):
        source, target, prompts = node("LoadTrainingPairs", folder="pairs", first=0, count=0)
        assert len(source) == len(target) == len(prompts) >= 1
        for a, b in zip(source, target):
            assert a.shape == b.shape and a.shape[-1] == 3
            check_finite([a, b])
        assert all(isinstance(prompt, str) for prompt in prompts)


def png(height: int, width: int, seed: int, mode: str = "RGB", kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    pixels = random.Random(seed).randbytes(height * width * 3)
    Image.frombytes("RGB", (width, height), pixels).convert(mode).save(data, kind)
    return data.getvalue()


def other_images(marker) -> SearchStrategy[bytes]:
    """An image of another size, format or depth, or a PNG with a wrong IHDR chunk and a valid checksum."""
    formats = [("GIF", "P"), ("BMP", "RGB"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "1"), ("TIFF", "I")]
    others = st.sampled_from(formats).map(lambda kind: png(7, 5, 3, kind[1], kind[0]))
    return mixed((1, dangerous({}, marker)), (4, others), (5, wrong_png_headers(png(7, 5, 3))))


@st.composite
def wrong_png_headers(draw, data: bytes) -> bytes:
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    sides = st.sampled_from([0, 1, 2, 100, 9000, 13000, 30000, 60000, 2**31 - 1, 2**32 - 1]) | st.integers(0, 2**32 - 1)
    side = draw(sides)
    width, height = draw(st.sampled_from([(side, height), (width, side), (side, side)]))
    depth, colour = draw(st.sampled_from([*[(depth, colour)] * 3, (16, 2), (1, 0), (8, 3), (8, 6), (7, 9)]))
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


class Demo(Loader):
    """The weights that come with the pack, damaged as if their download had failed."""

    # functions with which the nodes load weights, for the files that load quickly
    loads: dict[str, Callable] = {
        "autoencoder": modules.load_autoencoder,
        "text": modules.load_text,
        "vision": modules.load_vision,
    }

    def __init__(self, home):
        super().__init__(home)
        self.source, self.folder = demo_weights.FOLDER, home / "demo"
        self.folder.mkdir(exist_ok=True)
        self.tensors = {name: safetensors.torch.load_file(self.source / f"{name}.safetensors") for name in self.loads}
        demo_weights.FOLDER = self.folder
        self.last = None

    def cases(self):
        contents = {name: self.content(tensors, {"a": "b"}) for name, tensors in self.tensors.items()}
        return mixed(*((1, at(f"demo/{name}.safetensors", content)) for name, content in contents.items()))

    def write(self, files):
        for name in self.loads if self.last is None else [self.last]:
            shutil.copy(self.source / f"{name}.safetensors", self.folder)
        super().write(files)
        [path] = files
        self.names = (Path(path).name,)
        self.last = Path(path).stem

    def load(self):
        loaded = self.loads[self.last]()
        network = getattr(loaded, "cond_stage_model", getattr(loaded, "model", loaded))
        check_finite(network.state_dict().values())


LOADERS: dict[str, type[Loader]] = {
    "Cas-DM heads": CasDM,
    "face refiners": Refiner,
    "face refiners as .pth": RefinerPth,
    "masked token transformers": Transformer,
    "masked token VQ-GANs": VQ,
    "masked token text encoders": TextEncoder,
    "masked token LoRAs": Lora,
    "seeds": Seed,
    "tokens": TokenFile,
    "training pairs": Pairs,
    "demo weights": Demo,
}
