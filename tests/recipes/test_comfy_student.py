"""The student's recipe compared with ComfyUI: noise levels, solver and LoRA layout."""

from dataclasses import replace

import comfy.k_diffusion.sampling
import comfy.samplers
import comfy.sd
import pytest
import torch
from torch import nn

from chorus.demo import modules, weights
from chorus.dev.old_world.face_pairs import TEACHER, Generator, Sampling
from chorus.dev.old_world.student import KEPT, SOLVED, Plan, Student
from chorus.dev.recipes.guided import simple
from chorus.dev.recipes.student import LowRank, second_order

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return modules.load_model("general")


@pytest.mark.parametrize("count", [1, 2, KEPT, KEPT * SOLVED])
def test_levels_equal_the_scheduler_of_comfyui(model, count):
    expected = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", count)
    torch.testing.assert_close(simple(count).sigmas, expected, rtol=1e-4, atol=0)


def test_student_steps_are_solver_steps():
    assert torch.equal(simple(KEPT * SOLVED).times[::SOLVED], simple(KEPT).times)


def test_solver_equals_dpmpp_2m_of_comfyui():
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


def test_lora_of_full_rank_is_exact_in_the_span_of_its_down_factor():
    layer = nn.Conv2d(3, 5, 3)
    low_rank = LowRank(layer.weight, 100, torch.Generator().manual_seed(0))
    assert torch.equal(low_rank(layer.weight), layer.weight) and len(low_rank.down) == 5
    target = torch.randn(5, 27)
    with torch.no_grad():
        low_rank.up.copy_(target @ torch.linalg.pinv(low_rank.down))
    # the weight has five rows with 27 values; each is projected onto the span of the rows of down
    change = (low_rank(layer.weight) - layer.weight).flatten(1)
    torch.testing.assert_close(change, target @ torch.linalg.pinv(low_rank.down) @ low_rank.down, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_comfyui_reads_the_lora_with_the_same_weights(model):
    student = Student(Plan(rank=2))
    state = student.state_dict()
    generator = torch.Generator().manual_seed(1)
    for name in state:
        state[name] = torch.randn(state[name].shape, generator=generator) * 0.05
    student.load_state_dict(state)
    patched, _ = comfy.sd.load_lora_for_models(model, None, student.factors.to_lora(), 1.0, 0.0)
    found = {name: patched.patch_weight_to_device(name, return_weight=True) for name in patched.patches}
    assert len(found) == len(student.factors.names) > 50
    unet = student.held[0].unet
    for name in student.factors.names:
        expected = unet.get_submodule(name).weight
        torch.testing.assert_close(found[f"diffusion_model.{name}.weight"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", modules.STUDENTS)
def test_student_checkpoint_equals_the_patched_model(model, name):
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


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("name, steps", [("general-4-steps", 4), ("general-1-step", 1)])
def test_student_is_closer_to_the_full_run_of_the_teacher_than_a_run_of_as_few_steps(name, steps):
    """The teacher's short runs have as many steps as the student: one unguided, one guided with twice the forward passes."""
    own = Sampling(name, steps=steps, cfg=1.0, scheduler="simple")
    prompts = ["a man on blue", "a clown", "a dark girl on pink", "a cat on red fading to white"]
    target = Generator(TEACHER).pictures(prompts, 5)
    few = {
        name: Generator(sampling).pictures(prompts, 5)
        for name, sampling in {
            "student": own,
            "unguided": replace(own, checkpoint="general"),
            "guided": replace(own, checkpoint="general", cfg=4.0),
        }.items()
    }
    apart = {name: float((images - target).square().mean().sqrt()) for name, images in few.items()}
    assert apart["student"] < apart["unguided"] and apart["student"] < apart["guided"], apart


def test_student_starts_from_the_lora_of_another():
    first, second = (Student(Plan(rank=32, generated=steps)) for steps in (4, 2))
    lora = weights.load("student/general-4-steps")
    second.factors.load_state_dict(second.factors.state_of(lora))
    again = second.factors.to_lora()
    assert again.keys() == lora.keys() and all(torch.equal(again[key], lora[key]) for key in lora)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_loss_is_zero_if_the_target_is_the_students_step():
    """The loss is zero if the target is the end of an Euler step with the v that the student predicts."""
    student = Student(Plan(rank=2))
    x, tokens = torch.randn(KEPT, 12, 8, 8), torch.zeros(KEPT, 20, dtype=torch.long)
    step = torch.arange(KEPT)
    now, after = (s.view(-1, 1, 1, 1) for s in (student.sigmas[step], student.sigmas[step + 1]))
    x = x * (1 + now**2).sqrt()
    with torch.no_grad():
        v = student.v(x, step, tokens)
        x0 = x / (1 + now**2) - now * (1 + now**2).rsqrt() * v
        end = x0 + after / now * (x - x0)
        assert float(student(x, end, step, tokens)) < 1e-5
        assert float(student(x, end + 0.1, step, tokens)) > 1e-3
