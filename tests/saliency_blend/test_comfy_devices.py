"""An expert on another device than the base runs concurrently, in a worker thread, with the same results.

The CPU serves as the second device, since the devices "cpu:0" and "cpu" differ.
"""

import contextlib
import threading
import time

import comfy.model_management
import comfy.samplers
import pytest
import torch

from chorus.tests.support.tiny_models import blend, conditioning, in_inference_mode, ksample, latent, unet

PROMPTS, EXPERT_PROMPTS, OTHER_PROMPTS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30, 50)]
STEPS = 3


def on_second_device(model):
    """A clone of ``model`` that loads on a second device."""
    out = model.clone()
    out.load_device = torch.device("cpu", 0)
    return out


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def sample(model, **sampling):
    return ksample(model, *PROMPTS, latent(2, 8, 10), **{"steps": STEPS, **sampling})


def blended(models, **inputs):
    return blend(models[0], on_second_device(models[1]), *EXPERT_PROMPTS, **inputs)[0]


@contextlib.contextmanager
def during_forwards(model, function):
    """Calls ``function()`` at the start of every forward pass through the network of ``model``."""
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: function())
    try:
        yield
    finally:
        handle.remove()


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("chorus")]


def check_cleaned_up(models):
    assert [m.model.current_patcher for m in models] == [None] * len(models)
    assert threads() == []


def test_base_and_expert_run_concurrently_with_the_same_bits(models):
    expected = sample(blend(*models, *EXPERT_PROMPTS)[0])
    barrier, arrivals = threading.Barrier(2, timeout=20), []

    def wait_for_other():
        arrivals.append(barrier.wait())  # raises if the other model does not run at the same time

    with during_forwards(models[0], wait_for_other), during_forwards(models[1], wait_for_other):
        got = sample(blended(models))
    assert len(arrivals) == 2 * STEPS
    assert torch.equal(got, expected)
    check_cleaned_up(models)


@pytest.mark.parametrize(
    ("inputs", "sampling"),
    [
        (dict(refresh=2, mask_mode="soft"), {}),
        (dict(region=torch.ones(1, 4, 5).triu(), region_mode="force", crop_margin=1), dict(sampler="heun")),
        ({}, dict(cfg=1.0)),
    ],
)
def test_second_device_changes_no_bits(models, inputs, sampling):
    expected = sample(blend(*models, *EXPERT_PROMPTS, **inputs)[0], **sampling)
    assert torch.equal(sample(blended(models, **inputs), **sampling), expected)


@pytest.mark.parametrize("error", [KeyError("in the expert"), comfy.model_management.InterruptProcessingException()])
@pytest.mark.parametrize("at", [1, 2])
def test_exception_of_an_expert_reaches_the_caller(models, error, at):
    model = blended(models)
    expected, count = sample(model), []

    def fail():
        count.append(1)
        if len(count) == at:
            raise error

    with during_forwards(models[1], fail), pytest.raises(type(error)) as caught:
        sample(model)
    assert caught.value is error
    check_cleaned_up(models)
    assert torch.equal(sample(model), expected)


def test_failure_of_the_base_waits_for_the_expert(models):
    """The blend waits before it raises the error, because a sampler may catch the error and continue."""
    started, running, still_running = threading.Event(), [], []

    def work():
        started.set()
        running.append(1)
        time.sleep(0.3)

    def fail():
        assert started.wait(20)
        raise MemoryError("in the base")

    def predict_once(network, noise, sigmas, extra_args, callback, disable):
        with pytest.raises(MemoryError, match="in the base"):
            network(noise, sigmas[:1].expand(len(noise)), **extra_args)
        still_running.append(len(running))
        return noise

    @in_inference_mode
    def sample_once():
        guider = comfy.samplers.CFGGuider(blended(models))
        guider.set_conds(*PROMPTS)
        zeros = torch.zeros(1, 4, 8, 8)
        guider.sample(zeros, zeros, comfy.samplers.KSAMPLER(predict_once), torch.tensor([5.0, 0.0]), seed=0)

    done = models[1].model.diffusion_model.register_forward_hook(lambda *_: running.pop() and None)
    try:
        with during_forwards(models[0], fail), during_forwards(models[1], work):
            sample_once()
    finally:
        done.remove()
    assert still_running == [0]
    check_cleaned_up(models)


def thread_state(model, run):
    """Thread name, inference mode and gradient mode of the forward passes of ``model`` while ``run()`` runs."""
    seen = []

    def record():
        seen.append((threading.current_thread().name, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    with during_forwards(model, record):
        run()
    return seen


def test_worker_thread_has_the_inference_mode_of_the_caller(models):
    assert thread_state(models[1], lambda: sample(blended(models))) == [("chorus cpu:0_0", True, False)] * STEPS


@pytest.mark.parametrize("grad", [True, False])
def test_expert_runs_in_the_callers_thread_if_gradients_are_recorded(grad):
    """With ``grad`` False, the expert runs in a worker thread, which records no gradients either."""
    base, expert = (unet.__wrapped__(seed) for seed in range(2))
    prompts, expert_prompts = ([conditioning.__wrapped__(i) for i in pair] for pair in ((10, 11), (30, 31)))
    model = blend.__wrapped__(base, on_second_device(expert), *expert_prompts)[0]

    def predict_once(network, noise, sigmas, extra_args, callback, disable):
        network(noise, sigmas[:1], **extra_args)
        return noise

    def run():
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(*prompts)
            zeros = torch.zeros(1, 4, 8, 8)
            guider.sample(zeros, zeros, comfy.samplers.KSAMPLER(predict_once), torch.tensor([5.0, 0.0]), seed=0)

    name = threading.current_thread().name if grad else "chorus cpu:0_0"
    assert thread_state(expert, run) == [(name, False, grad)]
    assert threads() == []


def test_experts_on_one_device_run_one_after_the_other(models):
    second = unet(2)
    chained = blend(blended(models), on_second_device(second), *OTHER_PROMPTS)[0]
    running, counts, names = [], [], set()

    def enter():
        names.add(threading.current_thread().name)
        running.append(1)
        counts.append(len(running))
        time.sleep(0.02)

    leave = [
        m.model.diffusion_model.register_forward_hook(lambda *_: running.pop() and None) for m in (models[1], second)
    ]
    try:
        with during_forwards(models[1], enter), during_forwards(second, enter):
            got = sample(chained)
    finally:
        for handle in leave:
            handle.remove()
    assert counts == [1] * (2 * STEPS)
    assert names == {"chorus cpu:0_0"}
    assert torch.equal(got, sample(blend(blend(*models, *EXPERT_PROMPTS)[0], second, *OTHER_PROMPTS)[0]))
    check_cleaned_up([*models, second])
