"""``bench gpu``: the limit of time, failures and refusals, the comparison with float64, the tables, and the bundle."""

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from chorus.dev.benchmarks import gpu, gpu_bundle, gpu_kernels, gpu_networks, gpu_tables
from chorus.dev.benchmarks.sections import Budget, PartlyFailed, Section, Skipped, run_sections
from chorus.dev.quartiles import quartiles
from chorus.kernels import saliency_blend as blend_kernel
from chorus.tests.support.blend_cases import CASES, DEFAULTS, case_id, random_predictions, settings
from chorus.tests.support.blend_definition import definition

CPU = torch.device("cpu")
ROW = {"implementation": "torch", "case": "a", "dtype": "float32", "errors": {"weights": (0.5, 1.0)}, "correct": True}
FOUND = {"rows": [ROW]}


class Clock:
    """A clock that a test sets forward."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def section(name, seconds=1.0, run=lambda: FOUND):
    return Section(name, "kernels", "correctness", seconds, run)


def raising(error):
    def run():
        raise error

    return run


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def run(monkeypatch, tmp_path, no_gpu):
    """A function that runs the command with the given sections: (exit code, content of the result file)."""

    def run(sections, *words):
        monkeypatch.setattr(gpu, "sections_of", lambda part, device, smoke: (sections, {}))
        files = set(tmp_path.iterdir())
        code = gpu.main(["--part", "kernels", "--smoke", *words], folder=tmp_path)
        (path,) = set(tmp_path.iterdir()) - files
        return code, json.loads(path.read_text(encoding="utf-8"))

    return run


def test_section_without_enough_time_is_skipped_by_name():
    clock = Clock()

    def long():
        clock.now += 50.0
        return FOUND

    recorded = []
    outcomes = run_sections(
        [section("long", 40.0, long), section("too long", 11.0), section("short", 10.0)],
        Budget(60.0, clock),
        lambda found: recorded.append([one["name"] for one in found]),
    )
    assert [(one["name"], one["status"]) for one in outcomes] == [
        ("long", "measured"), ("too long", "skipped"), ("short", "measured"),
    ]  # fmt: skip
    assert outcomes[0]["seconds"] == 50.0
    assert outcomes[1]["reason"] == "time"
    assert recorded == [["long"], ["long", "too long"], ["long", "too long", "short"]]


@pytest.mark.parametrize(
    ("error", "status", "reason", "code"),
    [
        (RuntimeError("no kernel image"), "failed", "RuntimeError: no kernel image", 1),
        (SystemExit("non-finite values"), "failed", "SystemExit: non-finite values", 1),
        (PartlyFailed("one case", FOUND), "failed", "one case", 1),
        (Skipped("needs 20 GiB"), "skipped", "needs 20 GiB", 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_outcome_of_a_section_does_not_end_the_run(run, error, status, reason, code, capsys):
    got, result = run([section("first", run=raising(error)), section("second")])
    assert got == code
    first, second = result["sections"]
    assert (first["status"], first["reason"]) == (status, reason)
    assert ("found" in first) == isinstance(error, PartlyFailed)
    assert second["status"] == "measured"
    shown = capsys.readouterr().out
    assert f"## first\n\n**{status.capitalize()}: {reason}**" in shown
    assert "## second\n\nMeasured" in shown


def test_minutes_limit_the_run(run, capsys):
    code, result = run([section("a"), section("b", 61.0)], "--minutes", "1")
    assert code == 0
    assert [one["status"] for one in result["sections"]] == ["measured", "skipped"]
    assert "## b\n\n**Skipped: time.**" in capsys.readouterr().out


def test_device_that_does_not_respond_ends_the_measurements():
    def after():
        raise RuntimeError("illegal memory access")

    outcomes = run_sections([section("a"), section("b")], Budget(60.0), lambda found: None, after)
    assert [one["status"] for one in outcomes] == ["measured", "skipped"]
    assert outcomes[1]["reason"] == "the device does not respond since a: RuntimeError: illegal memory access"


def test_part_that_cannot_be_imported_fails_by_name(monkeypatch):
    monkeypatch.setitem(gpu.PARTS, "host", ("no_such_module",))
    sections, _ = gpu.sections_of("host", CPU, True)
    (outcome,) = run_sections(sections, Budget(60.0), lambda found: None)
    assert (outcome["name"], outcome["status"]) == ("the part host", "failed")
    assert "no_such_module" in outcome["reason"]


def test_run_without_gpu_is_refused_with_remedy(no_gpu, tmp_path):
    with pytest.raises(SystemExit, match=r"expected an NVIDIA GPU.*--smoke"):
        gpu.main([], folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_smoke_run_among_the_measurements_is_refused(no_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="--smoke cannot be in"):
        gpu.main(["--smoke", "--output", str(tmp_path / "x.json")])
    assert not list(tmp_path.iterdir())


def test_files_are_not_overwritten(run, tmp_path):
    run([section("a")])
    run([section("a")])
    assert len(list(tmp_path.glob("gpu-smoke-*.json"))) == 2
    file = tmp_path / "mine.json"
    file.write_text("mine")
    with pytest.raises(SystemExit, match=r"mine\.json exists"):
        gpu.main(["--smoke", "--output", str(file)])
    assert file.read_text() == "mine"


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_invalid_minutes_rejected(minutes, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--smoke", "--minutes", minutes])
    assert "expected --minutes above 0" in capsys.readouterr().err


def test_result_of_a_smoke_run_is_marked(run, capsys):
    _, result = run([section("a")])
    assert result["smoke"] is True
    assert result["environment"]["command"] == "python run.py bench gpu --part kernels --smoke --minutes 8"
    assert gpu_tables.NOT_A_GPU in capsys.readouterr().out


def test_verdict_on_a_target_for_a_gpu_is_shown_only_on_a_gpu():
    median = {"median": 0.5, "interval": [0.4, 0.6]}
    times = dict.fromkeys(("base", "expert", "fusion", "overhead_share", "between_share"), median)
    found = {"title": "a", "rounds": [], "expert_share": 0.5, "time": times, "verdict": "missed"}
    section = {"name": "a", "kind": "overhead", "status": "measured", "seconds": 1.0, "found": found}
    result = {"environment": {"device": "x"}, "date": "", "smoke": True, "sections": [section]}
    shown = gpu_tables.text(result)
    assert "missed" not in shown and gpu_tables.FOR_A_GPU in shown
    assert shown.rstrip().endswith(gpu_tables.TARGETS)
    result["environment"]["compute_capability"] = "9.0"
    shown = gpu_tables.text({**result, "smoke": False})
    assert "| target | missed |" in shown and gpu_tables.TARGETS not in shown


def test_tables_of_a_file_are_shown(run, tmp_path, capsys):
    run([section("a")])
    shown = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert gpu.main(["--show", str(path)]) == 0
    tables = capsys.readouterr().out
    assert "| torch | float32 | 1 of 1 | 0.50 |" in tables
    assert tables.strip() in shown


def test_quartiles_equal_those_of_numpy():
    for count in (1, 2, 5, 8):
        values = np.random.default_rng(count).normal(size=count)
        np.testing.assert_allclose(quartiles(values), np.quantile(values, [0.25, 0.5, 0.75]), rtol=1e-12)


# ---- comparison with float64 ----


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_exact_blend_equals_the_definition(case):
    models, shape, dtype, options, _ = case
    options = {**DEFAULTS, **options}
    cond, uncond, sigma = random_predictions(models, shape, dtype, "cpu")
    given = settings(models, shape, "cpu")
    exact = gpu_kernels.exact_blend(cond, uncond, sigma, **given, **options)

    def frames(t):  # [B, C, T, H, W] as [B T, C, H, W]
        return t if t.ndim == 4 else t.movedim(2, 1).flatten(0, 1)

    positions = (shape[0], *shape[2:])
    maps = [torch.zeros(()) if r is None else r for r in given["region"]]
    extra = [b + r.double().expand(positions).reshape(-1, *shape[-2:]).numpy() for b, r in zip(given["bias"], maps)]
    pairs = [(frames(c), frames(u)) for c, u in zip(cond, uncond)]
    sigmas = sigma.repeat_interleave(len(pairs[0][0]) // len(sigma))
    expected = definition(
        type("Call", (), {"x": torch.zeros_like(pairs[0][0]), "sigma": sigmas}),
        pairs,
        strengths=given["strength"],
        guidance=[1.0] * models,
        saliency="shared" if options.pop("shared") else "own",
        extra=np.stack(extra),
        **options,
    )
    assert np.abs(exact.weights.numpy() - expected.weights).max() <= 1e-9
    assert np.abs(exact.scores.numpy() - expected.scores).max() <= 1e-9
    assert np.abs(exact.spread.numpy() - expected.spread).max() <= 1e-9
    assert (exact.certain.numpy() == expected.certain).all()
    assert exact.weight_bound == pytest.approx(expected.weight_bound)
    assert exact.rounding == pytest.approx(expected.rounding)


def test_exact_blend_takes_the_arguments_of_the_kernel():
    kernel, exact = (
        set(inspect.signature(f).parameters) for f in (blend_kernel.saliency_blend, gpu_kernels.exact_blend)
    )
    unchecked = {"quota", "memory", "momentum"}  # bench gpu does not use them; tests/kernels does
    assert kernel - exact == {"backend", *unchecked}, "add the argument to exact_blend, or to unchecked"
    assert exact < kernel


def test_correct_blend_passes():
    found = gpu_kernels.check_blend(CPU, CASES[:1])
    assert {row["implementation"] for row in found["rows"]} >= {"torch"}
    assert all(row["correct"] for row in found["rows"])


def wrong_owner(out):
    out.weights[0, 3, 4] = (out.weights[0, 3, 4] + 1) % 2


def wrong_value(out):
    out.uncond[0, 1, 2, 3] += 0.1


def nan_value(out):
    out.cond[0, 1, 2, 3] = float("nan")


def wrong_spread(out):
    out.spread[1] *= 1.001


@pytest.mark.parametrize(
    ("corrupt", "part"), [(wrong_owner, "weights"), (wrong_value, "uncond"), (nan_value, "cond"), (wrong_spread, "spread")]
)  # fmt: skip
def test_wrong_blend_fails_by_name(monkeypatch, corrupt, part):
    original = blend_kernel.saliency_blend

    def corrupted(*args, **kwargs):
        out = original(*args, **{**kwargs, "backend": "torch"})
        corrupt(out)
        return out

    monkeypatch.setattr(blend_kernel, "saliency_blend", corrupted)
    with pytest.raises(PartlyFailed, match=rf"torch, 2 x 2x4x16x16, float16: .*{part}") as failed:
        gpu_kernels.check_blend(CPU, CASES[:1])
    assert not any(row["correct"] for row in failed.value.found["rows"])


def test_failing_kernel_does_not_hide_the_others(monkeypatch):
    original = blend_kernel.saliency_blend

    def fails(*args, **kwargs):
        if kwargs["blur"] == 4 and kwargs["shared"]:
            raise RuntimeError("no kernel\nimage")
        return original(*args, **{**kwargs, "backend": "torch"})

    monkeypatch.setattr(blend_kernel, "saliency_blend", fails)
    with pytest.raises(PartlyFailed, match="torch, 2 x 1x16x33x31, float32: RuntimeError: no kernel image") as failed:
        gpu_kernels.check_blend(CPU, CASES[:2])
    assert {row["case"] for row in failed.value.found["rows"]} == {"2 x 2x4x16x16"}


def test_wrong_speed_case_is_not_timed_and_the_others_are(monkeypatch):
    def measure(case, device, count):
        if case.models == 3:
            raise ValueError("Triton assigns 1 positions to the wrong model")
        return original(case, device, count)

    original = gpu_kernels.saliency_blend.measure
    monkeypatch.setattr(gpu_kernels.saliency_blend, "measure", measure)
    cases = [((1, 4, 8, 8), 3, torch.float32), ((1, 4, 8, 8), 2, torch.bfloat16)]
    with pytest.raises(PartlyFailed, match=r"1x4x8x8, 3 models, torch\.float32: ValueError: Triton assigns") as failed:
        gpu_kernels.time_blend(CPU, cases, 2)
    assert {(row["models"], row["dtype"]) for row in failed.value.found["rows"]} == {(2, "bfloat16")}


def test_wrong_product_fails_by_name(monkeypatch):
    original = gpu_kernels.linear
    monkeypatch.setattr(gpu_kernels, "LINEAR_SHAPES", [(3, 16, 8)])
    assert all(row["correct"] for row in gpu_kernels.check_linear(CPU)["rows"])
    monkeypatch.setattr(gpu_kernels, "linear", lambda x, weight, bias: original(x, weight, bias * 1.5))
    with pytest.raises(PartlyFailed, match="linear, 3 x 16 x 8, float32: errors above their bounds: product"):
        gpu_kernels.check_linear(CPU)


def test_wrong_or_failing_network_is_not_timed_and_missing_package_is_named():
    x = torch.randn(3, 4)

    def missing():
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers.models")

    ways = [
        gpu_networks.Way("right", torch.float32, lambda: lambda i: x.clone()),
        gpu_networks.Way("wrong", torch.float32, lambda: lambda i: 1.02 * x),
        gpu_networks.Way("NaN", torch.float32, lambda: lambda i: x * float("nan")),
        gpu_networks.Way("failing", torch.float32, raising(RuntimeError("no compiler"))),
        gpu_networks.Way("diffusers", torch.float32, missing),
    ]
    with pytest.raises(PartlyFailed) as failed:
        gpu_networks.time_ways(ways, x, CPU)
    for text in ("wrong: differs by 0.02", "NaN: differs by nan", "failing: RuntimeError: no compiler"):
        assert text in str(failed.value)
    assert [row["way"] for row in failed.value.found["rows"]] == ["right"]
    assert failed.value.found["absent"] == {"diffusers": "diffusers is not installed"}
    assert len(gpu_networks.time_ways(ways[:1], x, CPU)["rows"][0]["seconds"]["eager"]) == 3


# ---- the bundle ----

# ``environment`` imports psutil and ComfyUI's version inside functions that the bundle does not call
LAZY = {"psutil", "comfyui_version"}


def absolute_imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in names}


def test_modules_of_the_bundle_import_only_torch_triton_einops_and_safetensors():
    found = {str(path): absolute_imports(path) - sys.stdlib_module_names for path in gpu_bundle.needed()}
    assert len(found) > 30
    assert {
        path: names for path, names in found.items() if names - {"torch", "triton", "einops", "safetensors", *LAZY}
    } == {}


def test_bundle_needs_an_empty_folder_and_is_small(tmp_path, capsys):
    folder = tmp_path / "new"
    assert gpu.main(["--bundle", str(folder)]) == 0
    assert "run it there with: python bench_gpu.py" in capsys.readouterr().out
    assert sum(path.stat().st_size for path in folder.rglob("*")) < gpu_bundle.LIMIT
    with pytest.raises(SystemExit, match="expected a new or empty folder"):
        gpu.main(["--bundle", str(folder)])


def test_too_large_bundle_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bundle, "LIMIT", 1 << 10)
    with pytest.raises(SystemExit, match="expected a bundle of at most"):
        gpu_bundle.write(tmp_path / "new")


# packages that the bundle must not need; numpy is one that torch and einops use where it is installed
BLOCKED = (
    "comfy",
    "comfyui_version",
    "diffusers",
    "kornia",
    "numpy",
    "PIL",
    "psutil",
    "pytest",
    "scipy",
    "transformers",
)
ALONE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))
sys.argv = ["bench_gpu.py", "--smoke"]
runpy.run_path("bench_gpu.py", run_name="__main__")
"""


@pytest.mark.slow
def test_bundle_runs_alone(tmp_path):
    gpu_bundle.write(tmp_path / "new")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "COMFYUI_PATH")}
    environment.pop("TRITON_INTERPRET", None)  # Triton's interpreter needs numpy
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path / "new", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "new").glob("gpu-smoke-*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["parts"] == ["kernels"]
    assert {one["status"] for one in result["sections"]} == {"measured"}
    absent = [one["found"]["absent"] for one in result["sections"] if one["kind"] == "network"]
    assert {"diffusers, eager": "diffusers is not installed"} in absent
