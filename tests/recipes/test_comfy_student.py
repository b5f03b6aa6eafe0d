"""The parts of the student's recipe that must agree with the host: its levels, the teacher's solver, and the LoRA's layout."""

from dataclasses import replace

import comfy.k_diffusion.sampling
import comfy.samplers
import comfy.sd
import pytest
import torch
from torch import nn

from chorus.demo import modules, weights
from chorus.dev.first_recipes.cas_dm import Guided
from chorus.dev.first_recipes.face_pairs import TEACHER, Painter, Sampling
from chorus.dev.first_recipes.student import KEPT, SOLVED, LowRank, Plan, Student, levels, second_order

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return modules.load_model("general")


@pytest.mark.parametrize("count", [1, 2, KEPT, KEPT * SOLVED])
def test_levels_are_those_of_the_hosts_scheduler(model, count):
    expected = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", count)
    torch.testing.assert_close(Guided(1.0).sigmas(levels(count)), expected[:-1], rtol=1e-4, atol=0)


def test_the_students_steps_are_among_the_solvers():
    assert torch.equal(levels(KEPT * SOLVED)[::SOLVED], levels(KEPT))


def test_solver_is_the_hosts():
    def denoise(x, sigma, **_):
        return torch.tanh(x / (1 + torch.as_tensor(sigma).view(-1, 1, 1, 1)))

    sigmas = torch.tensor([14.6, 6.0, 2.5, 1.0, 0.3, 0.0])
    x = torch.randn(2, 3, 4, 4) * sigmas[0]
    expected = comfy.k_diffusion.sampling.sample_dpmpp_2m(denoise, x, sigmas, disable=True)
    before = None
    for now, after in zip(sigmas.tolist(), sigmas.tolist()[1:]):
        x0 = denoise(x, now)
        x, before = second_order(x, x0, before, now, after), (x0, now)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


def test_a_lora_of_full_rank_reaches_any_weight():
    layer = nn.Conv2d(3, 5, 3)
    low_rank = LowRank(layer.weight, 100, torch.Generator().manual_seed(0))
    assert torch.equal(low_rank(layer.weight), layer.weight) and low_rank.rank == 5
    wanted = torch.randn(5, 27)
    with torch.no_grad():
        low_rank.up.copy_(wanted @ torch.linalg.pinv(low_rank.down))
    # five rows of a 27-dimensional weight: what lies in the span of down
    reached = (low_rank(layer.weight) - layer.weight).flatten(1)
    torch.testing.assert_close(reached, wanted @ torch.linalg.pinv(low_rank.down) @ low_rank.down, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_host_reads_the_lora_as_the_student_has_it(model):
    student = Student(Plan(rank=2))
    state = student.state_dict()
    generator = torch.Generator().manual_seed(1)
    for name in state:
        state[name] = torch.randn(state[name].shape, generator=generator) * 0.05
    student.load_state_dict(state)
    patched, _ = comfy.sd.load_lora_for_models(model, None, student.lora(state), 1.0, 0.0)
    found = {name: patched.patch_weight_to_device(name, return_weight=True) for name in patched.patches}
    assert len(found) == len(student.names) > 50
    unet = student.held[0].unet
    for name in student.names:
        expected = unet.get_submodule(name).weight
        torch.testing.assert_close(found[f"diffusion_model.{name}.weight"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", modules.STUDENTS)
def test_a_students_checkpoint_is_what_the_host_makes_of_its_lora(model, name):
    base, file = modules.STUDENTS[name]
    assert base == "general"
    patched, _ = comfy.sd.load_lora_for_models(model, None, weights.load(file), 1.0, 0.0)
    student = modules.load_model(name).model.state_dict()
    plain = model.model.state_dict()
    assert len(patched.patches) > 50
    for name, weight in plain.items():
        if name not in patched.patches:
            assert torch.equal(student[name], weight), name
            continue
        expected = patched.patch_weight_to_device(name, return_weight=True)
        torch.testing.assert_close(student[name], expected, rtol=1e-4, atol=1e-4)
        assert not torch.equal(student[name], weight), name


@torch.inference_mode()
@pytest.mark.parametrize("name, steps", [("general-4-steps", 4), ("general-1-step", 1)])
def test_a_student_is_nearer_to_the_teachers_picture(name, steps):
    """Than the teacher itself is in as many steps, with as many evaluations and with twice as many."""
    own = Sampling(name, steps=steps, cfg=1.0, scheduler="simple")
    words = ["a man on blue", "a clown", "a dark girl on pink", "a cat on red fading to white"]
    target = Painter(TEACHER).paint(words, 5)
    few = {
        name: Painter(sampling).paint(words, 5)
        for name, sampling in {
            "student": own,
            "unguided": replace(own, checkpoint="general"),
            "guided": replace(own, checkpoint="general", cfg=4.0),
        }.items()
    }
    apart = {name: float((pictures - target).square().mean().sqrt()) for name, pictures in few.items()}
    assert apart["student"] < apart["unguided"] and apart["student"] < apart["guided"], apart


def test_a_student_begins_as_another_one():
    first, second = (Student(Plan(rank=32, painted=painted)) for painted in (4, 2))
    lora = weights.load("student/general-4-steps")
    second.begin_with(lora)
    again = second.lora(second.state_dict())
    assert again.keys() == lora.keys() and all(torch.equal(again[key], lora[key]) for key in lora)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_landing_exactly_is_no_loss():
    """Where Euler with the student's own v lands, there is nothing to learn."""
    student = Student(Plan(rank=2))
    x, tokens = torch.randn(KEPT, 12, 8, 8), torch.zeros(KEPT, 20, dtype=torch.long)
    step = torch.arange(KEPT)
    now, after = (s.view(-1, 1, 1, 1) for s in (student.sigmas[step], student.sigmas[step + 1]))
    x = x * (1 + now**2).sqrt()
    with torch.no_grad():
        v = student.v(x, step, tokens)
        x0 = x / (1 + now**2) - now * (1 + now**2).rsqrt() * v
        landing = x0 + after / now * (x - x0)
        assert float(student(x, landing, step, tokens)) < 1e-5
        assert float(student(x, landing + 0.1, step, tokens)) > 1e-3
