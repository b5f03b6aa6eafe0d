"""The stages after the training of the denoisers: students, Cas-DM head, face pairs, references, seeds."""

import importlib
import math
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from chorus.demo import denoisers, face_pairs, references, weights
from chorus.demo.autoencoder import Autoencoder
from chorus.demo.concepts import load_concepts
from chorus.demo.text import TextModel, token_rows
from chorus.dev.recipes import (
    cas_dm,
    chain,
    chunks,
    denoiser,
    face_refiner,
    guided,
    loop,
    masked_tokens,
    seeds,
    snapshots,
    state,
    student,
    vq,
)
from chorus.dev.recipes import face_pairs as face_pairs_recipe
from chorus.dev.recipes import references as references_recipe
from chorus.dev.recipes.errors import RecipeError
from chorus.dev.recipes.networks.classifier import ConceptClassifier
from chorus.dev.recipes.networks.flux import Flux
from chorus.dev.recipes.networks.unet import UNet
from chorus.dev.recipes.networks.vision import ImageText
from chorus.techniques.face_refiner.networks.residual import RefinerConfig
from chorus.techniques.face_refiner.training.generators import new_generator
from chorus.techniques.masked_tokens.networks.uvit import UViT, UViTConfig

TECHNIQUES = Path(__file__).parents[2] / "techniques"
SMALL = {**denoisers.GENERAL, "model_channels": 32, "num_res_blocks": [1, 1], "transformer_depth": [0, 1]}
SMALL["transformer_depth_output"] = [0, 0, 1, 1]
CAPTIONS = ["a fox on blue", "a cat left of a tree"]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch, one_thread):
    """Temporary folders for the state and the weights."""
    monkeypatch.setenv(state.VARIABLE, str(tmp_path / "state"))
    monkeypatch.delenv(snapshots.PLAIN, raising=False)
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")
    return tmp_path


@torch.no_grad()
def randomise(module, seed=0):
    """Random weights for all matrices, including those that are initialised to zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.ndim > 1:
            p.copy_(torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
    return module


@pytest.fixture
def model():
    return randomise(denoiser.Model(SMALL, seed=0)).eval().requires_grad_(False)


def inputs(count=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, 8, 8, generator=generator)
    return x, torch.full((count,), 700), torch.randn(count, 20, 96, generator=generator), torch.randn(count, 96)


def test_lora_has_the_same_prediction_as_the_parametrised_student(model):
    base = {k: v.clone() for k, v in model.net.state_dict().items()}
    factors = randomise(student.Factors(model.net, 3, torch.Generator().manual_seed(0)), seed=2)
    lora = factors.to_lora()
    fresh, plain = UNet(SMALL), UNet(SMALL)
    fresh.load_state_dict(weights.with_lora(base, lora))
    plain.load_state_dict(base)
    arguments = inputs()
    expected = model.net(*arguments)
    torch.testing.assert_close(fresh(*arguments), expected, atol=2e-4, rtol=1e-4)
    assert (plain(*arguments) - expected).abs().max() > 0.1


def test_untrained_factors_change_nothing(model):
    arguments = inputs()
    before = model.net(*arguments)
    student.Factors(model.net, 3, torch.Generator().manual_seed(0))
    assert torch.equal(model.net(*arguments), before)


def test_lora_covers_all_layers_in_the_shapes_of_comfyui(model):
    shapes = {k.removesuffix(".weight"): v.shape for k, v in model.net.state_dict().items() if v.ndim > 1}
    lora = student.Factors(model.net, 3, torch.Generator().manual_seed(0)).to_lora()
    assert {k.split(".lora_")[0].removeprefix("diffusion_model.") for k in lora} == set(shapes)
    for name, shape in shapes.items():
        up, down = (lora[f"diffusion_model.{name}.lora_{part}.weight"] for part in ("up", "down"))
        assert up.shape[0] == shape[0] and down.shape[1:] == shape[1:] and up.shape[1] == down.shape[0] == 3
        assert up.ndim == down.ndim == len(shape)


def test_factors_round_trip_through_a_file(model):
    factors = randomise(student.Factors(model.net, 3, torch.Generator().manual_seed(0)), seed=2)
    snapshots.save("student/trial", factors.to_lora(), style="glossy", step=7)
    lora, step = snapshots.load("student/trial")
    found = factors.state_of(lora)
    assert step == 7 and found.keys() == factors.state_dict().keys()
    for name, value in factors.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-3)


def test_simple_levels_equal_comfyui():
    assert guided.simple(4).times.tolist() == [999, 749, 499, 249]
    sigmas = guided.simple(1).sigmas
    assert sigmas[0].item() == pytest.approx(14.6146, abs=1e-3) and sigmas[1] == 0


def test_normal_levels_interpolate_the_logarithm_of_sigma():
    levels, logs = guided.normal(20), np.log(guided.SIGMAS.double().numpy())
    expected = np.exp(np.interp(np.linspace(999, 0, 20), np.arange(1000), logs))
    np.testing.assert_allclose(levels.sigmas[:-1], expected, rtol=1e-4)
    np.testing.assert_array_equal(levels.times, np.abs(np.log(expected)[:, None] - logs).argmin(1))
    assert levels.sigmas[-1] == 0


def test_guidance_extrapolates_from_the_empty_prompt(model):
    x, t, *_ = inputs()
    sigma = guided.SIGMAS[t]
    one, four = guided.Guided(model, 1.0, exact=True), guided.Guided(model, 4.0, exact=True)
    conditional = one.v(x, sigma, t, one.encode(token_rows(CAPTIONS)))
    empty = one.v(x, sigma, t, one.encode(token_rows(["", ""])))
    found = four.v(x, sigma, t, four.encode(token_rows(CAPTIONS)))
    torch.testing.assert_close(found, empty + 4 * (conditional - empty), atol=1e-4, rtol=1e-4)


def test_v_and_x0_are_inverse():
    x, x0, sigma = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4), torch.tensor([0.1, 1.0, 14.0])
    torch.testing.assert_close(guided.x0_of(x, guided.v_of(x, x0, sigma), sigma), x0, atol=1e-4, rtol=1e-4)


class Gaussian:
    """A teacher that is the exact denoiser of normally distributed latents with mean 0.3 and standard deviation 0.5."""

    MEAN, DEVIATION = 0.3, 0.5

    def encode(self, tokens):
        return None

    def x0(self, x, sigma, t, text):
        variance = self.DEVIATION**2
        sigma = sigma.view(-1, 1, 1, 1)
        return (variance * x + sigma**2 * self.MEAN) / (variance + sigma**2)


def test_trajectory_equals_the_solver_of_the_paper():
    """The solver is DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095, here with the paper's alpha, sigma and
    lambda."""
    noise, teacher = torch.randn(1, 8, 2, 2), Gaussian()
    found = student.trajectory(teacher, noise, None).double().numpy()
    bars, count = guided.BARS.double().numpy()[list(student.SOLVED)], len(student.SOLVED)
    alphas, sigmas = np.sqrt(bars), np.sqrt(1 - bars)
    lambdas = np.log(alphas / sigmas)
    # In ComfyUI, x = x0 + s noise, and sampling starts with sqrt(1 + s²) noise. In the paper's x, this is unit noise.
    x, before, expected = noise.double().numpy(), None, []
    for k in range(count):
        if k in (0, 3, 6, 9):
            expected.append(x / alphas[k])
        scaled, level = torch.from_numpy(x / alphas[k]), torch.tensor([sigmas[k] / alphas[k]])
        data = teacher.x0(scaled, level, None, None).numpy()
        if k == count - 1:
            x = data
            break
        h, d = lambdas[k + 1] - lambdas[k], data
        if before is not None:
            r = (lambdas[k] - lambdas[k - 1]) / h
            d = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * before
        x, before = sigmas[k + 1] / sigmas[k] * x - alphas[k + 1] * (math.exp(-h) - 1) * d, data
    np.testing.assert_allclose(found[0], np.concatenate([*expected, x]), atol=1e-4, rtol=1e-3)


def test_trajectory_ends_near_the_exact_solution():
    noise, teacher = torch.randn(1, 8, 8, 8), Gaussian()
    end = student.trajectory(teacher, noise, None)[:, -1]
    exact = teacher.MEAN + teacher.DEVIATION * noise
    assert (end - exact).square().mean().sqrt() < 0.1 * teacher.DEVIATION


@pytest.mark.slow
def test_trajectory_chunks_depend_only_on_their_number(model):
    plan = student.TRAJECTORIES.small()
    made = student.Trajectories(plan, model)
    for number in (3, 4):
        made.make(number, made.compute)
    first, other = made.load(3), made.load(4)
    made.path(3).unlink()
    again = student.Trajectories(plan, model)
    assert again.missing([3, 4]) == [3]
    again.make(3, again.compute)
    found = again.load(3)
    assert found["x"].shape == (2, 5, 8, 16, 16)
    assert torch.equal(found["x"], first["x"]) and torch.equal(found["tokens"], first["tokens"])
    assert not torch.equal(found["x"], other["x"])


def test_each_teacher_has_its_own_folder_of_trajectories(model):
    plan = student.TRAJECTORIES.small()
    before = student.Trajectories(plan, model).folder
    assert student.Trajectories(plan, model).folder == before
    assert student.Trajectories(plan, randomise(model, seed=5)).folder != before


def test_damaged_chunk_is_renamed_and_recomputed():
    store = chunks.Chunks("trial", "key")
    store.make(1, lambda number: {"value": torch.tensor(number)})
    store.path(1).write_bytes(b"damaged")
    with pytest.raises(RecipeError, match="run the stage again"):
        store.load(1)
    store.make(1, lambda number: {"value": torch.tensor(number)})
    assert store.load(1)["value"] == 1


def test_stopped_chunks_resume():
    store, made = chunks.Chunks("trial", "key"), []

    def compute(number):
        made.append(number)
        if made == [0, 1]:
            signal.raise_signal(signal.SIGTERM)
        return {"value": torch.tensor(number)}

    jobs = [(store.path(n).exists, lambda n=n: store.make(n, compute)) for n in range(4)]
    plan = loop.Plan(name="trial", steps=4, batch=1)
    with pytest.raises(loop.Interrupted):
        chunks.make_all(plan, jobs, report=lambda line: None)
    assert state.read_json("trial.json")["step"] == 2
    chunks.make_all(plan, jobs, report=lambda line: None)
    assert made == [0, 1, 2, 3] and state.read_json("trial.json")["step"] == 4


def test_missing_checkpoint_error_names_the_stage_to_run():
    with pytest.raises(RecipeError, match="train-demo general"):
        guided.load()


def test_face_pairs_round_trip_through_their_file(folders):
    source, target = np.random.default_rng(0).integers(0, 256, (2, 16, 128, 128, 3), dtype=np.uint8)
    references_recipe.save_below(face_pairs_recipe.arrange(source, target), folders / face_pairs.FILE, 10**8)
    (folders / face_pairs.PROMPTS).write_text('["a baby"]', encoding="utf-8")
    found = face_pairs.load_face_pairs(folders)
    assert np.array_equal(found[0], source) and np.array_equal(found[1], target) and found[2] == ["a baby"]


def test_face_captions_depend_on_the_chunk_and_shipped_captions_name_one_face():
    plan = face_pairs_recipe.PLAN
    first = face_pairs_recipe.captions(plan, 0)
    assert first == face_pairs_recipe.captions(plan, 0) != face_pairs_recipe.captions(plan, 1)
    relations = re.compile("left of|right of|above|below")
    assert any(map(relations.search, first))
    assert not any(map(relations.search, face_pairs_recipe.captions(plan, plan.shipped_chunks[0])))
    assert len(plan.shipped_chunks) * plan.batch == face_pairs.COUNT


def test_references_round_trip_through_their_file(folders, monkeypatch):
    names = [c.name for c in load_concepts()]
    images = np.arange(len(names) * references.EACH, dtype=np.uint16).astype(np.uint8)
    images = np.broadcast_to(images.reshape(-1, 4, 1, 1, 1), (len(names), 4, 128, 128, 3))
    monkeypatch.setattr(references, "FILE", folders / "references.webp")
    references_recipe.save_below(references_recipe.arrange(images), references.FILE, 10**7)
    found, prompts = references.load_references(names[7], names[2])
    assert found.shape == (8, 128, 128, 3) and prompts[0] != prompts[4]
    expected = np.concatenate([images[7], images[2]]).astype(np.float32) / 255
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_large_image_is_compressed_with_loss(folders):
    noise = np.random.default_rng(0).integers(0, 256, (16, 128, 128, 3), dtype=np.uint8)
    image = face_pairs_recipe.arrange(noise, noise)
    references_recipe.save_below(image, folders / "small.webp", 1_000_000)
    assert (folders / "small.webp").stat().st_size <= 1_000_000
    with pytest.raises(RecipeError, match="expected at most 1,000 bytes"):
        references_recipe.save_below(image, folders / "small.webp", 1_000)


def test_seed_files_are_for_the_concepts_recognised_least_often():
    chunk = lambda scores, right: {"probabilities": torch.tensor(scores), "right": torch.tensor(right)}  # noqa: E731
    found = {
        1: chunk([0.1, 0.2, 0.1], [False, True, True]),
        2: chunk([0.0, 0.9, 0.0], [False, True, False]),
        3: chunk([0.8, 0.9, 0.9], [True, True, True]),
        4: chunk([0.0, 0.9, 0.0], [False, False, False]),  # not recognised in the image of the best noise
    }
    assert seeds.choose(found, 3) == [2, 1, 3]


def test_noise_of_a_seed_equals_comfyui():
    generator = torch.manual_seed(1003)
    assert torch.equal(seeds.noise(1003), torch.randn(1, 8, 16, 16, generator=generator))


def test_file_formats_match_those_of_the_adapters():
    """The names are searched in the adapters' source, because importing the adapters requires ComfyUI."""
    refiner = importlib.import_module("chorus.dev.recipes.face_refiner")
    for name, folder in ((seeds.FORMAT, "seed_select"), (refiner.FORMAT, "face_refiner")):
        assert f'FORMAT = "{name}"' in (TECHNIQUES / folder / "comfy_files.py").read_text(encoding="utf-8")


def test_images_are_converted_on_access():
    refiner = importlib.import_module("chorus.dev.recipes.face_refiner")
    pixels = torch.randint(0, 256, (3, 8, 6, 3), dtype=torch.uint8)
    images = refiner.Images(pixels)
    assert len(images) == 3 and images[1].shape == (3, 8, 6)
    assert torch.equal((images[2] * 255).round().byte(), pixels[2].movedim(-1, 0))


@pytest.mark.parametrize("stage", chain.STAGES, ids=[stage.name for stage in chain.STAGES])
def test_stage_has_the_interface_of_the_chain(stage):
    names = [plan.name for plan in stage.plans]
    assert len(set(names)) == len(names) and sum(plan.hours for plan in stage.plans) > 0
    assert stage.done() in (True, False)
    assert all(plan.small().steps <= 5 for plan in stage.plans)
    module = stage.load()
    assert callable(module.run if not stage.plan else module.Task)


def test_all_weights_fit_into_35_megabytes():
    general = UNet(denoisers.GENERAL)
    generator = torch.Generator().manual_seed(0)
    networks = [Autoencoder(), general, UNet(denoisers.ANIMALS), Flux(denoisers.FOOD), TextModel(), ImageText()]
    networks += [ConceptClassifier(), vq.make_vq(), UViT(UViTConfig(**masked_tokens.CONFIG))]
    networks += [
        cas_dm.new(cas_dm.PLAN).network(),
        new_generator(RefinerConfig(widths=face_refiner.PLAN.widths), generator),
    ]
    loras = [student.Factors(general, plan.rank, generator) for plan in student.STUDENTS if plan.snapshot][:1] * 2
    values = sum(p.numel() for network in networks + loras for p in network.parameters())
    values -= sum(p.numel() for p in loras[0].parameters())  # the network of general also has the factors as parameters
    assert 30e6 < 2 * values <= 35e6, values
