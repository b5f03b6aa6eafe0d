"""The Triton kernels compared with the definition in float64: both launch paths, on the GPU or in Triton's interpreter.

Registers, spills and load widths are tested by compiling. This needs no GPU, because Triton includes an assembler.
"""

import importlib.util
import inspect
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from chorus.kernels import saliency_blend as package
from chorus.kernels.saliency_blend import fused_torch, reference, saliency_blend
from chorus.tests.support.blend_cases import (
    CASES,
    DEFAULTS,
    Exact,
    case_id,
    errors,
    random_predictions,
    regions,
    settings,
)
from chorus.tests.support.blend_definition import definition
from chorus.tests.support.tiers import covering, quick

pytest.importorskip("triton", reason="Triton is not in this build of torch")
from chorus.kernels.saliency_blend import fused

ROOT = Path(__file__).parents[2]
INF = float("inf")


@pytest.fixture(params=["one launch", "three launches"])
def launches(request, monkeypatch):
    if request.param == "three launches":
        monkeypatch.setattr(fused, "ONE_PROGRAM", 0)
    return request.param


@pytest.fixture(autouse=True)
def fill_empty(monkeypatch):
    """Fill torch.empty with NaN or 255, so that a test fails if an element is never written or is read too early."""
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", filled)


def run(
    cond, uncond, sigma=None, *, strength=None, bias=None, region=None, gain=None, blur=4, shared=False, softness=None,
    **further,
):  # fmt: skip
    models = len(cond)
    sigma = torch.ones(len(cond[0]), device=cond[0].device) if sigma is None else sigma
    zeros, ones, none = [0.0] * models, [1.0] * models, [None] * models
    arguments = (cond, uncond, sigma, strength or ones, bias or zeros, region or none, gain or ones)
    return saliency_blend(*arguments, blur=blur, shared=shared, softness=softness, backend="triton", **further)


def check(cond, uncond, sigma, *, strength, bias, region, gain, shared, softness, **options):
    """Compare the weights, both predictions, the scores and the spread of ``run`` with the definition.

    ``options``: those that have the same name in the kernel and in the definition.
    """
    options["softness"] = softness
    out = run(cond, uncond, sigma, strength=strength, bias=bias, region=region, gain=gain, shared=shared, **options)
    models, shape = len(cond), cond[0].shape
    positions = (shape[0], *shape[2:])
    assert out.cond.dtype == out.uncond.dtype == cond[0].dtype
    assert out.cond.shape == out.uncond.shape == shape
    if softness is None:
        assert out.weights.dtype == torch.uint8 and out.weights.shape == positions
    else:
        assert out.weights.dtype == torch.float32 and out.weights.shape == (models, *positions)
    frames = [[reference.fold_frames(t).double().cpu() for t in side] for side in (cond, uncond)]  # [B T, C, H, W]
    sigmas = sigma.cpu().repeat_interleave(len(frames[0][0]) // len(sigma))
    extra = [
        b + (torch.zeros(positions) if r is None else r.double().cpu().expand(positions)).reshape(-1, *shape[-2:])
        for b, r in zip(bias, region)
    ]
    expected = definition(
        type("Call", (), {"x": torch.zeros_like(frames[0][0]), "sigma": sigmas}),
        list(zip(*frames, strict=True)),
        strengths=strength,
        guidance=[1.0] * models,
        saliency="shared" if shared else "own",
        extra=np.stack([e.numpy() for e in extra]),
        **options,
    )
    assert expected.certain.mean() > 0.99
    arrays = (expected.weights, expected.scores, expected.spread, expected.certain)
    exact = Exact(*map(torch.from_numpy, arrays), expected.weight_bound, expected.rounding)
    assert out.partition.shape == out.spread.shape == (models, len(exact.certain))
    assert out.logits.shape == (models, *positions)
    found = errors(out, exact, cond, uncond, gain)
    assert not {part: pair for part, pair in found.items() if not pair[0] <= pair[1]}


def check_random(models, shape, dtype, device, **options):
    if dtype is torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    options = {**DEFAULTS, **options}
    check(*random_predictions(models, shape, dtype, device), **settings(models, shape, device), **options)


@pytest.mark.slow
def test_scores_of_a_large_sigma_match_the_definition(launches, device):
    """A model with zero terminal SNR begins at such a σ, where scores differ by 1e-5 or less."""
    cond, uncond, _ = random_predictions(3, (1, 4, 32, 40), torch.float32, device)
    rest = dict(strength=[1.0, 0.9, 0.8], bias=[0.0] * 3, region=[None] * 3, gain=[1.0] * 3)
    for softness in (None, 1.0):
        sigma = torch.full((1,), 4518.763671875, device=device)
        check(cond, uncond, sigma, **rest, blur=4, shared=False, softness=softness)


# Triton's interpreter takes a second per case
@pytest.mark.parametrize("case", quick([case for case in CASES if case.quick], CASES), ids=case_id)
def test_matches_the_definition(launches, case, device):
    models, shape, dtype, options, _ = case
    check_random(models, shape, dtype, device, **options)


@pytest.mark.parametrize("blur", quick([3, 8], [1, 2, 3, 5, 8, 64]))
def test_blur_matches_the_definition(launches, blur, device):
    """Up to blur 8, the 37 x 55 positions make two tiles along each axis. The box of blur 64 exceeds the latent."""
    shape = (1, 1, 37, 55)
    check_random(2, shape, torch.float32, device, blur=blur)


@pytest.mark.slow
@pytest.mark.parametrize("blur", [20, 64])
def test_wide_blur_over_several_tiles(monkeypatch, blur, device):
    monkeypatch.setattr(fused, "ONE_PROGRAM", 0)
    check_random(2, (1, 1, 40, 70), torch.float32, device, blur=blur)


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (2, 9), (3, 3)], ids=str)
def test_latent_smaller_than_the_blur_matches_the_reference(size, device):
    """The kernel averages over the whole latent. The reference covers this case; the float64 definition does not."""
    cond, uncond, sigma = random_predictions(2, (1, 4, *size), torch.float32, device)
    rest = ([1.0] * 2, [0.0] * 2, [None] * 2, [1.0] * 2)
    exact = reference.saliency_blend(cond, uncond, sigma, *rest, blur=12, shared=False, softness=1.0)
    for got, expected in zip(run(cond, uncond, sigma, blur=12, softness=1.0), exact):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("softness", [None, 1.0])
def test_single_model_owns_everything(launches, softness, device):
    cond, uncond, sigma = random_predictions(1, (1, 1, 5, 7), torch.float16, device)
    out = run(cond, uncond, sigma, softness=softness)
    assert torch.equal(out.cond, cond[0]) and torch.equal(out.uncond, uncond[0])
    assert (out.weights == (0 if softness is None else 1)).all()


@pytest.mark.parametrize("dtype", quick([torch.float16], [torch.float32, torch.float16]), ids=str)
def test_hard_mask_keeps_every_bit_of_the_predictions(launches, dtype, device):
    cond, uncond, sigma = random_predictions(3, (2, 4, 9, 10), dtype, device)
    out = run(cond, uncond, sigma)
    owner = out.weights.long()
    assert owner.unique().tolist() == [0, 1, 2]
    for got, choices in ((out.cond, cond), (out.uncond, uncond)):
        assert torch.equal(got, torch.stack(choices).gather(0, owner[None, :, None].expand(1, -1, 4, -1, -1))[0])


@pytest.mark.parametrize("softness", quick([None], [None, 1.0]))
def test_strided_inputs_are_accepted_and_unchanged(launches, softness, device):
    cond, uncond, sigma = random_predictions(2, (2, 4, 9, 8), torch.float32, device)
    strided = [[t.transpose(2, 3).contiguous().transpose(2, 3) for t in side] for side in (cond, uncond)]
    before = [[t.clone() for t in side] for side in strided]
    for got, expected in zip(run(*strided, sigma, softness=softness), run(cond, uncond, sigma, softness=softness)):
        assert torch.equal(got, expected)
    assert all(torch.equal(t, b) for side, old in zip(strided, before) for t, b in zip(side, old))


@pytest.mark.slow
def test_samples_of_a_batch_are_independent(launches, device):
    cond, uncond, sigma = random_predictions(2, (3, 4, 9, 8), torch.float32, device)
    together = run(cond, uncond, sigma)
    for i in (0, 2):
        alone = run(*[[t[i : i + 1] for t in side] for side in (cond, uncond)], sigma[i : i + 1])
        for whole, part, axis in zip(together, alone, (0, 0, 0, 1, 1, 1), strict=True):
            assert torch.equal(whole.narrow(axis, i, 1), part)


@pytest.mark.slow
def test_ties_go_to_the_base_then_to_chain_order(launches, device):
    cond, uncond, _ = random_predictions(1, (1, 4, 9, 8), torch.float32, device)
    assert (run(cond * 3, uncond * 3).weights == 0).all()
    assert (run(cond * 3, uncond * 3, bias=[0.0, 1.0, 1.0]).weights == 0).all()  # the spread of equal models is 0
    cond, uncond, _ = random_predictions(2, (1, 4, 9, 8), torch.float32, device)
    twice = [[*side, side[1]] for side in (cond, uncond)]
    assert (run(*twice, bias=[0.0, 100.0, 100.0]).weights == 1).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_infinite_regions_force_or_bar_an_expert(launches, device):
    cond, uncond, _ = random_predictions(4, (1, 4, 6, 6), torch.float32, device)
    forced = torch.full((1, 6, 6), -INF, device=device)
    forced[:, :3] = INF
    barred, both = torch.full((), -INF, device=device), [None, forced, None, forced]
    owner = run(cond, uncond, region=[None, forced, barred, barred]).weights
    assert (owner[:, :3] == 1).all() and (owner[:, 3:] == 0).all()
    assert (run(cond, uncond, region=both).weights[:, :3] == 1).all()  # the first forced expert wins
    soft = run(cond, uncond, region=both, softness=1.0).weights
    assert (soft[:, :, :3] == torch.tensor([0.0, 0.5, 0.0, 0.5], device=device).reshape(4, 1, 1, 1)).all()
    assert not soft[1::2, :, 3:].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", quick([INF], [float("nan"), INF]))
@covering(shared={"own": False, "shared": True}, side={"cond": 0, "uncond": 1})
def test_partition_is_non_finite_where_a_prediction_is(launches, shared, side, value, device):
    cond, uncond, sigma = random_predictions(2, (2, 1, 6, 5), torch.float32, device)
    (cond, uncond)[side][1][1, 0, 3, 4] = value
    finite = torch.isfinite(run(cond, uncond, sigma, shared=shared).partition)
    assert finite.tolist() == [[True, True], [True, False]]


def by_fused_torch(cond, uncond, sigma):
    models = len(cond)
    rest = ([1.0] * models, [0.0] * models, [None] * models, [1.0] * models)
    return fused_torch.saliency_blend(cond, uncond, sigma, *rest, blur=4, shared=False, softness=None)


@pytest.mark.slow
@pytest.mark.parametrize("softness", [None, 0.5])
def test_memory_and_quota_match_the_reference(launches, softness, device):
    cond, uncond, sigma = random_predictions(4, (2, 4, 3, 9, 8), torch.float32, device)
    bias, region = [0.0, 0.5, 0.0, -0.2], [None, None, *regions(3, cond[0].shape, device)[1:]]
    memory = [torch.randn(2, 3, 9, 8).abs().to(device) for _ in range(3)] + [None]
    rest = ([1.0] * 4, bias, region, [1.0] * 4)
    counts = [None, 11, torch.tensor([0, 5, 72, 80, 1, 30], device=device), None]
    for options in ({"memory": memory, "momentum": 0.7}, {"quota": counts}, {"quota": counts, "memory": memory}):
        exact = reference.saliency_blend(
            *([t.cpu() for t in side] for side in (cond, uncond)), sigma.cpu(), *rest[:2],
            [r if r is None else r.cpu() for r in region], rest[3], blur=4, shared=False, softness=softness,
            **{k: v if k == "momentum" else [t.cpu() if torch.is_tensor(t) else t for t in v] for k, v in options.items()},
        )  # fmt: skip
        out = run(
            cond, uncond, sigma, strength=rest[0], bias=bias, region=region, gain=rest[3], softness=softness, **options
        )
        weights = out.weights if softness else torch.stack([out.weights == n for n in range(4)])
        for got, expected in zip(out._replace(weights=weights.float()), exact, strict=True):
            torch.testing.assert_close(got.cpu(), expected, atol=2e-4, rtol=1e-4)


def test_implementations_take_the_same_arguments():
    signatures = [inspect.signature(m.saliency_blend).parameters for m in (reference, fused_torch, fused)]
    assert len({tuple(map(str, s.values())) for s in signatures}) == 1
    public = inspect.signature(saliency_blend).parameters
    assert [(p.name, p.kind) for p in public.values()][:-1] == [(p.name, p.kind) for p in signatures[0].values()]


class FakeKernel:
    """A kernel that records its launches and runs nothing."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("softness", [None, 1.0])
@pytest.mark.parametrize(("side", "count"), [(64, 1), (72, 3)])
def test_few_launches_without_device_sync(monkeypatch, side, count, softness, device):
    """Reading a value would wait for the device. Fake tensors hold no values, so that reading one fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernel = FakeKernel()
    for name in ("_saliency_blend_kernel", "_saliency_kernel", "_lead_kernel", "_select_kernel"):
        monkeypatch.setattr(fused, name, kernel)
    with FakeTensorMode():
        cond, uncond, sigma = random_predictions(3, (2, 4, 3, side, side), torch.float32, device)
        run(cond, uncond, sigma, region=regions(3, cond[0].shape, device), softness=softness)
    assert len(kernel.grids) == count


def op_arguments(device, **options):
    """(arguments, keyword arguments) of the operator."""
    predictions = random_predictions(2, (2, 4, 3, 9, 8), torch.float16, device)
    given = {
        "quota": [None, torch.full((6,), 20, device=device)],
        "memory": [None, torch.ones(2, 3, 9, 8, device=device)],
        "momentum": 0.5,
        **DEFAULTS,
        **options,
    }
    return (*predictions, [1.0] * 2, [0.0] * 2, [None, torch.zeros(8, device=device)], [1.0] * 2), given


@pytest.mark.slow
@pytest.mark.parametrize("softness", [None, 1.0])
def test_operator_matches_its_schema(softness, device):
    torch.library.opcheck(
        torch.ops.chorus.saliency_blend.default,
        *op_arguments(device, softness=softness),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.slow
def test_compiles_without_graph_breaks(device):
    cond, uncond, sigma = random_predictions(2, (1, 4, 9, 8), torch.float32, device)

    def step(scale):
        out = run([c * scale for c in cond], uncond, sigma, bias=[0.0, 0.1])
        return out.cond + 1.0, out.weights

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(torch.tensor(2.0, device=device)), step(torch.tensor(2.0, device=device))):
        assert torch.equal(got, expected)


def test_module_can_be_imported_under_a_second_name():
    spec = importlib.util.spec_from_file_location("chorus.kernels.saliency_blend.again", fused.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.saliency_blend is not fused.saliency_blend
    assert torch.ops.chorus.saliency_blend.default


@pytest.fixture
def fake_gpu(monkeypatch):
    """Choose the backend as on an NVIDIA GPU. Returns the monkeypatch, with which tests replace Triton."""
    monkeypatch.setattr(package, "_nvidia", lambda like: True)
    monkeypatch.setattr(package, "_given_up", False)
    return monkeypatch


def blend_auto(cond, uncond, sigma, **options):
    models = len(cond)
    rest = ([1.0] * models, [0.0] * models, [None] * models, [1.0] * models)
    return saliency_blend(cond, uncond, sigma, *rest, **options)


def test_torch_permanently_replaces_a_failed_triton_with_one_warning(fake_gpu, caplog):
    calls = []

    def fails(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("Failed to find C compiler")

    fake_gpu.setattr(fused, "saliency_blend", fails)
    fake_gpu.setattr(fused, "INTERPRETED", True)
    inputs = random_predictions(2, (1, 4, 9, 8), torch.float32, "cpu")
    with caplog.at_level(logging.WARNING, "comfyui-chorus"):
        for _ in range(2):
            for got, expected in zip(blend_auto(*inputs), by_fused_torch(*inputs)):
                assert torch.equal(got, expected)
    assert len(calls) == 1
    assert ["C compiler" in r.message for r in caplog.records] == [True]
    with pytest.raises(RuntimeError, match="C compiler"):
        blend_auto(*inputs, backend="triton")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), KeyboardInterrupt()], ids=["out of memory", "interrupt"]
)
def test_out_of_memory_and_interrupt_are_raised_without_fallback(fake_gpu, error, caplog):
    def fails(*args, **kwargs):
        raise error

    fake_gpu.setattr(fused, "saliency_blend", fails)
    fake_gpu.setattr(fused, "INTERPRETED", True)
    with pytest.raises(type(error)):
        blend_auto(*random_predictions(2, (1, 4, 9, 8), torch.float32, "cpu"))
    assert not package._given_up and not caplog.records


def test_missing_triton_logged_once(fake_gpu, caplog):
    fake_gpu.setattr(package, "fused", None)
    fake_gpu.setattr(package, "_missing", "Triton cannot be imported", raising=False)
    inputs = random_predictions(2, (1, 4, 9, 8), torch.float32, "cpu")
    with caplog.at_level(logging.INFO, "comfyui-chorus"):
        blend_auto(*inputs)
        blend_auto(*inputs)
    assert ["cannot be imported" in r.message for r in caplog.records] == [True]


def test_unavailable_backend_error_names_the_reason(monkeypatch):
    inputs = random_predictions(2, (1, 4, 9, 8), torch.float32, "cpu")
    with pytest.raises(ValueError, match="'cuda'"):
        blend_auto(*inputs, backend="cuda")
    monkeypatch.setattr(fused, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="on cpu"):
        blend_auto(*inputs, backend="triton")
    with pytest.raises(RuntimeError, match="9 models"):
        blend_auto(inputs[0][:1] * 9, inputs[1][:1] * 9, inputs[2], backend="triton")


def test_auto_uses_torch_on_the_cpu(monkeypatch):
    monkeypatch.setattr(fused, "saliency_blend", None)
    inputs = random_predictions(2, (1, 4, 9, 8), torch.float32, "cpu")
    assert torch.equal(blend_auto(*inputs).cond, by_fused_torch(*inputs)[0])


# Script for a separate process, because Triton chooses between compiler and interpreter at import. The script compiles
# the launches of real calls, with their arguments and specialisation, for a GPU that may be absent. Then it assembles
# the code to count registers and spills.
COMPILE = """
import json, re, subprocess, sys, types
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

root, capability, cases = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
pack = sys.modules["kernels"] = types.ModuleType("kernels")
pack.__path__ = [str(root / "kernels")]


class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)


triton.runtime.driver.set_active(Driver)
from kernels.saliency_blend import fused

launch, compiled = triton.JITFunction.run, []


def compile_only(self, *args, grid, warmup, **kwargs):
    compiled.append((self.__name__, launch(self, *args, grid=grid, warmup=True, **kwargs)))


triton.JITFunction.run = compile_only
assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
for models, dtype, shape, options in cases:
    compiled.clear()
    side = [torch.zeros(shape, dtype=getattr(torch, dtype)) for _ in range(models)]
    region = [None, *[torch.zeros(shape[0], *shape[2:])] * (models - 1)]
    ones = [1.0] * models
    sigma = torch.ones(shape[0])
    fused.saliency_blend(side, side, sigma, ones, ones, region, ones, **options)
    for name, kernel in compiled:
        ptx = kernel.asm["ptx"]
        architecture = re.search(r"[.]target (sm_[0-9]+a?)", ptx).group(1)
        command = [assembler, "-v", "-arch", architecture, "-o", "/dev/null", "/dev/stdin"]
        log = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
        number = lambda pattern: int(re.search(pattern, log).group(1))
        print(json.dumps({
            "kernel": name, "registers": number("Used ([0-9]+) registers"), "shared": kernel.metadata.shared,
            "spilled": number("([0-9]+) bytes spill stores") + number("([0-9]+) bytes stack frame"),
            "wide": ptx.count("ld.global.v4.b32") + ptx.count("ld.global.v2.b32"),
            "narrow": len(re.findall("ld[.]global[.][bu]16", ptx)), "loads": len(re.findall("ld[.]global", ptx)),
        }))
"""

COMPILE_CASES = {
    80: [
        (2, "float16", (1, 4, 64, 64), {}),
        (4, "float32", (1, 4, 64, 64), {"softness": 1.0}),
        (2, "float16", (1, 4, 128, 128), {}),
        (4, "float32", (1, 4, 128, 128), {"shared": True, "softness": 1.0}),
    ],
    90: [(2, "float16", (1, 4, 64, 64), {}), (2, "float32", (1, 16, 128, 128), {"blur": 64})],
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", COMPILE_CASES)
def test_compiles_without_spills(capability):
    cases = [(*case, {**DEFAULTS, **options}) for *case, options in COMPILE_CASES[capability]]
    script = [sys.executable, "-c", COMPILE, str(ROOT), str(capability), json.dumps(cases)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(ROOT / ".cache" / "triton")}
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["kernel"] for k in kernels} == {
        "_saliency_blend_kernel",
        "_saliency_kernel",
        "_lead_kernel",
        "_select_kernel",
    }
    for kernel in kernels:
        assert kernel["registers"] <= 255 and kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= 99 * 1024, kernel  # limit of the consumer GPUs of compute capability 8.x
        assert kernel["narrow"] == 0 and kernel["wide"] >= (2 if kernel["kernel"] == "_lead_kernel" else 8), kernel
