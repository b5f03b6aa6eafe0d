"""Saved seeds: exact round trips, atomic writes, and rejection of invalid files."""

import hashlib
import pickle

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import folder_paths
import pytest
import safetensors.torch
import torch

from chorus.demo import modules
from chorus.techniques.seed_select import comfy_files
from chorus.techniques.seed_select.comfy_files import FILES, SeedNoise, load_seed, model_details, read_seed, save_seed
from chorus.tests.support.gradients import seed_sampler
from chorus.tests.support.seeds import WORDS
from chorus.tests.support.tiny_models import in_inference_mode, ksample, latent, lora, unet

pytestmark = pytest.mark.usefixtures("one_thread")
DETAILS = {"score": "0.125", "settings": '{"steps": 20}', "name": "größer"}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Folder with ComfyUI's input and output folders for one test."""
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    return tmp_path


def noise_of(*shape, seed=0):
    return torch.randn(*(shape or (1, 4, 16, 16)), generator=torch.Generator().manual_seed(seed))


def saved(noise=None, prefix="seeds/test", **details):
    """Save ``noise`` (by default that of seed 0) and return the name of the file, as LoadSeed lists it."""
    path = save_seed(SeedNoise(noise_of() if noise is None else noise, 2**64 - 1, details), prefix)
    return f"{path['subfolder']}/{path['filename']} [output]"


def test_saved_seed_round_trips(folders):
    noise = noise_of()
    name = saved(noise, **DETAILS)
    assert name == "seeds/test_00001_.seed.safetensors [output]"
    assert FILES.names() == [name]
    found = load_seed(name)
    assert torch.equal(found.noise, noise)
    assert found.seed == 2**64 - 1
    assert found.details == DETAILS
    (folders / "output/seeds/test_00001_.seed.safetensors").rename(folders / "input/mine.seed.safetensors")
    assert FILES.names() == ["mine.seed.safetensors"]
    assert torch.equal(load_seed("mine.seed.safetensors").noise, noise)


def test_files_are_numbered_and_never_overwritten(folders):
    names = [saved(noise_of(seed=k)) for k in range(3)]
    assert names == [f"seeds/test_{k:05}_.seed.safetensors [output]" for k in (1, 2, 3)]
    for k, name in enumerate(names):
        assert torch.equal(load_seed(name).noise, noise_of(seed=k))
    assert FILES.fingerprint(names[0]) != FILES.fingerprint(names[1])


def test_existing_file_not_overwritten(folders, monkeypatch):
    noise = noise_of(seed=1)
    saved()
    path = folders / "output/seeds/test_00001_.seed.safetensors"
    before = path.read_bytes()
    original = folder_paths.get_save_image_path
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda *a: (*original(*a)[:2], 1, *original(*a)[3:]))
    names = [saved(noise), saved(noise)]
    assert names == [f"seeds/test_{k:05}_.seed.safetensors [output]" for k in (2, 3)]
    assert path.read_bytes() == before and all(torch.equal(load_seed(name).noise, noise) for name in names)
    assert len(list(path.parent.iterdir())) == 3


def test_failed_write_leaves_no_file(folders, monkeypatch):
    def disk_full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", disk_full)
    with pytest.raises(OSError, match="no space left"):
        saved()
    assert not list((folders / "output/seeds").iterdir())


def test_half_precision_noise_saved_as_float32_without_gradient():
    noise = noise_of().half().requires_grad_(True)
    found = load_seed(saved(noise)).noise
    assert found.dtype == torch.float32
    assert torch.equal(found, noise.detach().float())


def write_input_file(folders, data: bytes) -> str:
    """Write ``data`` as a seed file into the input folder and return its name."""
    (folders / "input/bad.seed.safetensors").write_bytes(data)
    return "bad.seed.safetensors"


def file_of(tensors, **metadata) -> bytes:
    """Content of a safetensors file."""
    return safetensors.torch.save(tensors, metadata or None)


METADATA = {"format": comfy_files.FORMAT, "seed": "5"}
INVALID_FILES = {
    "truncated": (lambda: file_of({"noise": noise_of()}, **METADATA)[:-8], "cannot be read as a seed file"),
    "empty": (lambda: b"", "cannot be read as a seed file"),
    "pickle": (lambda: pickle.dumps({"noise": [1.0] * 99}), "cannot be read as a seed file"),
    "no metadata": (lambda: file_of({"noise": noise_of()}), "format chorus-seed-1 or a seed"),
    "no seed": (lambda: file_of({"noise": noise_of()}, format=comfy_files.FORMAT), "or a seed"),
    "negative seed": (lambda: file_of({"noise": noise_of()}, **{**METADATA, "seed": "-1"}), "or a seed"),
    "no noise": (lambda: file_of({"latent": noise_of()}, **METADATA), "holds latent instead of noise"),
    "dtype": (lambda: file_of({"noise": noise_of().long()}, **METADATA), "torch.int64 1x4x16x16"),
    "two axes": (lambda: file_of({"noise": noise_of(16, 16)}, **METADATA), "got torch.float32 16x16"),
    "missing part": (
        lambda: file_of({"noise": noise_of(), "noise_3": noise_of()}, **METADATA),
        "holds noise, noise_3 instead of noise",
    ),
    "beyond float32": (lambda: file_of({"noise": noise_of().double() * 1e300}, **METADATA), "are not finite"),
    "not finite": (lambda: file_of({"noise": noise_of() / (noise_of().abs() > 2)}, **METADATA), "are not finite"),
}


@pytest.mark.parametrize("case", INVALID_FILES)
def test_error_for_an_invalid_file_names_the_file(folders, case):
    make, message = INVALID_FILES[case]
    with pytest.raises(
        ValueError, match=f"'bad.seed.safetensors' cannot be read.*{message.removeprefix('cannot be read')}"
    ):
        load_seed(write_input_file(folders, make()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.seed.safetensors", "there is no seed file 'gone"),
        (
            "model.safetensors",
            "is not a seed file in the input or output folder; save one with Save Seed, or choose a file that ends in",
        ),
        ("../secret.seed.safetensors", "is not a seed file in the input or output folder"),
        ("../../etc/x.seed.safetensors [output]", "is not a seed file in the input or output folder"),
    ],
)
def test_name_that_is_not_of_a_seed_file_rejected(name, message):
    with pytest.raises(ValueError, match=message):
        FILES.find(name)


@pytest.mark.parametrize("prefix", ["", "seeds/..", "."])
def test_prefix_without_file_name_rejected(prefix):
    with pytest.raises(ValueError, match="has no file name"):
        saved(prefix=prefix)


def test_non_finite_noise_not_saved(folders):
    with pytest.raises(ValueError, match="1024 of the 1024 numbers"):
        saved(noise_of() * float("nan"))
    assert not list((folders / "output").iterdir())


@in_inference_mode
def sampled(model, noise, samples, sampler="euler"):
    """Samples of SamplerCustomAdvanced with a CFGGuider, three steps and cfg 5."""
    guider = custom.CFGGuider.execute(model, *WORDS, 5.0).args[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", 3, 1.0).args[0]
    chosen = custom.KSamplerSelect.execute(sampler).args[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, chosen, sigmas, samples).args[0]["samples"]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
def test_saved_seed_reproduces_image_in_custom_sampler(sampler):
    model = unet(0)
    run = seed_sampler(model, sampler_name=sampler)
    path = save_seed(SeedNoise(run.noise_of(6), 6), "seed")
    samples = sampled(model, load_seed(f"{path['filename']} [output]"), latent(), sampler)
    assert torch.equal(samples, ksample(model, *WORDS, latent(), sampler=sampler, seed=6))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            torch.zeros(1, 4, 16, 24),
            "height 16 and width 16 as for the noise, got batch size 1, 4 channels, height 16 and width 24; set width",
        ),
        (torch.zeros(2, 4, 16, 16), "got batch size 2, 4 channels.*set batch_size to 1"),
        (torch.zeros(1, 16, 16, 16), "same latent space"),
        (torch.zeros(1, 4, 2, 16, 16), "got batch size 1, 4 channels, 2 frames, height 16 and width 16; use a model"),
    ],
)
def test_latent_whose_shape_differs_from_the_noise_rejected(samples, message):
    with pytest.raises(ValueError, match=message):
        SeedNoise(noise_of(), 0).generate_noise({"samples": samples})


def test_latent_of_another_size_rejected_with_pixels_if_they_are_known():
    seed, samples = SeedNoise(noise_of(), 0, {"pixels_per_position": "8"}), {"samples": torch.zeros(1, 4, 24, 16)}
    with pytest.raises(
        ValueError,
        match=r"height 16 and width 16 \(128 and 128 pixels\) as for the noise, got .* height 24 and width 16"
        r" \(192 and 128 pixels\); set width and height as in the selection of the noise \(width 128 and height 128\)",
    ):
        seed.generate_noise(samples)
    for value in ("", "many", "-8", "9" * 5000):  # the details of a file may hold anything
        with pytest.raises(ValueError, match=r"width 16; set width and height as in the selection of the noise$"):
            SeedNoise(noise_of(), 0, {"pixels_per_position": value}).generate_noise(samples)


def test_shipped_seeds_hold_the_pixels_of_a_latent_position():
    for name, path in modules.shipped_seeds().items():
        with pytest.raises(ValueError, match=r"set width and height .* \(width 128 and height 128\)"):
            read_seed(path, name).generate_noise({"samples": torch.zeros(1, 8, 24, 16)})


def test_nested_latent_rejected():
    nested = comfy.nested_tensor.NestedTensor([torch.zeros(1, 4, 2, 16, 16), torch.zeros(1, 8, 5)])
    with pytest.raises(
        ValueError, match=r"expected one latent as for the noise, got a nested latent \(video with audio\)"
    ):
        SeedNoise(noise_of(), 0).generate_noise({"samples": nested})


def test_generate_noise_returns_a_copy_in_the_dtype_of_the_latent():
    seed = SeedNoise(noise_of(), 0)
    seed.generate_noise(latent()).zero_()
    assert torch.equal(seed.noise, noise_of())
    assert seed.generate_noise({"samples": torch.zeros(1, 4, 16, 16).half()}).dtype == torch.float16


def test_model_details_contain_file_hash_and_number_of_patched_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path / "a")], {".safetensors"}))
    model = unet(0)
    assert model_details(model) == {"model": "BaseModel", "patched_weights": "0", "pixels_per_position": "8"}
    file = tmp_path / "a" / "b" / "some model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    patched = lora(model, 1)
    patched.cached_patcher_init = (unet, (str(file), False), 0)
    details = model_details(patched)
    assert details["model_file"] == "some model.safetensors"
    assert details["model_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert int(details["patched_weights"]) > 0
    # a loader of another pack may read a file from anywhere, after other texts such as an address
    outside = tmp_path / "somebody" / "private name.safetensors"
    outside.parent.mkdir()
    outside.write_bytes(b"weights")
    patched.cached_patcher_init = (unet, ("https://somewhere", str(outside)), 0)
    assert model_details(patched) == {key: value for key, value in details.items() if key != "model_file"}
    with torch.inference_mode():
        demo = model_details(modules.load_model("general"))
    assert demo["model_file"] == "general"
    assert "model_sha256" not in demo
