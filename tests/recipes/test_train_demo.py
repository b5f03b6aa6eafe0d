"""The recipes' training loop: exact resumption, killed processes, damaged files, full disks, and resumption from a
snapshot."""

import contextlib
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from chorus.demo import weights
from chorus.demo.concepts import load_concepts
from chorus.dev.recipes import autoencoder, bundle, chain, loop, snapshots, sprites, state
from chorus.dev.recipes.errors import RecipeError
from chorus.dev.recipes.muon import orthogonalise
from chorus.dev.recipes.scenes import Scenes
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Temporary folders for the state and the weights."""
    monkeypatch.setenv(state.VARIABLE, str(tmp_path / "state"))
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")
    return tmp_path / "state"


class LinearTask:
    """A task that fits a linear function; a batch depends only on its number."""

    def __init__(self, name="line", at=None):
        self.network = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))
        self.name, self.at, self.seen, self.exported = name, at, [], []

    def loss(self, step):
        if self.at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        self.seen.append(step)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return (self.network(x)[:, 0] - x.sum(1)).square().mean()

    def snapshot(self):
        return snapshots.load(self.name)

    def sheet(self, network):
        return None

    def export(self, network, facts):
        self.exported.append(facts["step"])
        snapshots.save(self.name, network.state_dict(), style="glossy", **facts)


PLAN = loop.Plan(name="line", steps=12, batch=4, warmup=2, muon=0.5)


def train(plan=PLAN, **options):
    torch.manual_seed(0)
    task = LinearTask(**options)
    run = loop.train(plan, task, report=lambda line: None)
    return task, run


def test_resumed_training_equals_uninterrupted_training(folder, tmp_path, monkeypatch):
    _, whole = train()
    monkeypatch.setenv(state.VARIABLE, str(tmp_path / "other"))
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "other_weights")
    with pytest.raises(loop.Interrupted):
        train(at=5)
    task, resumed = train()
    assert task.seen[0] == 6  # the step in which the signal arrived was completed
    assert resumed.step == whole.step == 12
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name])
    assert resumed.samples == 48


def test_training_resumes_from_the_snapshot_alone(folder):
    train()
    for path in folder.glob("line*"):
        path.unlink()
    longer = loop.Plan(name="line", steps=16, batch=4, warmup=2)
    task, run = train(longer)
    assert task.seen == [12, 13, 14, 15]
    assert run.restarted_at == 12
    start = snapshots.load("line")
    assert start[1] == 16
    assert all(torch.isfinite(v).all() for v in start[0].values())
    assert loop.rate(longer, 12, 12) == pytest.approx(loop.rate(longer, 12) / loop.RESTART_WARMUP)


def test_stopped_stage_is_exported(folder):
    stage = SimpleNamespace(
        name="line", plan="PLAN", plans=(PLAN,), load=lambda: SimpleNamespace(Task=lambda plan: LinearTask())
    )
    with pytest.raises(RecipeError, match="line has not been trained yet"):
        chain.export(stage)
    with pytest.raises(loop.Interrupted):
        train(at=5)
    assert snapshots.load("line") is None
    lines = []
    chain.export(stage, lines.append)
    assert lines == ["line: saved the weights of step 6"]
    saved, step = snapshots.load("line")
    assert step == 6
    average = state.load("line", print)["average"]
    for name, value in saved.items():
        torch.testing.assert_close(value, average[name], rtol=1e-3, atol=1e-3)  # float16
    with pytest.raises(RecipeError, match="one training, got student"):
        chain.export(chain.find(["student"])[0])


def test_halfway_snapshot_is_written(folder):
    task = LinearTask()
    loop.train(PLAN, task, halfway=True, report=lambda line: None)
    assert task.exported == [6, 12]


def test_finished_stage_is_not_trained_again(folder):
    train()
    task, run = train()
    assert task.seen == [] and run.step == 12


def test_stage_killed_before_its_export_is_exported_by_the_next_run(folder):
    train()
    weights.path("line").unlink()
    task, _ = train()
    assert task.seen == [] and task.exported == [12]


def test_signal_in_the_last_step_completes_the_stage_and_stops_the_chain(folder):
    with pytest.raises(loop.Interrupted):
        train(at=11)
    assert snapshots.load("line")[1] == 12


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_damaged_state_falls_back_to_the_previous_state(folder, keep):
    for step in (1, 2):
        state.save("x", {"step": step, "value": torch.arange(1000)})
    path = folder / "x.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    lines = []
    assert state.load("x", lines.append)["step"] == 1
    assert len(lines) == 1 and "x.pt is damaged" in lines[0] and "previous state" in lines[0]
    assert (folder / "x.pt.damaged").exists()


def test_state_is_readable_whenever_the_process_dies(folder, monkeypatch):
    """If the process dies between any two renames, the state of the last or the previous save is readable."""
    state.save("x", {"step": 0})
    for save, calls in itertools.product((1, 2), range(3)):
        real, left = os.replace, [calls]

        def dying(a, b, real=real, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            real(a, b)

        before = state.load("x")["step"]
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with contextlib.suppress(KeyboardInterrupt):  # the first save has one rename fewer
                state.save("x", {"step": before + save})
        assert state.load("x")["step"] in (before, before + save)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
def test_full_disk_is_reported_and_the_state_is_kept(folder, monkeypatch, error):
    state.save("x", {"step": 1})

    def fails(content, part):
        part.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(RecipeError, match=r"disk of .* is full; free some space") as caught:
        state.save("x", {"step": 2})
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["x.pt"]
    assert state.load("x")["step"] == 1


def test_state_of_another_network_is_rejected(folder):
    train()
    task = LinearTask()
    task.network = nn.Sequential(nn.Linear(3, 9), nn.SiLU(), nn.Linear(9, 1))
    with pytest.raises(RecipeError, match="belongs to another network"):
        loop.train(loop.Plan(name="line", steps=20, batch=4), task, report=lambda line: None)


def test_non_finite_loss_stops_the_training(folder):
    task = LinearTask()
    task.loss = lambda step: (task.network(torch.ones(1, 3)) * float("nan")).sum()
    with pytest.raises(RecipeError, match="expected a finite loss, got nan at step 1"):
        loop.train(PLAN, task, report=lambda line: None)


def test_failed_download_is_reported_with_remedy(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sprites, "CACHE", tmp_path / "emoji")
    with pytest.raises(
        RecipeError, match=r"npm could not download @twemoji/svg@15.0.0 .*ENOTFOUND.*npm pack"
    ) as caught:
        sprites.tarball(sprites.PACKAGES["flat"])
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "emoji").glob("*.tgz"))


def test_download_with_wrong_hash_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(sprites, "CACHE", tmp_path)
    package = sprites.PACKAGES["flat"]
    package.tarball.write_bytes(b"something else")
    with pytest.raises(RecipeError, match=r"expected sha256 1d2907"):
        sprites.tarball(package)
    assert not package.tarball.exists()


def test_second_training_in_one_folder_is_rejected(folder):
    with state.locked(), pytest.raises(RecipeError, match="another train-demo uses"), state.locked():
        pass
    with state.locked():
        pass


def test_unknown_stage_is_rejected():
    with pytest.raises(RecipeError, match=r"expected any of the stages autoencoder, .*; got generl"):
        chain.find(["generl"])


@pytest.fixture
def discs(tmp_path, monkeypatch):
    """An archive of sprites that needs no download: a disc of a different colour for each concept."""
    rng, found = np.random.default_rng(0), {}
    for style, size in itertools.product(("glossy", "flat"), (56, 60, 64, 88, 96, 104)):
        y, x = np.mgrid[:size, :size] - (size - 1) / 2
        alpha = ((x**2 + y**2) < (size / 2) ** 2).astype(np.float32)[..., None]
        for index, concept in enumerate(load_concepts()):
            for tone in ("", *concept.tones):
                color = np.array([*rng.integers(0, 256, 3), 255], np.float32)
                found[f"{style}/{index}/{tone}/{size}"] = (alpha * color).astype(np.uint8)
    path = tmp_path / "sprites.npz"
    np.savez(path, **found)
    monkeypatch.setenv(sprites.BUNDLE, str(path))
    return path


CHILD = """
import sys
sys.path.insert(0, {root!r})
import run
sys.path.remove({root!r})
import torch
from pathlib import Path
from chorus.demo import weights
from chorus.dev.recipes import autoencoder, loop, state
torch.set_num_threads(1)
weights.FOLDER = Path({weights!r})
loop.SAVE_SECONDS = 0.5
plan = autoencoder.Plan(steps=10**6, batch=2, canvases=8)
print("started", flush=True)
try:
    loop.train(plan, autoencoder.Task(plan), report=lambda line: print(line, flush=True))
except loop.Interrupted:
    sys.exit(143)
"""


@pytest.mark.slow
def test_killed_stage_resumes_from_the_last_save(folder, discs, tmp_path):
    """The autoencoder's stage in a subprocess: SIGKILL, a second start, then SIGTERM."""
    code = CHILD.format(root=str(ROOT), weights=str(tmp_path / "weights"))

    def start():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipe)

    def first_step(process):
        """The step at which the process starts."""
        for line in process.stdout:
            if line.startswith("autoencoder: step"):
                return int(line.split()[2])
        raise AssertionError(f"the process ended with status {process.wait()}")

    def saved(above):
        """The step of the next saved state."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = state.load("autoencoder", report=lambda line: None) if folder.exists() else None
            if found is not None and found["step"] > above:
                return found["step"]
            time.sleep(0.1)
        raise AssertionError("no state was saved")

    process = start()
    assert first_step(process) == 0
    step = saved(above=0)
    process.kill()
    process.wait()
    process = start()
    resumed = first_step(process)
    assert resumed >= step
    saved(above=resumed)
    process.send_signal(signal.SIGTERM)
    output = process.stdout.read()
    assert process.wait() == 143
    stopped = int(output.rsplit("stopped at step ", 1)[1].split(";")[0])
    assert state.load("autoencoder")["step"] == stopped  # SIGTERM loses nothing
    assert json.loads((folder / "autoencoder.json").read_text())["step"] == stopped


@pytest.mark.slow
def test_autoencoder_resumes_from_its_snapshot_alone(folder, discs):
    """The resumed training starts with the saved weights, a new optimizer and a short warm-up."""
    plan = autoencoder.PLAN.small(canvases=4, batch=2, steps=3)
    loop.train(plan, autoencoder.Task(plan), report=lambda line: None)
    assert snapshots.load("autoencoder")[1] == 3
    for path in folder.glob("autoencoder*"):
        path.unlink()
    lines, longer = [], autoencoder.PLAN.small(canvases=4, batch=2, steps=5)
    run = loop.Run(longer, autoencoder.Task(longer), report=lines.append)
    assert lines == ["autoencoder: no state found, resuming from the snapshot of step 3"]
    assert run.step == run.restarted_at == 3
    for name, value in snapshots.load("autoencoder")[0].items():
        assert torch.equal(run.network.state_dict()[name], value)
    loop.train(longer, autoencoder.Task(longer), report=lambda line: None)
    assert snapshots.load("autoencoder")[1] == 5


ALONE = """
import importlib.machinery, runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("comfy", "safetensors", "PIL", "einops", "kornia", "scipy", "tqdm"):
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError(f"{spec.name} is not on the other machine")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Blocked())
sys.argv = [SCRIPT]
runpy.run_path(SCRIPT, run_name="__main__")
"""


@pytest.mark.slow
def test_bundle_trains_with_torch_alone_and_is_imported(folder, discs, tmp_path):
    stage, place = chain.find(["autoencoder"])[0], tmp_path / "bundle"
    assert bundle.write(stage, place) < bundle.LIMIT
    with pytest.raises(RecipeError, match="is not empty"):
        bundle.write(stage, place)
    code = ALONE.replace("SCRIPT", repr(str(place / "train.py")))
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CHORUS", "PYTHONPATH"))}
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=clean | {"OMP_NUM_THREADS": "1"}, **pipe)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("autoencoder: step 0 of"):
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 143, "".join(lines)
    lines = []
    bundle.collect(place, lines.append)
    assert lines == ["autoencoder.json: state imported", "autoencoder.pt: state imported"]
    assert state.load("autoencoder")["step"] >= 1
    with pytest.raises(
        RecipeError,
        match="expert-food needs the weights of autoencoder and text; train the stages that make them first",
    ):
        bundle.write(chain.find(["expert-food"])[0], tmp_path / "other")
    with pytest.raises(RecipeError, match=r"no train.py"):
        bundle.collect(tmp_path)


def test_bundle_contains_snapshots_and_newer_ones_are_imported(folder, discs, tmp_path):
    model = autoencoder.Autoencoder()
    snapshots.save("autoencoder", model.state_dict(), style="flat", step=5)
    place = tmp_path / "bundle"
    bundle.write(chain.find(["autoencoder"])[0], place)
    path = place / "snapshots" / "autoencoder.pt"
    bundle.collect(place, pytest.fail)  # no newer snapshot
    changed = {k: v + 1 for k, v in model.state_dict().items()}
    snapshots.write_plain(path, changed, {"step": 9, "style": "flat"})
    lines = []
    bundle.collect(place, lines.append)
    assert lines == ["autoencoder: weights of step 9 imported"]
    found, step = snapshots.load("autoencoder")
    assert step == 9 and torch.allclose(found["decoder.mean"], changed["decoder.mean"].half().float())


def test_scenes_are_deterministic_and_respect_the_excluded_values(discs):
    scenes, again = Scenes("glossy", seed=3), Scenes("glossy", seed=3)
    pixels, captions, found = scenes.batch(100, 200)
    same, texts, _ = again.batch(150, 10)
    assert np.array_equal(pixels[50:60], same) and captions[50:60] == texts
    held = {tuple(pair) for pair in scenes.held_pairs}
    for scene in found:
        names = tuple(sorted(scenes.concepts[item.concept].name for item in scene.items))
        assert names not in held and len(set(names)) == len(names)
        assert "teal" not in scene.colors
        assert {item.size for item in scene.items} <= ({88, 104} if len(names) == 1 else {56, 64})
    shares = [len(scene.items) == 1 for scene in found]
    assert 0.3 < np.mean(shares) < 0.6


def test_bystanders_are_named_and_not_drawn(discs):
    scenes = Scenes("flat", domain="animal", bystanders=1.0, alone=0.0, seed=5)
    pixels, captions, found = scenes.batch(0, 40)
    domains = [{scenes.concepts[item.concept].domain for item in scene.items} for scene in found]
    assert all("animal" in d and len(d) == 2 for d in domains)
    for image, caption, scene in zip(pixels, captions, found):
        empty = [item for item in scene.items if not item.drawn]
        assert len(empty) == 1 and scenes.phrase(empty[0]) in caption
        n = scene.items.index(empty[0])
        half = image[:64] if scene.relation in ("above", "below") else image[:, :64]
        other = image[64:] if scene.relation in ("above", "below") else image[:, 64:]
        first = (n == 0) == (scene.relation in ("left of", "above"))
        side = half if first else other
        plain = len(scene.colors) == 1
        assert not plain or (side == side[0, 0]).all()


def test_positions_match_the_relation_of_the_caption(discs):
    scenes = Scenes("glossy", alone=0.0, seed=8)
    for index in range(60):
        scene = scenes.scene(index)
        from chorus.dev.recipes.scenes import corner

        (ax, ay), (bx, by) = corner(scene, 0, 128), corner(scene, 1, 128)
        assert ax % 8 == ay % 8 == bx % 8 == by % 8 == 0
        expected = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
        assert expected[scene.relation], scene


def test_initial_autoencoder_is_the_exact_pca():
    """The reconstruction equals that of numpy's singular value decomposition of the patches."""
    from chorus.demo.autoencoder import Autoencoder
    from chorus.dev.recipes.pca import start_as_pca

    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 192, generator=generator)
    patches = torch.randn(6 * 16, 12, generator=generator) @ mixing * 0.05 + 0.1
    images = torch.nn.functional.fold(patches.view(6, 16, 192).movedim(1, 2), (32, 32), 8, stride=8)
    model = Autoencoder().eval()
    kept = start_as_pca(model, images)
    centred = patches.double().numpy() - patches.double().numpy().mean(0)
    _, values, rows = np.linalg.svd(centred, full_matrices=False)
    assert kept == pytest.approx((values[:8] ** 2).sum() / (values**2).sum(), rel=1e-4)
    expected = centred @ rows[:8].T @ rows[:8] + patches.double().numpy().mean(0)
    with torch.no_grad():
        found = model.decode(model.encode(images))
    found = torch.nn.functional.unfold(found, 8, stride=8).movedim(1, 2).reshape(-1, 192)
    assert np.abs(found.numpy() - expected).max() < 1e-4


def test_muon_update_is_orthogonal():
    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(1))
    for x in (matrix, matrix.T):
        values = torch.linalg.svdvals(orthogonalise(x, 6))
        assert values.min() > 0.6 and values.max() < 1.3
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        cosine = torch.nn.functional.cosine_similarity(orthogonalise(x, 6).flatten(), (u @ v).flatten(), dim=0)
        assert cosine > 0.97


def test_plain_areas_weigh_twice_in_the_gradient_loss():
    x = torch.zeros(1, 1, 4, 4)
    y = x.clone()
    y[..., 1, 1] = 0.1
    # The image has 16 pixels and 12 differences in each direction. Two differences are 0.1 and count twice in plain
    # areas.
    assert autoencoder.reconstruction(y, x).item() == pytest.approx(0.1 / 16 + 2 * 2 * (2 * 0.1 / 12), rel=1e-5)
