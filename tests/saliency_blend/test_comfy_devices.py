"""An expert on another device than the base works beside it, in a thread; otherwise nothing differs.

The CPU stands in for the other device: as a device, "cpu:0" is not "cpu".
"""

import contextlib
import threading
import time

import comfy.model_management
import comfy.samplers
import pytest
import torch

from chorus.tests.support.tiny_models import blend, conditioning, in_inference_mode, ksample, latent, unet

WORDS, EXPERT_WORDS, OTHER_WORDS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30, 50)]
STEPS = 3


def moved(model):
    """``model`` as the host hands it out for a further device."""
    out = model.clone()
    out.load_device = torch.device("cpu", 0)
    return out


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def sample(model, **sampling):
    return ksample(model, *WORDS, latent(2, 8, 10), **{"steps": STEPS, **sampling})


def blended(models, **inputs):
    return blend(models[0], moved(models[1]), *EXPERT_WORDS, **inputs)[0]


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


def check_nothing_is_left(models):
    assert [m.model.current_patcher for m in models] == [None] * len(models)
    assert threads() == []


def test_base_and_expert_are_in_flight_at_once_and_give_the_same_bits(models):
    expected = sample(blend(*models, *EXPERT_WORDS)[0])
    meeting, met = threading.Barrier(2, timeout=20), []

    def meet():
        met.append(meeting.wait())  # raises where the other does not come

    with during_forwards(models[0], meet), during_forwards(models[1], meet):
        got = sample(blended(models))
    assert len(met) == 2 * STEPS
    assert torch.equal(got, expected)
    check_nothing_is_left(models)


@pytest.mark.parametrize(
    ("inputs", "sampling"),
    [
        (dict(refresh=2, mask_mode="soft"), {}),
        (dict(region=torch.ones(1, 4, 5).triu(), region_mode="force", crop_margin=1), dict(sampler="heun")),
        ({}, dict(cfg=1.0)),
    ],
)
def test_another_device_changes_no_bits(models, inputs, sampling):
    expected = sample(blend(*models, *EXPERT_WORDS, **inputs)[0], **sampling)
    assert torch.equal(sample(blended(models, **inputs), **sampling), expected)


@pytest.mark.parametrize("error", [KeyError("in the expert"), comfy.model_management.InterruptProcessingException()])
@pytest.mark.parametrize("at", [1, 2])
def test_what_an_expert_raises_reaches_the_caller(models, error, at):
    model = blended(models)
    expected, count = sample(model), []

    def fail():
        count.append(1)
        if len(count) == at:
            raise error

    with during_forwards(models[1], fail), pytest.raises(type(error)) as caught:
        sample(model)
    assert caught.value is error
    check_nothing_is_left(models)
    assert torch.equal(sample(model), expected)


def test_when_the_base_fails_the_expert_is_waited_for(models):
    """Not only at the end of the run: a sampler may live on after a prediction that failed."""
    began, at_work, left_at_work = threading.Event(), [], []

    def work():
        began.set()
        at_work.append(1)
        time.sleep(0.3)

    def fail():
        assert began.wait(20)
        raise MemoryError("in the base")

    def ask(network, noise, sigmas, extra_args, callback, disable):
        with pytest.raises(MemoryError, match="in the base"):
            network(noise, sigmas[:1].expand(len(noise)), **extra_args)
        left_at_work.append(len(at_work))
        return noise

    @in_inference_mode
    def sample_once():
        guider = comfy.samplers.CFGGuider(blended(models))
        guider.set_conds(*WORDS)
        zeros = torch.zeros(1, 4, 8, 8)
        guider.sample(zeros, zeros, comfy.samplers.KSAMPLER(ask), torch.tensor([5.0, 0.0]), seed=0)

    done = models[1].model.diffusion_model.register_forward_hook(lambda *_: at_work.pop() and None)
    try:
        with during_forwards(models[0], fail), during_forwards(models[1], work):
            sample_once()
    finally:
        done.remove()
    assert left_at_work == [0]
    check_nothing_is_left(models)


def thread_state(model, run):
    """Thread name, inference mode and gradient mode of the forward passes of ``model`` while ``run()`` runs."""
    seen = []

    def look():
        seen.append((threading.current_thread().name, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    with during_forwards(model, look):
        run()
    return seen


def test_the_thread_has_the_inference_mode_of_the_caller(models):
    assert thread_state(models[1], lambda: sample(blended(models))) == [("chorus cpu:0_0", True, False)] * STEPS


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_keep_the_expert_in_the_thread_that_records_them(grad):
    """And where neither inference mode nor gradients are on, the thread records none."""
    base, expert = (unet.__wrapped__(seed) for seed in range(2))
    words, expert_words = ([conditioning.__wrapped__(i) for i in pair] for pair in ((10, 11), (30, 31)))
    model = blend.__wrapped__(base, moved(expert), *expert_words)[0]

    def ask(network, noise, sigmas, extra_args, callback, disable):
        network(noise, sigmas[:1], **extra_args)
        return noise

    def run():
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(*words)
            zeros = torch.zeros(1, 4, 8, 8)
            guider.sample(zeros, zeros, comfy.samplers.KSAMPLER(ask), torch.tensor([5.0, 0.0]), seed=0)

    name = threading.current_thread().name if grad else "chorus cpu:0_0"
    assert thread_state(expert, run) == [(name, False, grad)]
    assert threads() == []


def test_two_experts_on_one_device_are_asked_one_after_the_other(models):
    second = unet(2)
    chained = blend(blended(models), moved(second), *OTHER_WORDS)[0]
    in_flight, most, names = [], [], set()

    def enter():
        names.add(threading.current_thread().name)
        in_flight.append(1)
        most.append(len(in_flight))
        time.sleep(0.02)

    leave = [
        m.model.diffusion_model.register_forward_hook(lambda *_: in_flight.pop() and None) for m in (models[1], second)
    ]
    try:
        with during_forwards(models[1], enter), during_forwards(second, enter):
            got = sample(chained)
    finally:
        for handle in leave:
            handle.remove()
    assert most == [1] * (2 * STEPS)
    assert names == {"chorus cpu:0_0"}
    assert torch.equal(got, sample(blend(blend(*models, *EXPERT_WORDS)[0], second, *OTHER_WORDS)[0]))
    check_nothing_is_left([*models, second])
