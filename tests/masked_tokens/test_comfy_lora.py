"""Training, saving and loading LoRAs of masked token models in ComfyUI, on a tiny random model."""

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
from chorus.tests.support.tiny_masked_tokens import HEADS, UVIT, fill, progress_hook, random_image, run, tiny_model
from chorus.tests.support.tiny_masked_tokens import prompt as encoded

pytestmark = pytest.mark.usefixtures("one_thread", "folders")

SIDE = 16  # pixels, the side of 4 tokens


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
    all_paths = {**folder_paths.folder_names_and_paths, "loras": (paths, folder_paths.supported_pt_extensions)}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", all_paths)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path


def prompt(*seeds, length=3):
    return [row for seed in seeds for row in encoded(seed, length)]


def train(model, **inputs):
    data = {"images": random_image(SIDE, SIDE), "positive": prompt(7), "resolution": SIDE}
    settings = {"rank": 4, "alpha": 6.0, "steps": 5, "learning_rate": 1e-2}
    return run(TrainMaskedTokenLora, model=model, **{**data, **settings, **inputs})


def load(model, **inputs):
    return run(LoadMaskedTokenLora, model=model, **inputs)[0]


def logits(model):
    """The logits of the patched model on fixed inputs."""
    with loaded(model.transformer, 1) as network:
        return logits_of(network, model.transformer.load_device)


@torch.no_grad()
def logits_of(network, device="cpu"):
    """The logits of a plain network on the same inputs."""
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


@pytest.mark.slow
def test_trained_layers_match_patched_weights(model):
    lora, *_ = train(model)
    network = plain_network()
    attach(network, lora)
    with torch.inference_mode():
        patched, before = logits(load(model, lora=lora)), logits(model)
    assert (patched - before).abs().max() > 0.1
    torch.testing.assert_close(patched, logits_of(network), rtol=1e-4, atol=1e-4)


def test_patched_weights_match_formula(plain_model):
    lora = random_lora(rank=4, alpha=6.0)
    patched = load(plain_model, lora=lora, strength=0.7)
    expected = plain_network()
    for name, (down, up, alpha) in lora.weights.items():
        expected.get_submodule(name).weight.data += 0.7 * alpha / 4 * up @ down
    torch.testing.assert_close(logits(patched), logits_of(expected), rtol=1e-4, atol=1e-4)
    with loaded(patched.transformer, 1) as network:
        for name, weight in network.state_dict().items():
            torch.testing.assert_close(weight.cpu(), expected.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_loras_chain_without_changing_model(plain_model):
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


def test_strength_zero_returns_same_model(plain_model):
    assert load(plain_model, lora=random_lora(), strength=0.0) is plain_model


def test_save_load_round_trip(plain_model, folders):
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
def test_alpha_sets_scale_of_file_without_alpha(plain_model, folders, alpha, scale):
    lora = random_lora(rank=4)
    tensors, _ = to_file(lora)
    safetensors.torch.save_file(tensors, folders / "models" / "pytorch_lora_weights.safetensors")
    patched = load(plain_model, lora_name="pytorch_lora_weights.safetensors", alpha=alpha)
    network = plain_network()
    for name, (down, up, _) in lora.weights.items():
        network.get_submodule(name).weight.data += scale * up @ down
    torch.testing.assert_close(logits(patched), logits_of(network), rtol=1e-4, atol=1e-4)


def save_peft(folder, lora, name="adapter_model.safetensors", **config):
    """Files as PEFT saves them, without alpha in the weights."""
    folder.mkdir(exist_ok=True)
    tensors = {key.replace("transformer.", "base_model.model."): value for key, value in to_file(lora)[0].items()}
    safetensors.torch.save_file(tensors, folder / name, {"format": "pt"})
    (folder / "adapter_config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"r": 4, **config}).encode())


def assert_scale(lora, scale):
    assert {pair.scale for pair in lora.weights.values()} == {scale}


def test_configuration_beside_a_file_of_peft_is_used(plain_model, folders, caplog):
    save_peft(folders / "models" / "style", random_lora(), lora_alpha=8, use_rslora=True)
    patched, lora = run(LoadMaskedTokenLora, model=plain_model, lora_name="style/adapter_model.safetensors")
    assert_scale(lora, 8 / 4**0.5)
    assert torch.equal(logits(patched), logits(load(plain_model, lora=random_lora(alpha=16.0))))
    save_peft(folders / "models" / "one", random_lora(), "any name.SAFETENSORS", lora_alpha=8)
    _, lora = run(LoadMaskedTokenLora, model=plain_model, lora_name="one/any name.SAFETENSORS")
    assert_scale(lora, 2.0)
    assert caplog.text == ""


def test_configuration_in_a_folder_of_several_loras_is_named(plain_model, folders, caplog):
    for name in ("a.safetensors", "b.safetensors"):
        save_peft(folders / "models", random_lora(), name, lora_alpha=8)
    _, lora = run(LoadMaskedTokenLora, model=plain_model, lora_name="a.safetensors")
    assert_scale(lora, 1.0)
    assert "adapter_config.json is not used, because its folder has several LoRAs" in caplog.text


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b" " * 2**21], ids=lambda data: repr(data[:4])
)
def test_damaged_configuration_rejected(plain_model, folders, content):
    save_peft(folders / "models" / "style", random_lora())
    (folders / "models" / "style" / "adapter_config.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors: adapter_config.json beside it.*replace or remove"
    ):
        load(plain_model, lora_name="style/adapter_model.safetensors")


def test_scale_that_is_not_used_is_logged(plain_model, folders, caplog):
    tensors, _ = to_file(random_lora())
    safetensors.torch.save_file(tensors, folders / "models" / "x.safetensors", {"ss_network_alpha": "8"})
    _, lora = run(LoadMaskedTokenLora, model=plain_model, lora_name="x.safetensors")
    assert_scale(lora, 1.0)
    assert "x.safetensors: the metadata ss_network_alpha 8 is not used" in caplog.text
    caplog.clear()
    _, lora = run(LoadMaskedTokenLora, model=plain_model, lora_name="x.safetensors", alpha=8.0)
    assert_scale(lora, 2.0)
    assert caplog.text == ""


def test_text_encoder_keys_skipped_with_warning(plain_model, folders, caplog):
    tensors, metadata = to_file(random_lora())
    tensors["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 16)
    safetensors.torch.save_file(tensors, folders / "models" / "both.safetensors", metadata)
    patched = load(plain_model, lora_name="both.safetensors")
    assert torch.equal(logits(patched), logits(load(plain_model, lora=random_lora())))
    assert "1 keys of both.safetensors are for the text encoder" in caplog.text


@pytest.mark.slow
def test_training_lowers_loss_and_keeps_model(model):
    with torch.inference_mode():
        before = logits(model)
    weights = {name: weight.clone() for name, weight in model.transformer.model.state_dict().items()}
    lora, loss_map, text = train(model, steps=60)
    losses = loss_map["loss"]
    assert len(losses) == 60
    # the output head has no LoRA, which limits how far the loss can fall
    assert sum(losses[-10:]) < 0.92 * sum(losses[:10])
    assert "it improved" in text
    assert lora.facts["base_model"] == "tiny"
    with torch.inference_mode():
        assert torch.equal(logits(model), before)
    assert all(torch.equal(w, weights[name]) for name, w in model.transformer.model.state_dict().items())
    assert not any(t.is_inference() for pair in lora.weights.values() for t in pair[:2])


@pytest.mark.slow
def test_float16_model_trained_in_wider_dtype():
    """The resulting LoRA is then applied to the float16 weights."""
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


@pytest.mark.slow
def test_training_is_deterministic(plain_model):
    a, b, other = train(plain_model), train(plain_model), train(plain_model, seed=1)
    assert same(a[0], b[0])
    assert a[1:] == b[1:]
    assert a[1] != other[1]


@pytest.mark.slow
def test_resume_starts_at_final_loss(plain_model, folders):
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


@pytest.mark.slow
def test_training_on_patched_model_includes_patches(plain_model):
    """The result does not depend on whether ComfyUI has the patched or the plain model loaded."""
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


def test_loss_graph_node_plots_losses(plain_model):
    _, loss_map, _ = train(plain_model)
    out = LossGraphNode.execute(loss=loss_map, filename_prefix="x")
    assert out.ui


@pytest.mark.slow
def test_several_images_are_resized_and_have_their_prompts(plain_model):
    inputs = dict(images=random_image(20, 44, 3), positive=prompt(1, 2, 3), batch_size=2, gradient_checkpointing=True)
    lora, _, text = train(plain_model, **inputs)
    assert "3 image(s) of 44x20, crops of 16" in text
    plain, *_ = train(plain_model, **{**inputs, "gradient_checkpointing": False})
    for name, pair in lora.weights.items():
        torch.testing.assert_close(pair.up, plain.weights[name].up)
    _, _, larger = train(plain_model, images=random_image(8, 8), resolution=32)
    assert "1 image(s) of 8x8, crops of 32" in larger


@contextlib.contextmanager
def interrupted_at(step):
    """Interrupt the run at a step, as the user's Cancel does."""

    def hook(value, total, preview):
        if value == step:
            comfy.model_management.interrupt_current_processing()

    with progress_hook(hook), pytest.raises(comfy.model_management.InterruptProcessingException):
        yield


@pytest.mark.slow
def test_interrupted_run_saved_and_resumable(plain_model, folders, caplog):
    before, whole = logits(plain_model), train(plain_model)
    with interrupted_at(3):  # every preview updates the progress bar; steps without a preview may not
        train(plain_model, preview_every=3)
    (file,) = files(folders)
    assert file == "output/loras/masked_token_lora_interrupted_step3_00001_.safetensors"
    assert file.rpartition("/")[2] in caplog.text
    assert torch.equal(logits(plain_model), before)
    again = train(plain_model)
    assert same(again[0], whole[0])
    assert again[1:] == whole[1:]
    _, saved = run(LoadMaskedTokenLora, model=plain_model, lora_name=Path(file).name)
    assert same(saved, train(plain_model, steps=3)[0])
    assert train(plain_model, steps=2, lora=saved)[0].steps == 5


def test_interrupt_before_first_step_writes_no_file(plain_model, folders):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(plain_model)
    assert files(folders) == []


@pytest.mark.slow
def test_checkpoints_written(plain_model, folders):
    for _ in range(2):
        train(plain_model, steps=6, checkpoint_every=2, checkpoint_prefix="loras/x")
    names = [f"output/loras/x_step{step}_0000{n}_.safetensors" for step in (2, 4) for n in (1, 2)]
    assert files(folders) == names
    stored, *_ = from_file(safetensors.torch.load_file(folders / names[2]), {})
    assert same(stored, train(plain_model, steps=4)[0])


def test_full_disk_leaves_no_partial_file(plain_model, folders, full_disk):
    with pytest.raises(OSError, match=r"No space left on device: .* could not be written, no partial file remains"):
        run(SaveMaskedTokenLora, lora=random_lora())
    assert files(folders) == []


@pytest.mark.slow
def test_previews_do_not_change_result(plain_model):
    seen = []
    with progress_hook(lambda value, total, preview: seen.append((value, preview))):
        shown = train(plain_model, preview_every=2)
    assert [value for value, preview in seen if preview] == [2, 4]
    assert {preview[1].size for _, preview in seen if preview} == {(SIDE, SIDE)}
    assert same(train(plain_model)[0], shown[0])


def test_in_training_flag_set_only_during_run(plain_model, monkeypatch):
    """With this flag, ComfyUI selects kernels that compute gradients."""
    plain, states = masked_token_lora.masked_loss, []

    def masked_loss(network, batch):
        states.append(comfy.model_management.in_training)
        return plain(network, batch)

    monkeypatch.setattr(masked_token_lora, "masked_loss", masked_loss)
    train(plain_model)
    assert set(states) == {True} and not comfy.model_management.in_training


def make_loss_nan(monkeypatch, step):
    """Make the loss of this step NaN."""
    plain, calls = masked_token_lora.masked_loss, []

    def masked_loss(network, batch):
        calls.append(torch.is_grad_enabled())
        return plain(network, batch) * (torch.nan if sum(calls) == step else 1.0)

    monkeypatch.setattr(masked_token_lora, "masked_loss", masked_loss)


def test_non_finite_loss_saves_last_finite_weights(plain_model, folders, monkeypatch):
    expected, *_ = train(plain_model, steps=2)
    make_loss_nan(monkeypatch, 4)
    with pytest.raises(
        ValueError, match=r"NaN or infinite\) at step 4 of 9.*trained so far are in .*_failed_step2_00001_"
    ):
        train(plain_model, steps=9)
    (file,) = files(folders)
    assert same(from_file(safetensors.torch.load_file(folders / file))[0], expected)


def test_non_finite_first_loss_writes_no_file(plain_model, folders, monkeypatch):
    make_loss_nan(monkeypatch, 1)
    with pytest.raises(ValueError, match=r"NaN or infinite\) at step 1 of 5; lower the learning rate \(now 0\.01\)$"):
        train(plain_model)
    assert files(folders) == []


def half(lora):
    return Lora(dict(list(lora.weights.items())[:3]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(positive=[[torch.zeros(1, 3, 16), {"pooled_output": torch.zeros(1, 12)}]]), "positive: .* text encoder"),
        (dict(positive=[]), "expected a prompt for positive, got an empty list; connect a text encoder"),
        (
            dict(
                positive=[[torch.zeros(1, 3, 8), {"pooled_output": torch.zeros(1, 12), "masked_token_text": "clip-l"}]]
            ),
            "positive: text of width 8",
        ),
        (dict(positive=prompt(1, 2)), "2 prompts for 1 images"),
        (dict(resolution=18), "resolution 18 cannot be divided into tokens of 4x4 pixels; use a multiple of 4"),
        (dict(lora=random_lora(rank=2)), "has rank 2, this node has 4; set rank to 2"),
        (dict(lora=random_lora(alpha=1.0)), "has alpha 1, this node has 6; set alpha to 1"),
        (dict(lora=half(random_lora())), "other modules than to_q, to_k, to_v"),
        (dict(rank=25), "rank 25 is more than"),
        (
            dict(images=random_image(SIDE, SIDE, 2), positive=prompt(1) + prompt(2, length=4), batch_size=2),
            "prompts of 3 to 4 tokens cannot be in one batch of 2; use batch_size 1",
        ),
    ],
)
def test_invalid_training_inputs_rejected(plain_model, folders, inputs, message):
    with pytest.raises(ValueError, match=message):
        train(plain_model, **inputs)
    assert files(folders) == []


def test_incompatible_loras_rejected(plain_model, folders):
    with pytest.raises(ValueError, match="expected a LoRA, got none; choose a file"):
        load(plain_model)
    wrong = random_lora()
    wrong.weights["transformer_layers.9.attn1.to_q"] = wrong.weights["transformer_layers.0.attn1.to_q"]
    with pytest.raises(ValueError, match=r"1 modules are not in the model: transformer_layers\.9\.attn1\.to_q"):
        load(plain_model, lora=wrong)
    with pytest.raises(ValueError, match=r"1 modules are not in the model"):
        load(plain_model, lora=wrong, strength=0.0)
    safetensors.torch.save_file({"alien.weight": torch.ones(2)}, folders / "models" / "alien.safetensors")
    with pytest.raises(ValueError, match=r"alien\.safetensors: 1 keys are not those of a LoRA: alien\.weight"):
        load(plain_model, lora_name="alien.safetensors")
    with pytest.raises(ValueError, match=r"there is no LoRA file 'gone\.safetensors'; put it into .*refresh the list"):
        load(plain_model, lora_name="gone.safetensors")


def node(kind, **inputs):
    """A node of an API workflow; other widgets have their defaults."""
    schema = getattr(kind, "define_schema", lambda: None)()
    widgets = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None} if schema else {}
    return {"class_type": schema.node_id if schema else kind, "inputs": {**widgets, **inputs}}


def shown(client, result):
    """The pixels of the only preview image; its file also contains the workflow."""
    (data,) = [data for name, _, data in client.images(result, "temp") if name == "show"]
    return Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.slow
def test_server_trains_saves_and_samples(client, server):
    """A connected LoRA needs no file, and a saved LoRA can be selected immediately."""
    training = {"model": ["load", 0], "images": ["image", 0], "positive": ["positive", 0], "steps": 3, "rank": 2}
    prompt = {
        "load": node(LoadMaskedTokenModel),
        "positive": node("CLIPTextEncode", clip=["load", 1], text="a cat on blue"),
        "image": node("EmptyImage", width=80, height=64, batch_size=1, color=0x3060C0),
        "train": node(TrainMaskedTokenLora, **training, preview_every=2),
        "plot": node("LossGraphNode", loss=["train", 1], filename_prefix="loss"),
        "save": node(SaveMaskedTokenLora, lora=["train", 0], filename_prefix="loras/wired"),
        "put": node(LoadMaskedTokenLora, model=["load", 0], lora=["train", 0]),
        "sample": node(
            MaskedTokenSampler, model=["put", 0], positive=["positive", 0], steps=2, cfg=1.0, width=64, height=64
        ),
        "show": node("PreviewImage", images=["sample", 0]),
        "report": node("PreviewAny", source=["train", 2]),
    }
    result = client.run(prompt)
    assert result.status == "success"
    assert len(result.previews) == 1
    assert "loss on fixed masks" in str(result.outputs["report"])
    (file,) = (server.base / "output" / "loras").glob("wired*")
    for name in ("train", "plot", "save", "report"):
        del prompt[name]
    del prompt["put"]["inputs"]["lora"]
    prompt["put"]["inputs"]["lora_name"] = file.name
    again = client.run(prompt)
    assert shown(client, again) == shown(client, result)
    prompt["put"]["inputs"]["lora_name"] = "none"
    with pytest.raises(WorkflowError, match="choose a file as 'lora_name', or connect 'lora'"):
        client.run(prompt)
