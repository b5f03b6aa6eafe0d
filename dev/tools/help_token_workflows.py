"""What the pictures of the help pages show of masked token models; see help_workflows.py."""

from __future__ import annotations

import colorsys

from PIL import Image

from .help_graph import Graph, Node, Panel
from .help_workflows import MARK, SHARP, checkpoint, paint, part

# masked tokens


def token_model(g: Graph) -> Node:
    return g.add("LoadMaskedTokenModel", model_folder="chorus-demo")


def tokens(
    g: Graph, model: Node, prompt: str, seed: int = 7, batch: int = 4, clip: Node | None = None, **given
) -> Node:
    """A sampler of 64 x 64 pixels; ``clip``: the loader, where the model comes from elsewhere."""
    positive, negative = (g.add("CLIPTextEncode", clip=clip or model, text=text) for text in (prompt, ""))
    common = {"seed": seed, "width": 64, "height": 64, "batch_size": batch, "feather": 2}
    return g.add("MaskedTokenSampler", model=model, positive=positive, negative=negative, **{**common, **given})


def load_masked_token_model(g: Graph):
    model = token_model(g)
    prompts = ("an apple on grey", "a dog on white", "a tree on yellow", "a sunflower on blue")
    return g.shoot([[Panel(prompt, tokens(g, model, prompt, batch=1)) for prompt in prompts]])


def masked_token_sampler(g: Graph):
    model, scene = token_model(g), "a cat left of an apple on blue"
    draft = tokens(g, model, scene, batch=1)
    image = draft["image"]
    half = tokens(
        g, model, "a cat left of a tree on blue", batch=2, image=image, mask=part(g, 32, 32), schedule="linear"
    )
    pad = g.add("ImagePadForOutpaint", image=image, left=0, top=0, right=32, bottom=0, feathering=0)
    beyond = {"image": pad, "mask": pad, "schedule": "linear", "feather": 0}
    wide = tokens(g, model, scene, batch=2, **beyond)
    return g.shoot(
        [
            [
                Panel(f"Text to image\n{scene}", draft),
                Panel("Its right half again\na cat left of a tree on blue", half),
            ],
            [Panel("What lies beyond its right edge", wide)],
        ]
    )


def ids_of(g: Graph, name: str) -> Image.Image:
    """The token ids of a saved file, a colour for each."""
    from safetensors import safe_open

    (file,) = (g.base / "output" / "tokens").glob(f"{name}_*.safetensors")
    with safe_open(file, "pt") as opened:
        ids = opened.get_tensor(next(iter(opened.keys())))[0]
    picture = Image.new("RGB", (ids.shape[1], ids.shape[0]))
    hues = [(id * 0.618) % 1.0 for id in ids.flatten().tolist()]  # near ids, distant colours
    picture.putdata([tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.55, 0.9)) for hue in hues])
    return picture


def shown_ids(g: Graph, name: str, caption: str) -> Panel:
    """As large as a picture at scale 4."""
    picture = ids_of(g, name)
    return Panel(caption, [picture], 4 * 64 / picture.width)


def masked_token_encode(g: Graph):
    picture, model = g.add("ChorusDemoReferences", sign="tiger"), token_model(g)
    read = g.add("MaskedTokenEncode", image=picture["IMAGE"], model=model)
    g.add("SaveMaskedTokens", tokens=read, filename_prefix="tokens/encode")
    back = g.add("MaskedTokenDecode", tokens=read, model=model)
    ((first, last),) = g.shoot([[Panel("A picture", picture, 4, 1), Panel("Decoded again", back, 4, 1)]])
    return [[first, shown_ids(g, "encode", "Its tokens: a colour for each word of the codebook"), last]]


def masked_token_decode(g: Graph):
    model = token_model(g)
    draft = tokens(g, model, "a cat left of an apple on blue", batch=1)
    g.add("SaveMaskedTokens", tokens=draft, filename_prefix="tokens/decode")
    back = g.add("MaskedTokenDecode", tokens=draft, model=model)
    ((last,),) = g.shoot([[Panel("What Masked Token Decode makes of them", back, 4)]])
    return [[shown_ids(g, "decode", "Tokens: a colour for each word of the codebook"), last]]


def masked_token_edit(g: Graph):
    model, prompt = token_model(g), "a cat left of a tree on blue"
    draft = tokens(g, model, prompt, batch=1)
    freed = g.add("MaskedTokenEdit", tokens=draft, mask=part(g, 32, 32))
    again = tokens(g, model, prompt, 100, 3, tokens=freed)
    return g.shoot([[Panel("A draft", draft), Panel("Its right half forgotten and painted again, three times", again)]])


def save_masked_tokens(g: Graph):
    draft = tokens(g, token_model(g), "a cat left of a tree on blue", batch=1)
    g.add("SaveMaskedTokens", tokens=draft, filename_prefix="tokens/save")
    ((first,),) = g.shoot([[Panel("The draft that is saved", draft, 4)]])
    h = g.another()
    loaded = h.add("LoadMaskedTokens", file=h.saved("LoadMaskedTokens", "save_"))
    back = h.add("MaskedTokenDecode", tokens=loaded, model=token_model(h))
    ((last,),) = h.shoot([[Panel("Loaded again and decoded", back, 4)]])
    return [[first, shown_ids(h, "save", "What the file holds: its token ids"), last]]


def load_masked_tokens(g: Graph):
    prompt = "a cat left of a tree on blue"
    draft = tokens(g, token_model(g), prompt, batch=1)
    g.add("SaveMaskedTokens", tokens=draft, filename_prefix="tokens/load")
    g.run()
    h = g.another()
    model, loaded = token_model(h), h.add("LoadMaskedTokens", file=h.saved("LoadMaskedTokens", "load_"))
    back = h.add("MaskedTokenDecode", tokens=loaded, model=model)
    freed = h.add("MaskedTokenEdit", tokens=loaded, mask=part(h, 32, 32))
    again = tokens(h, model, prompt, 200, 3, tokens=freed)
    return h.shoot([[Panel("A draft from a file", back), Panel("Sampled on: its right half painted again", again)]])


# styles for masked token models


def trained_lora(g: Graph) -> tuple[Node, Node, Node]:
    """The model, the picture, Train Masked Token LoRA as in its example workflow."""
    model, expert = token_model(g), checkpoint(g, "expert-animals")
    picture = g.add("ImageInvert", image=paint(g, expert, expert, "a cat on white", 3, 1, **SHARP))
    said = g.add("CLIPTextEncode", clip=model, text="a cat on white")
    settings = {"rank": 8, "alpha": 8.0, "steps": 80, "batch_size": 4, "learning_rate": 0.0015, "seed": 1}
    return model, picture, g.add("TrainMaskedTokenLora", model=model, images=picture, positive=said, **settings)


def styled(g: Graph, model: Node, strength: float, batch: int = 4, **lora) -> Node:
    loaded = g.add("LoadMaskedTokenLora", model=model, strength=strength, **lora)
    return tokens(g, loaded, "a dog on white", batch=batch, clip=model)


def train_masked_token_lora(g: Graph):
    model, picture, lora = trained_lora(g)
    without, with_it = tokens(g, model, "a dog on white", batch=3), styled(g, model, 1.3, 3, lora=lora)
    return g.shoot(
        [
            [Panel("The picture\na cat in negative colours", picture)],
            [Panel("'a dog on white', without the LoRA", without)],
            [Panel("The same prompt and seeds, with the LoRA", with_it)],
        ]
    )


def load_masked_token_lora(g: Graph):
    model, _, lora = trained_lora(g)
    strengths = (0.0, 0.65, 1.3)
    return g.shoot([[Panel(f"strength {s:g}", styled(g, model, s, lora=lora))] for s in strengths])


def save_masked_token_lora(g: Graph):
    model, _, lora = trained_lora(g)
    g.add("SaveMaskedTokenLora", lora=lora, filename_prefix=f"loras/{MARK}")
    rows = g.shoot([[Panel("With the LoRA that was trained", styled(g, model, 1.3, lora=lora))]])
    h = g.another()
    file = h.saved("LoadMaskedTokenLora", MARK)
    return rows + h.shoot([[Panel(f"With the LoRA from {file}", styled(h, token_model(h), 1.3, lora_name=file))]])


PICTURES = {
    "LoadMaskedTokenModel": load_masked_token_model,
    "MaskedTokenSampler": masked_token_sampler,
    "MaskedTokenEncode": masked_token_encode,
    "MaskedTokenDecode": masked_token_decode,
    "MaskedTokenEdit": masked_token_edit,
    "SaveMaskedTokens": save_masked_tokens,
    "LoadMaskedTokens": load_masked_tokens,
    "TrainMaskedTokenLora": train_masked_token_lora,
    "LoadMaskedTokenLora": load_masked_token_lora,
    "SaveMaskedTokenLora": save_masked_token_lora,
}
