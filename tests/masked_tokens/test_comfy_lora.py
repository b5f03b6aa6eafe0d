"""LoRAs of masked token models in the host: trained, saved, loaded, put on; on a tiny random model."""

import contextlib
import io
import json
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import safetensors
import safetensors.torch
import torch
from comfy_extras.nodes_train import LossGraphNode
from PIL import Image

from chorus.dev.tools.client import WorkflowError
from chorus.host.operations import casting_operations
from chorus.kernels.linear import linear
from chorus.nodes.masked_token_lora import LoadMaskedTokenLora, SaveMaskedTokenLora, TrainMaskedTokenLora
from chorus.nodes.masked_token_model import LoadMaskedTokenModel
from chorus.nodes.masked_tokens import MaskedTokenSampler
from chorus.techniques.masked_tokens import training as masked_token_lora
from chorus.techniques.masked_tokens.comfy_model import loaded, wrap
from chorus.techniques.masked_tokens.lora import Lora, LoraWeights, attach, from_file, target_modules, to_file
from chorus.techniques.masked_tokens.networks.uvit import UViT, UViTConfig, load_uvit
from chorus.tests.support.tiny_masked_tokens import HEADS, UVIT, fill, hooked, picture, run, tiny_model
from chorus.tests.support.tiny_masked_tokens import prompt as encoded

pytestmark = pytest.mark.usefixtures("one_thread", "folders")

SIDE = 16  # pixels of 4 tokens


@pytest.fixture(params=["in inference mode", "outside"])
def model(request):
    with torch.inference_mode(request.param == "in inference mode"):
        return tiny_model().model


@pytest.fixture(scope="module")
def plain_model():
    return tiny_model().model


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders in place of models/loras and output."""
    (tmp_path / "output").mkdir()
    (tmp_path / "models").mkdir()
    paths = [str(tmp_path / "models"), str(tmp_path / "output" / "loras")]
    known = {**folder_paths.folder_names_and_paths, "loras": (paths, folder_paths.supported_pt_extensions)}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path


def prompt(*seeds, length=3):
    return [row for seed in seeds for row in encoded(seed, length)]


def train(model, **inputs):
    quick = {"images": picture(SIDE, SIDE), "positive": prompt(7), "resolution": SIDE}
    settings = {"rank": 4, "alpha": 6.0, "steps": 5, "learning_rate": 1e-2}
    return run(TrainMaskedTokenLora, model=model, **{**quick, **settings, **inputs})


def load(model, **inputs):
    return run(LoadMaskedTokenLora, model=model, **inputs)[0]


def logits(model):
    """On fixed inputs, by the host."""
    with loaded(model.transformer, 1) as network:
        return logits_of(network, model.transformer.load_device)


@torch.no_grad()
def logits_of(network, device="cpu"):
    """The same by a plain network."""
    ids = torch.randint(UVIT["vocab_size"], (2, 4, 4), generator=torch.Generator().manual_seed(2))
    (states, extras), micro = encoded(7, 3, rows=2)[0], torch.tensor([[16.0, 16.0, 0.0, 0.0, 6.0]] * 2)
    conditioning = network.condition(states.to(device), extras["pooled_output"].to(device), micro.to(device))
    return network(ids.to(device), conditioning).cpu()


def plain_network():
    return fill(UViT(UViTConfig(**UVIT)), 0)


def random_lora(rank=4, alpha=6.0, seed=9):
    generator, weights = torch.Generator().manual_seed(seed), {}
    network = plain_network()
    for name in target_modules(network):
        out, width = network.get_submodule(name).weight.shape
        down, up = (torch.randn(shape, generator=generator) * 0.3 for shape in ((rank, width), (out, rank)))
        weights[name] = LoraWeights(down, up, alpha)
    return Lora(weights)


def files(folders):
    return sorted(str(path.relative_to(folders)) for path in folders.rglob("*") if path.is_file())


def same(a, b):
    return all(torch.equal(x, y) for name in a.weights for x, y in zip(a.weights[name][:2], b.weights[name][:2]))


def test_trained_layers_and_patched_weights_give_the_same_logits(model):
    lora, *_ = train(model)
    network = plain_network()
    attach(network, lora)
    with torch.inference_mode():
        patched, before = logits(load(model, lora=lora)), logits(model)
    assert (patched - before).abs().max() > 0.1
    torch.testing.assert_close(patched, logits_of(network), rtol=1e-4, atol=1e-4)


def test_patched_weights_are_those_of_the_formula(plain_model):
    lora = random_lora(rank=4, alpha=6.0)
    patched = load(plain_model, lora=lora, strength=0.7)
    expected = plain_network()
    for name, (down, up, alpha) in lora.weights.items():
        expected.get_submodule(name).weight.data += 0.7 * alpha / 4 * up @ down
    torch.testing.assert_close(logits(patched), logits_of(expected), rtol=1e-4, atol=1e-4)
    with loaded(patched.transformer, 1) as network:
        for name, weight in network.state_dict().items():
            torch.testing.assert_close(weight.cpu(), expected.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_loras_chain_and_leave_the_model_as_it_was(plain_model):
    first, second = random_lora(seed=1), random_lora(seed=2)
    before = logits(plain_model)
    one = load(plain_model, lora=first)
    both = load(one, lora=second, strength=0.5)
    network = plain_network()
    for lora, strength in ((first, 1.0), (second, 0.5)):
        for name, (down, up, alpha) in lora.weights.items():
            network.get_submodule(name).weight.data += strength * alpha / 4 * up @ down
    torch.testing.assert_close(logits(both), logits_of(network), rtol=1e-3, atol=1e-3)
    alone = logits(one)
    assert not torch.allclose(alone, logits(both), atol=0.1)
    assert torch.equal(logits(one), alone)
    assert torch.equal(logits(plain_model), before)


def test_strength_zero_is_the_model_itself(plain_model):
    assert load(plain_model, lora=random_lora(), strength=0.0) is plain_model


def test_saved_and_loaded_it_is_the_same(plain_model, folders):
    lora, *_ = train(plain_model)
    for _ in range(2):
        run(SaveMaskedTokenLora, lora=lora)
    assert files(folders) == [f"output/loras/masked_token_lora_0000{n}_.safetensors" for n in (1, 2)]
    name = "masked_token_lora_00001_.safetensors"
    (combo,) = (i for i in LoadMaskedTokenLora.define_schema().inputs if i.id == "lora_name")
    assert combo.options == ["none", name, name.replace("1", "2")]
    model, back = run(LoadMaskedTokenLora, model=plain_model, lora_name=name)
    assert same(back, lora)
    assert back.facts == lora.facts
    assert back.facts["steps"] == "5"
    assert torch.equal(logits(model), logits(load(plain_model, lora=lora)))
    with safetensors.safe_open(folders / "output" / "loras" / name, "pt") as file:
        assert file.metadata()["alpha"] == "6.0"
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 6.0
        assert "transformer.transformer_layers.0.attn2.to_k.lora_A.weight" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 1.0), (6.0, 1.5)])
def test_a_published_file_has_scale_one_or_that_of_the_given_alpha(plain_model, folders, alpha, scale):
    lora = random_lora(rank=4)
    tensors, _ = to_file(lora)
    safetensors.torch.save_file(tensors, folders / "models" / "pytorch_lora_weights.safetensors")
    patched = load(plain_model, lora_name="pytorch_lora_weights.safetensors", alpha=alpha)
    network = plain_network()
    for name, (down, up, _) in lora.weights.items():
        network.get_submodule(name).weight.data += scale * up @ down
    torch.testing.assert_close(logits(patched), logits_of(network), rtol=1e-4, atol=1e-4)


def test_keys_of_the_text_encoder_are_left_out_and_said(plain_model, folders, caplog):
    tensors, metadata = to_file(random_lora())
    tensors["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 16)
    safetensors.torch.save_file(tensors, folders / "models" / "both.safetensors", metadata)
    patched = load(plain_model, lora_name="both.safetensors")
    assert torch.equal(logits(patched), logits(load(plain_model, lora=random_lora())))
    assert "1 keys of both.safetensors are for the text encoder" in caplog.text


def test_training_learns_and_changes_nothing_else(model):
    with torch.inference_mode():
        before = logits(model)
    weights = {name: weight.clone() for name, weight in model.transformer.model.state_dict().items()}
    lora, loss_map, text = train(model, steps=60)
    losses = loss_map["loss"]
    assert len(losses) == 60
    # the head, which no LoRA changes, bounds how sure this network can be
    assert sum(losses[-10:]) < 0.92 * sum(losses[:10])
    assert "it learned" in text
    assert lora.facts["base_model"] == "tiny"
    with torch.inference_mode():
        assert torch.equal(logits(model), before)
    assert all(torch.equal(w, weights[name]) for name, w in model.transformer.model.state_dict().items())
    assert not any(t.is_inference() for pair in lora.weights.values() for t in pair[:2])


def test_a_model_in_float16_is_trained_in_a_wider_dtype():
    """Whose LoRA then changes the float16 weights."""
    half = {name: weight.half() for name, weight in plain_network().state_dict().items()}
    model = tiny_model().model
    model = wrap("half", load_uvit(half, HEADS, casting_operations(linear)), model.vq.model, model.text)
    lora, _, text = train(model, steps=30)
    assert fixed(text)[1] < 0.9 * fixed(text)[0]
    network = load_uvit({name: weight.float() for name, weight in half.items()}, HEADS)
    attach(network, lora)
    patched = load(model, lora=lora)
    assert {weight.dtype for weight in patched.transformer.model.state_dict().values()} == {torch.float16}
    torch.testing.assert_close(logits(patched).float(), logits_of(network), rtol=0.05, atol=0.05)


def test_the_same_bits_twice(plain_model):
    a, b, other = train(plain_model), train(plain_model), train(plain_model, seed=1)
    assert same(a[0], b[0])
    assert a[1:] == b[1:]
    assert a[1] != other[1]


def test_resumed_it_starts_at_the_loss_where_it_ended(plain_model, folders):
    first, _, text = train(plain_model, steps=40)
    run(SaveMaskedTokenLora, lora=first, filename_prefix="loras/first")
    _, stored = run(LoadMaskedTokenLora, model=plain_model, lora_name="first_00001_.safetensors")
    for lora in (first, stored):
        second, _, resumed = train(plain_model, steps=3, lora=lora)
        assert second.steps == 43
        assert "resumed at step 40" in resumed
        assert fixed(resumed)[0] == fixed(text)[1]
    assert fixed(text)[1] < 0.9 * fixed(text)[0]


def fixed(text):
    """The losses on fixed masks before and after, from a report."""
    (line,) = (line for line in text.splitlines() if line.startswith("loss on fixed masks"))
    words = line.split()
    return float(words[words.index("before,") - 1]), float(words[words.index("after:") - 1])


def test_on_a_model_that_carries_a_lora_it_trains_on_top(plain_model):
    """Whether the host has it loaded or not."""
    carried = load(plain_model, lora=random_lora())
    texts = [train(carried, steps=2)[2]]
    logits(carried)
    texts.append(train(carried, steps=2)[2])
    logits(plain_model)
    texts.append(train(carried, steps=2)[2])
    assert texts[0] == texts[1] == texts[2]
    assert fixed(texts[0])[0] != fixed(train(plain_model, steps=2)[2])[0]
    lora, *_ = train(carried, steps=3)
    network = plain_network()
    for name, (down, up, alpha) in random_lora().weights.items():
        network.get_submodule(name).weight.data += alpha / 4 * up @ down
    attach(network, lora)
    torch.testing.assert_close(logits(load(carried, lora=lora)), logits_of(network), rtol=1e-3, atol=1e-3)


def test_the_host_plots_the_losses(plain_model):
    _, loss_map, _ = train(plain_model)
    out = LossGraphNode.execute(loss=loss_map, filename_prefix="x")
    assert out.ui


def test_several_pictures_of_another_size_each_with_its_prompt(plain_model):
    inputs = dict(images=picture(20, 44, 3), positive=prompt(1, 2, 3), batch_size=2, gradient_checkpointing=True)
    lora, _, text = train(plain_model, **inputs)
    assert "3 picture(s) of 44x20, crops of 16" in text
    plain, *_ = train(plain_model, **{**inputs, "gradient_checkpointing": False})
    for name, pair in lora.weights.items():
        torch.testing.assert_close(pair.up, plain.weights[name].up)
    _, _, larger = train(plain_model, images=picture(8, 8), resolution=32)
    assert "1 picture(s) of 8x8, crops of 32" in larger


@contextlib.contextmanager
def interrupted_at(step):
    """The user's click during the step."""

    def hook(value, total, preview):
        if value == step:
            comfy.model_management.interrupt_current_processing()

    with hooked(hook), pytest.raises(comfy.model_management.InterruptProcessingException):
        yield


def test_an_interrupted_run_is_on_disk_and_can_be_resumed(plain_model, folders, caplog):
    before, whole = logits(plain_model), train(plain_model)
    with interrupted_at(3):  # the bar tells of every preview, and of other steps now and then
        train(plain_model, preview_every=3)
    (file,) = files(folders)
    assert file == "output/loras/masked_token_lora_interrupted_step3_00001_.safetensors"
    assert file.rpartition("/")[2] in caplog.text
    assert torch.equal(logits(plain_model), before)
    again = train(plain_model)
    assert same(again[0], whole[0])
    assert again[1:] == whole[1:]
    _, kept = run(LoadMaskedTokenLora, model=plain_model, lora_name=Path(file).name)
    assert same(kept, train(plain_model, steps=3)[0])
    assert train(plain_model, steps=2, lora=kept)[0].steps == 5


def test_an_interrupt_before_the_first_step_writes_nothing(plain_model, folders):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(plain_model)
    assert files(folders) == []


def test_checkpoints(plain_model, folders):
    for _ in range(2):
        train(plain_model, steps=6, checkpoint_every=2, checkpoint_prefix="loras/x")
    names = [f"output/loras/x_step{step}_0000{n}_.safetensors" for step in (2, 4) for n in (1, 2)]
    assert files(folders) == names
    stored, _ = from_file(safetensors.torch.load_file(folders / names[2]), {})
    assert same(stored, train(plain_model, steps=4)[0])


def test_no_half_file_is_left(plain_model, folders, full_disk):
    with pytest.raises(OSError, match=r"No space left on device: .* could not be written, and nothing of it is left"):
        run(SaveMaskedTokenLora, lora=random_lora())
    assert files(folders) == []


def test_previews(plain_model):
    seen = []
    with hooked(lambda value, total, preview: seen.append((value, preview))):
        shown = train(plain_model, preview_every=2)
    assert [value for value, preview in seen if preview] == [2, 4]
    assert {preview[1].size for _, preview in seen if preview} == {(SIDE, SIDE)}
    assert same(train(plain_model)[0], shown[0])


def test_host_is_told_that_it_trains(plain_model, monkeypatch):
    """So that its networks use kernels that have a derivative; in sampling they are as before."""
    plain, told = masked_token_lora.masked_loss, []

    def masked_loss(network, batch):
        told.append(comfy.model_management.in_training)
        return plain(network, batch)

    monkeypatch.setattr(masked_token_lora, "masked_loss", masked_loss)
    train(plain_model)
    assert set(told) == {True} and not comfy.model_management.in_training


def spoil(monkeypatch, step):
    """The loss of that step is no number."""
    plain, calls = masked_token_lora.masked_loss, []

    def masked_loss(network, batch):
        calls.append(torch.is_grad_enabled())
        return plain(network, batch) * (torch.nan if sum(calls) == step else 1.0)

    monkeypatch.setattr(masked_token_lora, "masked_loss", masked_loss)


def test_a_loss_that_is_no_number_says_where_the_rest_is(plain_model, folders, monkeypatch):
    kept, *_ = train(plain_model, steps=2)
    spoil(monkeypatch, 4)
    with pytest.raises(
        ValueError, match=r"NaN or infinite at step 4 of 9.*learned before is in .*_failed_step2_00001_"
    ):
        train(plain_model, steps=9)
    (file,) = files(folders)
    assert same(from_file(safetensors.torch.load_file(folders / file))[0], kept)


def test_what_fails_at_once_has_nothing_to_keep(plain_model, folders, monkeypatch):
    spoil(monkeypatch, 1)
    with pytest.raises(ValueError, match=r"NaN or infinite at step 1 of 5; lower the learning rate, 0\.01$"):
        train(plain_model)
    assert files(folders) == []


def half(lora):
    return Lora(dict(list(lora.weights.items())[:3]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(positive=[[torch.zeros(1, 3, 16), {"pooled_output": torch.zeros(1, 12)}]]), "positive: .* text encoder"),
        (dict(positive=[]), "positive holds no prompt; wire a text encoder"),
        (
            dict(
                positive=[[torch.zeros(1, 3, 8), {"pooled_output": torch.zeros(1, 12), "masked_token_text": "clip-l"}]]
            ),
            "positive: text of width 8",
        ),
        (dict(positive=prompt(1, 2)), "2 prompts for 1 pictures"),
        (dict(resolution=18), "resolution 18 does not divide into tokens of 4 pixels; use a multiple of 4"),
        (dict(lora=random_lora(rank=2)), "has rank 2, this node asks for 4; set rank to 2"),
        (dict(lora=random_lora(alpha=1.0)), "has alpha 1, this node asks for 6; set alpha to 1"),
        (dict(lora=half(random_lora())), "other modules than to_q, to_k, to_v"),
        (dict(rank=25), "rank 25 is more than"),
        (
            dict(images=picture(SIDE, SIDE, 2), positive=prompt(1) + prompt(2, length=4), batch_size=2),
            "prompts of 3 to 4 tokens cannot be in one batch of 2; use batch_size 1",
        ),
    ],
)
def test_training_refuses(plain_model, folders, inputs, message):
    with pytest.raises(ValueError, match=message):
        train(plain_model, **inputs)
    assert files(folders) == []


def test_loading_refuses(plain_model, folders):
    with pytest.raises(ValueError, match="no LoRA: choose a file"):
        load(plain_model)
    wrong = random_lora()
    wrong.weights["transformer_layers.9.attn1.to_q"] = wrong.weights["transformer_layers.0.attn1.to_q"]
    with pytest.raises(ValueError, match=r"1 modules that the model lacks: transformer_layers\.9\.attn1\.to_q"):
        load(plain_model, lora=wrong)
    with pytest.raises(ValueError, match=r"1 modules that the model lacks"):
        load(plain_model, lora=wrong, strength=0.0)
    safetensors.torch.save_file({"alien.weight": torch.ones(2)}, folders / "models" / "alien.safetensors")
    with pytest.raises(ValueError, match=r"alien\.safetensors: 1 keys are not those of a LoRA: alien\.weight"):
        load(plain_model, lora_name="alien.safetensors")
    with pytest.raises(ValueError, match=r"gone\.safetensors: there is no such LoRA in .*refresh the list"):
        load(plain_model, lora_name="gone.safetensors")


def node(kind, **inputs):
    """A node of an API workflow; widgets that are not named have their defaults."""
    schema = getattr(kind, "define_schema", lambda: None)()
    widgets = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None} if schema else {}
    return {"class_type": schema.node_id if schema else kind, "inputs": {**widgets, **inputs}}


def shown(comfy, result):
    """The pixels of the one picture that was only shown; its file carries the workflow as well."""
    (data,) = [data for name, _, data in comfy.images(result, "temp") if name == "show"]
    return Image.open(io.BytesIO(data)).tobytes()


def test_on_a_server_from_one_picture_to_a_sample(comfy, server):
    """No file is chosen where the LoRA comes by wire; what is saved can be chosen at once."""
    learn = {"model": ["load", 0], "images": ["image", 0], "positive": ["positive", 0], "steps": 3, "rank": 2}
    prompt = {
        "load": node(LoadMaskedTokenModel),
        "positive": node("CLIPTextEncode", clip=["load", 1], text="a cat on blue"),
        "image": node("EmptyImage", width=80, height=64, batch_size=1, color=0x3060C0),
        "train": node(TrainMaskedTokenLora, **learn, preview_every=2),
        "plot": node("LossGraphNode", loss=["train", 1], filename_prefix="loss"),
        "save": node(SaveMaskedTokenLora, lora=["train", 0], filename_prefix="loras/wired"),
        "put": node(LoadMaskedTokenLora, model=["load", 0], lora=["train", 0]),
        "sample": node(
            MaskedTokenSampler, model=["put", 0], positive=["positive", 0], steps=2, cfg=1.0, width=64, height=64
        ),
        "show": node("PreviewImage", images=["sample", 0]),
        "report": node("PreviewAny", source=["train", 2]),
    }
    result = comfy.run(prompt)
    assert result.status == "success"
    assert len(result.previews) == 1
    assert "loss on fixed masks" in str(result.outputs["report"])
    (file,) = (server.base / "output" / "loras").glob("wired*")
    for name in ("train", "plot", "save", "report"):
        del prompt[name]
    del prompt["put"]["inputs"]["lora"]
    prompt["put"]["inputs"]["lora_name"] = file.name
    again = comfy.run(prompt)
    assert shown(comfy, again) == shown(comfy, result)
    prompt["put"]["inputs"]["lora_name"] = "none"
    with pytest.raises(WorkflowError, match="choose a file as 'lora_name', or wire 'lora'"):
        comfy.run(prompt)
