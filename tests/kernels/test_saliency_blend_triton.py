"""The Triton kernels against the definition in float64: both launch paths, on the GPU or in Triton's interpreter.

What only a compiler can tell is tested by compiling: without a GPU too, Triton brings its own assembler.
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
from chorus.tests.support.blend_definition import definition

pytest.importorskip("triton", reason="Triton is not in this build of torch")
from chorus.kernels.saliency_blend import fused

ROOT = Path(__file__).parents[2]
INF = float("inf")


@pytest.fixture(params=["one launch", "two launches"])
def path(request, monkeypatch):
    if request.param == "two launches":
        monkeypatch.setattr(fused, "ONE_PROGRAM", 0)
    return request.param


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """An element that a kernel forgets to write, or reads before it is written, must not pass by luck."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", poisoned)


def draw(models, shape, dtype, device):
    """(cond, uncond) of every model and σ [B]; drawn on the CPU: the same numbers on every device."""
    uncond = [torch.randn(shape) for _ in range(models)]
    cond = [u + (1 + 0.2 * i) * torch.randn(shape) for i, u in enumerate(uncond)]
    cond, uncond = ([t.to(device, dtype) for t in side] for side in (cond, uncond))
    return cond, uncond, torch.linspace(0.5, 3.0, shape[0]).to(device)


def regions(models, shape, device):
    """One of every shape that a region may have; the base's is None."""
    batch, _, *axes = shape
    shapes = [(batch, *axes), axes, (1, *axes), (), (batch, *[1] * len(axes)), (axes[-1],), (axes[-2], 1)]
    return [None, *(0.05 * torch.rand(s).to(device) for s in shapes[: models - 1])]


def run(
    cond, uncond, sigma=None, *, strength=None, bias=None, region=None, gain=None, blur=4, shared=False, softness=None
):
    models = len(cond)
    sigma = torch.ones(len(cond[0]), device=cond[0].device) if sigma is None else sigma
    zeros, ones, none = [0.0] * models, [1.0] * models, [None] * models
    arguments = (cond, uncond, sigma, strength or ones, bias or zeros, region or none, gain or ones)
    return saliency_blend(*arguments, blur=blur, shared=shared, softness=softness, backend="triton")


def check(cond, uncond, sigma, *, strength, bias, region, gain, blur, shared, softness):
    """``run`` against the definition: weights, both predictions, the partition."""
    out = run(**locals())
    models, shape = len(cond), cond[0].shape
    positions = (shape[0], *shape[2:])
    assert out.cond.dtype == out.uncond.dtype == cond[0].dtype
    assert out.cond.shape == out.uncond.shape == shape
    if softness is None:
        assert out.weights.dtype == torch.uint8 and out.weights.shape == positions
        weights = torch.stack([out.weights == n for n in range(models)])
    else:
        assert out.weights.dtype == torch.float32 and out.weights.shape == (models, *positions)
        weights = out.weights
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
        blur=blur,
        extra=np.stack([e.numpy() for e in extra]),
        softness=softness,
    )
    assert expected.certain.mean() > 0.99
    certain = torch.from_numpy(expected.certain)
    weights = weights.double().cpu().reshape(models, -1, *shape[-2:])
    exact = torch.from_numpy(expected.weights)
    assert (weights - exact).abs()[:, certain].max() <= expected.weight_bound
    assert out.partition.shape == (models, len(certain)) and torch.isfinite(out.partition).all()

    c, u = (torch.stack(side) for side in frames)
    largest = max(gain) * (c.abs() + u.abs()).amax(0)
    bound = (4 * torch.finfo(cond[0].dtype).eps + 3 * expected.weight_bound) * largest
    guided = u + torch.tensor(gain, dtype=torch.float64).reshape(-1, 1, 1, 1, 1) * (c - u)
    for got, each in ((out.cond, guided), (out.uncond, u)):
        error = (reference.fold_frames(got).double().cpu() - (each * exact.unsqueeze(2)).sum(0)).abs()
        assert (error <= bound).movedim(1, 0)[:, certain].all()


def check_drawn(models, shape, dtype, device, **options):
    if dtype is torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    options = {"blur": 4, "shared": False, "softness": None, **options}
    check(
        *draw(models, shape, dtype, device),
        strength=[0.5 + 0.1 * n for n in range(models)],
        bias=[-0.01 * n for n in range(models)],
        region=regions(models, shape, device),
        gain=[1.0, 0.5, 2.0, 1.0, 1.5, 1.0, 0.0, 3.0][:models],
        **options,
    )


FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
CASES = [
    (2, (2, 4, 16, 16), HALF, {}),
    (2, (1, 16, 33, 31), FULL, {"shared": True}),
    (3, (3, 4, 9, 20), FULL, {"softness": 1.0}),
    (4, (1, 4, 7, 50), HALF, {"softness": 0.05, "shared": True}),
    (8, (1, 1, 12, 17), FULL, {}),
    (5, (2, 1, 6, 5), HALF, {"softness": 0.5}),
    (3, (2, 4, 3, 9, 8), FULL, {}),
    (2, (1, 4, 2, 8, 9), HALF, {"softness": 1.0}),
    (3, (2, 4, 24, 20), BRAIN, {}),
    (3, (2, 4, 24, 20), BRAIN, {"softness": 1.0}),
]


def case_id(case):
    return f"{case[0]}-{'x'.join(map(str, case[1]))}-{str(case[2])[6:]}{''.join(f'-{k}' for k in case[3])}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_is_the_definition(path, case, device):
    models, shape, dtype, options = case
    check_drawn(models, shape, dtype, device, **options)


@pytest.mark.parametrize("blur", [1, 2, 3, 5, 8, 64])
def test_blur_is_the_definition(path, blur, device):
    """37 x 55: two tiles each way, wherever the blur sets their borders; 11 x 14: smaller than the largest box."""
    shape = (1, 1, 37, 55) if path == "two launches" else (1, 1, 11, 14)
    check_drawn(2, shape, torch.float32, device, blur=blur)


@pytest.mark.parametrize("blur", [20, 64])
def test_wide_blur_over_several_tiles(monkeypatch, blur, device):
    monkeypatch.setattr(fused, "ONE_PROGRAM", 0)
    check_drawn(2, (1, 1, 40, 70), torch.float32, device, blur=blur)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3, 3)], ids=str)
def test_a_picture_smaller_than_the_blur(size, device):
    """Averaged whole; the definition has no word on it, the reference has."""
    cond, uncond, sigma = draw(2, (1, 4, *size), torch.float32, device)
    rest = ([1.0] * 2, [0.0] * 2, [None] * 2, [1.0] * 2)
    expected = reference.saliency_blend(cond, uncond, sigma, *rest, blur=12, shared=False, softness=1.0)
    for got, wanted in zip(run(cond, uncond, sigma, blur=12, softness=1.0), expected):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("softness", [None, 1.0])
def test_one_model_paints_everything(path, softness, device):
    cond, uncond, sigma = draw(1, (1, 1, 5, 7), torch.float16, device)
    out = run(cond, uncond, sigma, softness=softness)
    assert torch.equal(out.cond, cond[0]) and torch.equal(out.uncond, uncond[0])
    assert (out.weights == (0 if softness is None else 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_hard_mask_keeps_every_bit(path, dtype, device):
    cond, uncond, sigma = draw(3, (2, 4, 9, 10), dtype, device)
    out = run(cond, uncond, sigma)
    owner = out.weights.long()
    assert owner.unique().tolist() == [0, 1, 2]
    for got, choices in ((out.cond, cond), (out.uncond, uncond)):
        assert torch.equal(got, torch.stack(choices).gather(0, owner[None, :, None].expand(1, -1, 4, -1, -1))[0])


@pytest.mark.parametrize("softness", [None, 1.0])
def test_strided_inputs_are_read_and_left_alone(path, softness, device):
    cond, uncond, sigma = draw(2, (2, 4, 9, 8), torch.float32, device)
    strided = [[t.transpose(2, 3).contiguous().transpose(2, 3) for t in side] for side in (cond, uncond)]
    before = [[t.clone() for t in side] for side in strided]
    for got, wanted in zip(run(*strided, sigma, softness=softness), run(cond, uncond, sigma, softness=softness)):
        assert torch.equal(got, wanted)
    assert all(torch.equal(t, b) for side, old in zip(strided, before) for t, b in zip(side, old))


def test_samples_of_a_batch_do_not_see_each_other(path, device):
    cond, uncond, sigma = draw(2, (3, 4, 9, 8), torch.float32, device)
    together = run(cond, uncond, sigma)
    for i in (0, 2):
        alone = run(*[[t[i : i + 1] for t in side] for side in (cond, uncond)], sigma[i : i + 1])
        for whole, part, axis in zip(together, alone, (0, 0, 0, 1), strict=True):
            assert torch.equal(whole.narrow(axis, i, 1), part)


def test_ties_go_to_the_base_then_to_chain_order(path, device):
    cond, uncond, _ = draw(1, (1, 4, 9, 8), torch.float32, device)
    assert (run(cond * 3, uncond * 3).weights == 0).all()
    assert (run(cond * 3, uncond * 3, bias=[0.0, 1.0, 1.0]).weights == 1).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
def test_infinite_regions_force_and_bar(path, device):
    cond, uncond, _ = draw(4, (1, 4, 6, 6), torch.float32, device)
    forced = torch.full((1, 6, 6), -INF, device=device)
    forced[:, :3] = INF
    barred, both = torch.full((), -INF, device=device), [None, forced, None, forced]
    owner = run(cond, uncond, region=[None, forced, barred, barred]).weights
    assert (owner[:, :3] == 1).all() and (owner[:, 3:] == 0).all()
    assert (run(cond, uncond, region=both).weights[:, :3] == 1).all()  # the first of those that are forced
    soft = run(cond, uncond, region=both, softness=1.0).weights
    assert (soft[:, :, :3] == torch.tensor([0.0, 0.5, 0.0, 0.5], device=device).reshape(4, 1, 1, 1)).all()
    assert not soft[1::2, :, 3:].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("side", [0, 1], ids=["cond", "uncond"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_partition_tells_which_prediction_is_not_finite(path, shared, side, value, device):
    cond, uncond, sigma = draw(2, (2, 1, 6, 5), torch.float32, device)
    (cond, uncond)[side][1][1, 0, 3, 4] = value
    finite = torch.isfinite(run(cond, uncond, sigma, shared=shared).partition)
    assert finite.tolist() == [[True, True], [True, False]]


def fused_torch_of(cond, uncond, sigma):
    models = len(cond)
    rest = ([1.0] * models, [0.0] * models, [None] * models, [1.0] * models)
    return fused_torch.saliency_blend(cond, uncond, sigma, *rest, blur=4, shared=False, softness=None)


def test_implementations_take_the_same_arguments():
    signatures = [inspect.signature(m.saliency_blend).parameters for m in (reference, fused_torch, fused)]
    assert len({tuple(map(str, s.values())) for s in signatures}) == 1
    public = inspect.signature(saliency_blend).parameters
    assert [(p.name, p.kind) for p in public.values()][:-1] == [(p.name, p.kind) for p in signatures[0].values()]


class Launches:
    """Stands in for a kernel: notes its launches and runs nothing."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("softness", [None, 1.0])
@pytest.mark.parametrize(("side", "count"), [(64, 1), (72, 2)])
def test_few_launches_and_no_wait_for_the_device(monkeypatch, side, count, softness):
    """Fake tensors hold no values: whoever asks for one fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    launches = Launches()
    for name in ("_saliency_blend_kernel", "_saliency_kernel", "_select_kernel"):
        monkeypatch.setattr(fused, name, launches)
    with FakeTensorMode():
        cond, uncond, sigma = draw(3, (2, 4, 3, side, side), torch.float32, "cpu")
        run(cond, uncond, sigma, region=regions(3, cond[0].shape, "cpu"), softness=softness)
    assert len(launches.grids) == count


def op_arguments(device, softness):
    cond, uncond, sigma = draw(2, (2, 4, 3, 9, 8), torch.float16, device)
    return (
        cond,
        uncond,
        sigma,
        [1.0] * 2,
        [0.0] * 2,
        [None, torch.zeros(8, device=device)],
        [1.0] * 2,
        4,
        False,
        softness,
    )


@pytest.mark.parametrize("softness", [None, 1.0])
def test_operator_is_what_it_declares(softness, device):
    torch.library.opcheck(
        torch.ops.chorus.saliency_blend.default,
        op_arguments(device, softness),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiled_whole(device):
    cond, uncond, sigma = draw(2, (1, 4, 9, 8), torch.float32, device)

    def step(scale):
        out = run([c * scale for c in cond], uncond, sigma, bias=[0.0, 0.1])
        return out.cond + 1.0, out.weights

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(torch.tensor(2.0, device=device)), step(torch.tensor(2.0, device=device))):
        assert torch.equal(got, wanted)


def test_imported_under_a_second_name():
    spec = importlib.util.spec_from_file_location("chorus_again", fused.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.saliency_blend is not fused.saliency_blend
    assert torch.ops.chorus.saliency_blend.default


@pytest.fixture
def gpu_said(monkeypatch):
    """The choice as on a machine with an NVIDIA GPU, told from torch by what the tests put in place of Triton."""
    monkeypatch.setattr(package, "_nvidia", lambda like: True)
    monkeypatch.setattr(package, "_given_up", False)
    return monkeypatch


def automatic(cond, uncond, sigma, **options):
    models = len(cond)
    rest = ([1.0] * models, [0.0] * models, [None] * models, [1.0] * models)
    return saliency_blend(cond, uncond, sigma, *rest, **options)


def test_torch_takes_over_once_and_for_good(gpu_said, caplog):
    calls = []

    def fails(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("Failed to find C compiler")

    gpu_said.setattr(fused, "saliency_blend", fails)
    gpu_said.setattr(fused, "INTERPRETED", True)
    drawn = draw(2, (1, 4, 9, 8), torch.float32, "cpu")
    with caplog.at_level(logging.WARNING, "comfyui-chorus"):
        for _ in range(2):
            for got, wanted in zip(automatic(*drawn), fused_torch_of(*drawn)):
                assert torch.equal(got, wanted)
    assert len(calls) == 1
    assert ["C compiler" in r.message for r in caplog.records] == [True]
    with pytest.raises(RuntimeError, match="C compiler"):
        automatic(*drawn, backend="triton")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt()], ids=["memory", "interrupt"])
def test_what_is_not_tritons_fault_is_raised(gpu_said, error, caplog):
    def fails(*args, **kwargs):
        raise error

    gpu_said.setattr(fused, "saliency_blend", fails)
    gpu_said.setattr(fused, "INTERPRETED", True)
    with pytest.raises(type(error)):
        automatic(*draw(2, (1, 4, 9, 8), torch.float32, "cpu"))
    assert not package._given_up and not caplog.records


def test_a_missing_triton_is_said_once(gpu_said, caplog):
    gpu_said.setattr(package, "fused", None)
    gpu_said.setattr(package, "_missing", "Triton cannot be imported", raising=False)
    drawn = draw(2, (1, 4, 9, 8), torch.float32, "cpu")
    with caplog.at_level(logging.INFO, "comfyui-chorus"):
        automatic(*drawn)
        automatic(*drawn)
    assert ["cannot be imported" in r.message for r in caplog.records] == [True]


def test_backends_that_cannot_run_say_why(monkeypatch):
    drawn = draw(2, (1, 4, 9, 8), torch.float32, "cpu")
    with pytest.raises(ValueError, match="'cuda'"):
        automatic(*drawn, backend="cuda")
    monkeypatch.setattr(fused, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="on cpu"):
        automatic(*drawn, backend="triton")
    with pytest.raises(RuntimeError, match="9 models"):
        automatic(drawn[0][:1] * 9, drawn[1][:1] * 9, drawn[2], backend="triton")


def test_the_cpu_runs_torch(monkeypatch):
    monkeypatch.setattr(fused, "saliency_blend", None)
    drawn = draw(2, (1, 4, 9, 8), torch.float32, "cpu")
    assert torch.equal(automatic(*drawn).cond, fused_torch_of(*drawn)[0])


# Runs in a process of its own: what is interpreted is decided at import. Launches are compiled for a GPU that need not
# be there, with the arguments, and so the specialisation, of a real call; then assembled, to see registers and spills.
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
for models, dtype, shape, blur, shared, softness in cases:
    compiled.clear()
    side = [torch.zeros(shape, dtype=getattr(torch, dtype)) for _ in range(models)]
    region = [None, *[torch.zeros(shape[0], *shape[2:])] * (models - 1)]
    ones = [1.0] * models
    sigma = torch.ones(shape[0])
    fused.saliency_blend(side, side, sigma, ones, ones, region, ones, blur=blur, shared=shared, softness=softness)
    for name, kernel in compiled:
        ptx = kernel.asm["ptx"]
        architecture = re.search(r"[.]target (sm_[0-9]+a?)", ptx).group(1)
        command = [assembler, "-v", "-arch", architecture, "-o", "/dev/null", "/dev/stdin"]
        told = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
        number = lambda what: int(re.search(what, told).group(1))
        print(json.dumps({
            "kernel": name, "registers": number("Used ([0-9]+) registers"), "shared": kernel.metadata.shared,
            "spilled": number("([0-9]+) bytes spill stores") + number("([0-9]+) bytes stack frame"),
            "wide": ptx.count("ld.global.v4.b32") + ptx.count("ld.global.v2.b32"),
            "narrow": len(re.findall("ld[.]global[.][bu]16", ptx)), "loads": len(re.findall("ld[.]global", ptx)),
        }))
"""

COMPILED = {
    80: [
        (2, "float16", (1, 4, 64, 64), 4, False, None),
        (4, "float32", (1, 4, 64, 64), 4, False, 1.0),
        (2, "float16", (1, 4, 128, 128), 4, False, None),
        (4, "float32", (1, 4, 128, 128), 4, True, 1.0),
    ],
    90: [(2, "float16", (1, 4, 64, 64), 4, False, None), (2, "float32", (1, 16, 128, 128), 64, False, None)],
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", COMPILED)
def test_compiles_without_spills(capability):
    cases = COMPILED[capability]
    script = [sys.executable, "-c", COMPILE, str(ROOT), str(capability), json.dumps(cases)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(ROOT / ".cache" / "triton")}
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["kernel"] for k in kernels} == {"_saliency_blend_kernel", "_saliency_kernel", "_select_kernel"}
    for kernel in kernels:
        assert kernel["registers"] <= 255 and kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= 99 * 1024, kernel  # what a program may have on the consumer cards of 8.x
        assert kernel["narrow"] == 0 and kernel["wide"] >= 8, kernel
