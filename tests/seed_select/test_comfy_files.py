"""Seeds on disk: what comes back is what was saved, whole, and nothing else is taken for it."""

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
from chorus.techniques.seed_select.comfy_files import FILES, SeedNoise, load_seed, model_details, save_seed
from chorus.tests.support.gradients import run_of
from chorus.tests.support.seeds import WORDS
from chorus.tests.support.tiny_models import in_inference_mode, ksample, latent, lora, unet

pytestmark = pytest.mark.usefixtures("one_thread")
DETAILS = {"score": "0.125", "settings": '{"steps": 20}', "name": "größer"}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    return tmp_path


def noise_of(*shape, seed=0):
    return torch.randn(*(shape or (1, 4, 16, 16)), generator=torch.Generator().manual_seed(seed))


def saved(noise=None, prefix="seeds/test", **details):
    place = save_seed(SeedNoise(noise_of() if noise is None else noise, 2**64 - 1, details), prefix)
    return f"{place['subfolder']}/{place['filename']} [output]"


def test_what_is_loaded_is_what_was_saved(folders):
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


def test_files_are_numbered_and_none_is_overwritten(folders):
    names = [saved(noise_of(seed=k)) for k in range(3)]
    assert names == [f"seeds/test_{k:05}_.seed.safetensors [output]" for k in (1, 2, 3)]
    for k, name in enumerate(names):
        assert torch.equal(load_seed(name).noise, noise_of(seed=k))
    assert FILES.fingerprint(names[0]) != FILES.fingerprint(names[1])


def test_a_file_that_appears_meanwhile_is_left_alone(folders, monkeypatch):
    saved()
    path = folders / "output/seeds/test_00001_.seed.safetensors"
    before = path.read_bytes()
    host = folder_paths.get_save_image_path
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda *a: (*host(*a)[:2], 1, *host(*a)[3:]))
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        saved(noise_of(seed=1))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failing_disk_leaves_nothing(folders, monkeypatch):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        saved()
    assert not list((folders / "output/seeds").iterdir())


def test_half_precision_and_gradients_are_saved_as_plain_numbers():
    noise = noise_of().half().requires_grad_(True)
    found = load_seed(saved(noise)).noise
    assert found.dtype == torch.float32
    assert torch.equal(found, noise.detach().float())


def write(folders, data: bytes) -> str:
    (folders / "input/bad.seed.safetensors").write_bytes(data)
    return "bad.seed.safetensors"


def file_of(tensors, **metadata) -> bytes:
    return safetensors.torch.save(tensors, metadata or None)


HEAD = {"format": comfy_files.FORMAT, "seed": "5"}
BAD = {
    "truncated": (lambda: file_of({"noise": noise_of()}, **HEAD)[:-8], "cannot be read as a seed file"),
    "empty": (lambda: b"", "cannot be read as a seed file"),
    "pickle": (lambda: pickle.dumps({"noise": [1.0] * 99}), "cannot be read as a seed file"),
    "foreign": (lambda: file_of({"noise": noise_of()}), "format chorus-seed-1 and a seed"),
    "no seed": (lambda: file_of({"noise": noise_of()}, format=comfy_files.FORMAT), "and a seed"),
    "odd seed": (lambda: file_of({"noise": noise_of()}, **{**HEAD, "seed": "-1"}), "and a seed"),
    "tensors": (lambda: file_of({"latent": noise_of()}, **HEAD), "holds latent instead of noise"),
    "dtype": (lambda: file_of({"noise": noise_of().long()}, **HEAD), r"torch.int64 \[1x4x16x16\]"),
    "axes": (lambda: file_of({"noise": noise_of(1, 4, 2, 16, 16)}, **HEAD), "1x4x2x16x16"),
    "nan": (lambda: file_of({"noise": noise_of() / (noise_of().abs() > 2)}, **HEAD), "are not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_files_are_refused_by_name(folders, case):
    make, message = BAD[case]
    with pytest.raises(
        ValueError, match=f"'bad.seed.safetensors' cannot be read.*{message.removeprefix('cannot be read')}"
    ):
        load_seed(write(folders, make()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.seed.safetensors", "there is no seed file 'gone"),
        ("model.safetensors", "no seed file of the input or output folder"),
        ("../secret.seed.safetensors", "no seed file of the input or output folder"),
        ("../../etc/x.seed.safetensors [output]", "no seed file of the input or output folder"),
    ],
)
def test_names_outside_the_folders_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        FILES.find(name)


@pytest.mark.parametrize("prefix", ["", "seeds/..", "."])
def test_a_prefix_without_a_name_is_refused(prefix):
    with pytest.raises(ValueError, match="names no file"):
        saved(prefix=prefix)


def test_what_is_not_finite_is_not_saved(folders):
    with pytest.raises(ValueError, match="1024 of the 1024 numbers"):
        saved(noise_of() * float("nan"))
    assert not list((folders / "output").iterdir())


@in_inference_mode
def sampled(model, noise, samples, sampler="euler"):
    """SamplerCustomAdvanced with CFGGuider, as nodes."""
    guider = custom.CFGGuider.execute(model, *WORDS, 5.0).args[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", 3, 1.0).args[0]
    chosen = custom.KSamplerSelect.execute(sampler).args[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, chosen, sigmas, samples).args[0]["samples"]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
def test_a_saved_seed_paints_its_picture_in_the_hosts_custom_sampler(sampler):
    model = unet(0)
    run = run_of(model, sampler_name=sampler)
    place = save_seed(SeedNoise(run.noise_of(6), 6), "seed")
    found = sampled(model, load_seed(f"{place['filename']} [output]"), latent(), sampler)
    assert torch.equal(found, ksample(model, *WORDS, latent(), sampler=sampler, seed=6))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            torch.zeros(1, 4, 16, 24),
            "16 high and 16 wide, this one is of 1 x 4 channels, 16 high and 24 wide; set width",
        ),
        (torch.zeros(2, 4, 16, 16), "this one is of 2 x 4 channels.*set batch_size to 1"),
        (torch.zeros(1, 16, 16, 16), "same latent space"),
        (torch.zeros(1, 4, 2, 16, 16), "the shape 1x4x2x16x16; use a model"),
    ],
)
def test_a_latent_of_another_shape_is_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        SeedNoise(noise_of(), 0).generate_noise({"samples": samples})


def test_a_nested_latent_is_refused():
    nested = comfy.nested_tensor.NestedTensor([torch.zeros(1, 4, 2, 16, 16), torch.zeros(1, 8, 5)])
    with pytest.raises(ValueError, match="video and sound"):
        SeedNoise(noise_of(), 0).generate_noise({"samples": nested})


def test_a_generated_noise_is_the_callers_own():
    seed = SeedNoise(noise_of(), 0)
    seed.generate_noise(latent()).zero_()
    assert torch.equal(seed.noise, noise_of())
    assert seed.generate_noise({"samples": torch.zeros(1, 4, 16, 16).half()}).dtype == torch.float16


def test_details_of_a_model(tmp_path):
    model = unet(0)
    assert model_details(model) == {"model": "BaseModel", "patched_weights": "0"}
    file = tmp_path / "some model.safetensors"
    file.write_bytes(b"weights")
    patched = lora(model, 1)
    patched.cached_patcher_init = (unet, (str(file), False), 0)
    details = model_details(patched)
    assert details["model_file"] == "some model.safetensors"
    assert details["model_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert int(details["patched_weights"]) > 0
    with torch.inference_mode():
        demo = model_details(modules.load_model("general"))
    assert demo["model_file"] == "general"
    assert "model_sha256" not in demo
