"""SeedSelect, SaveSeed and LoadSeed with a tiny random model and the demo's VAE and image encoder."""

import inspect
import itertools
import json
import re
import sys
import traceback
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.nested_tensor
import comfy.samplers
import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import folder_paths
import nodes as host_nodes
import pytest
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from comfy_execution.utils import CurrentNodeContext

from chorus.demo import modules
from chorus.dev.recipes.vision import SCALE, names
from chorus.host.sampling_progress import SamplingProgress
from chorus.nodes.seed_files import LoadSeed, SaveSeed
from chorus.nodes.seed_select import SeedSelect
from chorus.techniques.seed_select.comfy_files import SeedNoise
from chorus.techniques.seed_select.comfy_sampler import ComfySeedSampler, KSamplerInputs
from chorus.techniques.seed_select.comfy_scoring import ScoringSettings
from chorus.techniques.seed_select.comfy_session import SessionSettings
from chorus.techniques.seed_select.inversion import invert
from chorus.tests.support.gradients import with_easycache
from chorus.tests.support.head_training import Scaled
from chorus.tests.support.lifecycle import interrupt_at
from chorus.tests.support.seeds import SIDE, references, score_of
from chorus.tests.support.tiny_models import (
    conditioning,
    defaults,
    forwards,
    in_inference_mode,
    ksample,
    latent,
    lora,
    unet,
)

pytestmark = pytest.mark.usefixtures("one_thread")
Interrupted = comfy.model_management.InterruptProcessingException
WORDS = conditioning(10), conditioning(11)
# rounds of the search: 6 candidates with 1 step, 2 with 2 steps, 1 with 4 steps
SETTINGS = dict(steps=4, cfg=3.0, candidates=6, first_steps=1, iterations=2, seed=5)
Result = namedtuple("Result", "noise seed samples grid preview report")


@pytest.fixture(scope="module")
def model():
    return unet(0, latent_format=Scaled)


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return modules.make_vae(modules.load_autoencoder())


@pytest.fixture(scope="module")
def vision():
    with torch.inference_mode():
        return modules.load_vision()


def empty():
    return latent(height=8, width=8)


@in_inference_mode
def content():
    """A random latent with a noise mask over its left half."""
    mask = (torch.arange(8) < 4).float().expand(1, 1, 8, 8).clone()
    return {"samples": torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(5)), "noise_mask": mask}


@pytest.fixture
def select(model, vae, vision):
    """Function that executes SeedSelect with small defaults."""

    @in_inference_mode
    def select(**inputs):
        wired = dict(model=model, positive=WORDS[0], negative=WORDS[1], latent_image=empty(), vae=vae)
        wired |= dict(references=references(), clip_vision=vision)
        return Result(*SeedSelect.execute(**{**defaults(SeedSelect), **wired, **SETTINGS, **inputs}).args)

    return select


@in_inference_mode
def custom_sampled(model, noise, samples, sampler="euler", steps=4):
    """Samples of SamplerCustomAdvanced with a CFGGuider and cfg 3."""
    guider = custom.CFGGuider.execute(model, *WORDS, 3.0).args[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", steps, 1.0).args[0]
    chosen = custom.KSamplerSelect.execute(sampler).args[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, chosen, sigmas, samples).args[0]["samples"]


def sampler_of(model, sampler="euler"):
    wired = dict(model=model, positive=WORDS[0], negative=WORDS[1], latent_image=empty())
    return ComfySeedSampler(KSamplerInputs(**wired, steps=4, cfg=3.0, sampler_name=sampler, scheduler="normal"))


def plain(model, seed, samples=None, **settings):
    """Samples of KSampler for ``seed``, with four steps and cfg 3 by default."""
    return ksample(model, *WORDS, samples or empty(), **{"steps": 4, "cfg": 3.0, "seed": seed, **settings})


def ranked(model, vae, vision, seeds, steps):
    """``seeds`` from the best to the worst score of plain runs with ``steps`` steps."""
    scores = {s: score_of(model, vae, vision, plain(model, s, steps=steps))[0] for s in seeds}
    return sorted(seeds, key=scores.get)


def scores_in(report):
    """(score before, score after) the optimisation, read from the report."""
    return tuple(float(v) for v in re.search(r"optimised .*: score (\S+) to (\S+) in", report).groups())


# search


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
def test_search_result_is_reproduced_by_its_seed_in_ksampler(model, select, sampler):
    found = select(sampler_name=sampler)
    assert torch.equal(found.samples["samples"], plain(model, found.seed, sampler=sampler))
    with torch.inference_mode():
        common = host_nodes.common_ksampler(model, found.seed, 4, 3.0, sampler, "normal", *WORDS, empty())[0]
    assert torch.equal(found.samples["samples"], common["samples"])
    assert torch.equal(custom_sampled(model, found.noise, empty(), sampler), found.samples["samples"])
    assert f"seed {found.seed} reproduces the result" in found.report


@pytest.mark.slow
def test_search_equals_a_search_recomputed_with_plain_runs(model, vae, vision, select):
    found = select()
    first = ranked(model, vae, vision, range(5, 11), steps=1)
    second = ranked(model, vae, vision, first[:2], steps=2)
    assert found.seed == second[0]
    expected = score_of(model, vae, vision, found.samples["samples"])[0]
    assert float(found.noise.details["score"]) == pytest.approx(expected, rel=1e-3)
    order = [int(s) for s in re.findall(r"^\d+\. seed (\d+):", found.report, re.MULTILINE)]
    assert order == second + first[2:]
    assert select(pick=2).seed == second[1]
    assert select(pick=4).seed == first[3]


def test_search_inpaints_a_masked_latent(model, select):
    found = select(latent_image=content(), denoise=0.6)
    assert torch.equal(found.samples["samples"], plain(model, found.seed, content(), denoise=0.6))
    assert torch.equal(found.samples["noise_mask"], content()["noise_mask"])


def test_one_candidate_equals_a_plain_run(model, select):
    found = select(candidates=1)
    assert found.seed == 5
    assert torch.equal(found.samples["samples"], plain(model, 5))


def test_images_on_a_path_form_a_batch(model, select):
    found = select(count=3)
    samples = found.samples["samples"]
    assert samples.shape == found.noise.noise.shape == (3, 8, 8, 8)
    assert torch.equal(samples[:1], plain(model, found.seed))
    together = custom_sampled(model, found.noise, latent(3, 8, 8))
    assert (together - samples).norm() < 1e-4 * samples.norm()


def test_semantic_weight_0_needs_no_encoder(select, model):
    found = select(semantic_weight=0.0, clip_vision=None)
    assert torch.equal(found.samples["samples"], plain(model, found.seed))


def test_preview_and_grid_begin_with_the_best_image(vae, select):
    found = select()
    with torch.inference_mode():
        best = vae.decode(found.samples["samples"])[0]
    assert torch.allclose(found.preview[0, 8:200, 8:200][1::3, 1::3], best, atol=1 / 255)
    assert torch.allclose(found.grid[0, 8:200, 8:200][1::3, 1::3], best, atol=1 / 255)
    assert select(grid_size=1).grid.numel() < found.grid.numel() / 4


def test_first_steps_limited_to_steps(model, select):
    found = select(steps=2, first_steps=4)
    assert "searched (candidates with steps): 6 with 2, 1 with 2;" in found.report
    assert "first_steps 4 is more than steps 2, so the first round takes 2 steps; lower first_steps" in found.report
    assert "a lower score is better" in found.report
    assert "first_steps" not in select(steps=2, first_steps=2).report
    assert torch.equal(found.samples["samples"], plain(model, found.seed, steps=2))


# optimisation


@pytest.mark.slow
def test_optimisation_lowers_the_score_and_its_noise_reproduces_the_samples(model, select):
    found = select(mode="optimize", iterations=6)
    before, after = scores_in(found.report)
    assert after < before
    assert found.seed == 5
    assert "seed 5 generates only the initial noise and does not reproduce the result" in found.report
    assert torch.equal(custom_sampled(model, found.noise, empty()), found.samples["samples"])
    assert not torch.equal(found.samples["samples"], plain(model, 5))
    assert re.search(r"predictions of the networks: \d+, \d+ of them recomputed for the gradient", found.report)


def test_0_iterations_leave_the_noise_unchanged(model, select):
    for mode in ("optimize", "search+optimize"):
        found = select(mode=mode, iterations=0)
        assert torch.equal(found.samples["samples"], plain(model, found.seed))
        run = sampler_of(model)
        assert torch.equal(found.noise.noise, run.noise_of(found.seed))
        assert f"seed {found.seed} reproduces the result" in found.report
    assert select().seed == found.seed


@pytest.mark.slow
def test_best_of_two_machines_is_the_best_of_one(select):
    """A search with all steps in the first round drops no candidate early, so the result cannot depend on the split."""
    exact = dict(first_steps=4)
    whole = select(**exact)
    parts = [select(candidates=3, share=k, shares=2, **exact) for k in range(2)]
    searched = [{*re.findall(r"^\d+\. seed (\d+):", found.report, re.M)} for found in (whole, *parts)]
    assert searched == [{*"5 6 7 8 9 10".split()}, {*"5 7 9".split()}, {*"6 8 10".split()}]
    compared = select(seeds=f"{parts[0].seed}, {parts[1].seed}", **exact)
    assert compared.seed == whole.seed and torch.equal(compared.samples["samples"], whole.samples["samples"])
    assert any(torch.equal(part.samples["samples"], whole.samples["samples"]) for part in parts)
    assert json.loads(parts[1].noise.details["settings"])["share"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs", [{}, {"semantic_weight": 0.0}, {"semantic_weight": 0.0, "clip_vision": None}, {"start": "centroid"}]
)
def test_references_that_show_something_else_are_left_out(select, inputs):
    close = references(1) + 0.05 * references(3)
    batch = torch.stack([close[0], 1.0 - references(1)[0], close[1], close[2]]).clamp(0, 1)
    found = select(references=batch, references_used=3, candidates=2, **inputs)
    expected = select(references=batch[[0, 2, 3]], candidates=2, **inputs)
    assert torch.equal(found.noise.noise, expected.noise.noise)
    assert re.findall(r"score \S+", found.report) == re.findall(r"score \S+", expected.report)
    assert re.search(r"references used \(.*\): 1 \(.*\), 3 \(.*\), 4 \(.*\); left out: 2 \(", found.report)
    assert "references used" not in expected.report
    assert json.loads(found.noise.details["scoring"])["references"] == 3


@pytest.mark.slow
def test_appearance_score_is_the_mean_squared_difference_from_the_references(model, vae, vision, select):
    """The reported scores equal scores computed from the samples before and after the optimisation."""
    found = select(mode="optimize", iterations=3, semantic_weight=0.0, clip_vision=None)
    with torch.inference_mode():
        squashed = F.interpolate(references().movedim(-1, 1), (SIDE, SIDE), mode="bicubic", antialias=True)
        target = model.model.process_latent_in(vae.encode(squashed.clamp(0, 1).movedim(1, -1))).mean(0)
        distances = [
            float(((model.model.process_latent_in(x) - target) ** 2).mean())
            for x in (plain(model, 5), found.samples["samples"])
        ]
    assert scores_in(found.report) == pytest.approx(distances, abs=1e-3)


@pytest.mark.slow
def test_run_without_checkpointing_returns_the_same_noise_without_recomputation(select):
    saved, recomputed = (select(mode="optimize", iterations=2, checkpointing=on) for on in (False, True))
    assert (saved.noise.noise - recomputed.noise.noise).norm() < 1e-4 * recomputed.noise.noise.norm()
    assert "recomputed for the gradient" in recomputed.report and "recomputed for the gradient" not in saved.report
    planned = [int(re.search(r"of (\d+) planned", found.report)[1]) for found in (saved, recomputed)]
    assert planned == [2 * 4 + 4 + 4, 2 * 8 + 4 + 4]  # two gradients, the score of the last iterate, the final image


@pytest.mark.slow
def test_last_steps_and_optimize_steps_lower_the_cost(select):
    def rows(**inputs):
        report = select(mode="optimize", iterations=1, **inputs).report
        return [int(n) for n in re.search(r"networks: (\d+), (\d+) of", report).groups()]

    whole, last, proxy = rows(), rows(last_steps=1), rows(optimize_steps=2)
    # two runs, one recomputation, one final image, and three calls that check the gradient; guidance doubles the rows
    assert whole == [2 * (4 + 4 + 4 + 4 + 3), 2 * 4]
    assert last == [2 * (4 + 4 + 4 + 1 + 3), 2 * 1]
    assert proxy == [2 * (2 + 2 + 2 + 4 + 3), 2 * 2]


@pytest.mark.slow
def test_search_and_optimize_combined(model, select):
    found = select(mode="search+optimize", optimized=2, iterations=1, count=2)
    assert found.samples["samples"].shape[0] == 2
    assert found.report.count("optimised seed") == 2
    assert found.seed in range(5, 11)


def test_call_stack_of_the_denoiser_enters_code_without_comfyui_once(model, select):
    root, stacks = Path(inspect.getfile(SeedSelect)).parents[1], []

    def record_stack(*_):
        files = (Path(frame.f_code.co_filename) for frame, _ in traceback.walk_stack(None))
        pack_files = [f.relative_to(root) for f in files if f.is_relative_to(root)]
        stacks.append([f for f in pack_files if f.parts[0] in ("nodes", "techniques", "host")])

    hook = model.model.diffusion_model.register_forward_pre_hook(record_stack)
    try:
        select(mode="optimize", iterations=1)
    finally:
        hook.remove()
    technique = Path("techniques", "seed_select")
    # two runs, one recomputation, and the three calls that check the gradient
    assert sum(technique / "optimize.py" in files for files in stacks) == 3 * 4 + 3
    for files in stacks:
        # gradient_check.py is in the stack only for the calls that check the gradient
        assert len({f for f in files if f.name != "gradient_check.py"}) <= 6, files
        without_comfyui = [f.parent == technique and not f.name.startswith("comfy_") for f in files]
        assert [entered for entered, _ in itertools.groupby(without_comfyui)].count(True) == 1, files


@pytest.mark.slow
def test_patched_model_is_optimised_with_its_patches(model, select):
    patched = lora(model, 3)
    found = select(model=patched, mode="optimize", iterations=2)
    assert torch.equal(custom_sampled(patched, found.noise, empty()), found.samples["samples"])


@pytest.mark.slow
def test_optimisation_lowers_the_score_of_the_demo_checkpoint(vision):
    with torch.inference_mode():
        model, clip, vae = modules.load_checkpoint("general")
        words = [host_nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a cat", "")]
        wired = dict(model=model, positive=words[0], negative=words[1], vae=vae, clip_vision=vision)
        inputs = {**defaults(SeedSelect), **wired, **SETTINGS, "references": references(), "latent_image": latent()}
        found = Result(*SeedSelect.execute(**{**inputs, "mode": "optimize", "iterations": 2}).args)
    before, after = scores_in(found.report)
    assert after < before


# initial noises from the references


@pytest.mark.slow
def test_start_inversion_and_centroid_use_the_inverted_references(model, vae, select):
    run = sampler_of(model)
    with torch.inference_mode():
        squashed = F.interpolate(references().movedim(-1, 1), (SIDE, SIDE), mode="bicubic", antialias=True)
        latents = vae.encode(squashed.clamp(0, 1).movedim(1, -1))

        def work(s):
            return [s.noise_of(invert(s.denoise, x * 0.5, s.sigmas)) for x in latents.split(1)]

        expected = run.session(SessionSettings(gradients=False, cfg=1.0, steps=50)).run(work)
    found = select(start="inversion", candidates=2)
    assert any(torch.equal(found.noise.noise, x.cpu()) for x in expected)
    assert found.seed == 5
    assert "no integer seed generates this noise" in found.report
    centroid = select(start="centroid", mode="optimize", iterations=1)
    assert "centroid, optimised" in centroid.report
    assert torch.equal(custom_sampled(model, centroid.noise, empty()), centroid.samples["samples"])


# progress and interrupts


@pytest.mark.slow
def test_progress_shows_evaluations_best_score_and_preview(select, monkeypatch):
    seen, texts = [], []

    def hook(done, total, preview, node_id=None):
        seen.append((done, total, preview))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(SamplingProgress, "_show_text", staticmethod(texts.append))
    select(mode="search+optimize")
    done = [d for d, *_ in seen]
    assert done == sorted(done)
    # three rounds of the search, two gradients, the score of the last iterate, the final image
    assert seen[-1][0] == seen[-1][1] == 6 + 4 + 4 + 2 * 8 + 4 + 4
    assert {p[0] for *_, p in seen if p is not None} == {"JPEG"}
    assert texts[-1] == f"best score {texts[-1].split()[2][:-1]}, 38 of 38 model evaluations"


def test_score_text_is_sent_to_the_running_node(model, monkeypatch):
    sent = []
    server = SimpleNamespace(send_progress_text=lambda *a: sent.append(a))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    progress = SamplingProgress(model, 4)
    progress.show(text="without a running node")
    with CurrentNodeContext("prompt", "7"):
        progress.show(text="best score 1")
    assert sent == [("best score 1", "7")]


@pytest.mark.slow
def test_interrupted_search_samples_the_best_candidate_with_all_steps(model, vae, vision, select):
    found = select(model=interrupt_at(model, 3))  # interrupted in the second round
    best = ranked(model, vae, vision, range(5, 11), steps=1)[0]
    assert found.seed == best
    assert torch.equal(found.samples["samples"], plain(model, best))
    assert found.report.startswith("interrupted: this is the best so far")
    assert not comfy.model_management.processing_interrupted()
    again = select()
    assert not again.report.startswith("interrupted")


def test_interrupt_in_the_last_round_returns_the_candidate_of_rank_pick(model, select):
    whole = select(pick=2)
    assert select(pick=2, model=interrupt_at(model, 5)).seed == whole.seed


@pytest.mark.slow
def test_interrupted_optimisation_returns_its_best_noise(model, select):
    found = select(mode="optimize", iterations=5, model=interrupt_at(model, 10))  # in the second iteration
    assert found.report.startswith("interrupted")
    assert torch.equal(found.samples["samples"], plain(model, 5))
    searched = select(mode="search+optimize", model=interrupt_at(model, 1 + 2 + 4 + 2))  # before the first gradient
    assert torch.equal(searched.samples["samples"], plain(model, searched.seed))


def test_second_interrupt_or_interrupt_before_the_first_score_stops_the_node(model, select):
    for stopping in (interrupt_at(interrupt_at(model, 3), 5), interrupt_at(model, 1)):
        with pytest.raises(Interrupted):
            select(model=stopping)
        assert not comfy.model_management.processing_interrupted()


# files


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    return tmp_path


@pytest.mark.slow
def test_saved_seed_round_trips(model, select, folders):
    found = select(mode="optimize")
    (saved,) = SaveSeed.execute(found.noise, "seeds/cat").ui["seeds"]
    name = f"{saved['subfolder']}/{saved['filename']} [output]"
    assert LoadSeed.define_schema().inputs[0].options == [name, *modules.shipped_seeds()]
    assert LoadSeed.validate_inputs(name) is True
    first = LoadSeed.fingerprint_inputs(name)
    loaded = LoadSeed.execute(name).args[0]
    assert torch.equal(loaded.noise, found.noise.noise)
    assert torch.equal(custom_sampled(model, loaded, empty()), found.samples["samples"])
    assert loaded.details == found.noise.details
    assert json.loads(loaded.details["sampling"])["sampler_name"] == "euler"
    assert json.loads(loaded.details["settings"])["optimize"]["iterations"] == 2
    assert loaded.details["model"] == "BaseModel"
    (folders / "output" / saved["subfolder"] / saved["filename"]).write_bytes(b"other")
    assert LoadSeed.fingerprint_inputs(name) != first


@pytest.mark.slow
@pytest.mark.parametrize("name", modules.shipped_seeds())
def test_shipped_seed_reproduces_its_score(name, vision):
    """Sampling with the settings in the file reproduces the score in the file: the probability of the prompt."""
    assert LoadSeed.validate_inputs(name) is True and LoadSeed.fingerprint_inputs(name) == name
    with torch.inference_mode():
        noise = LoadSeed.execute(name).args[0]
        model, clip, vae = modules.load_checkpoint(noise.details["model_file"])
        prompt, sampling = noise.details["prompt"], json.loads(noise.details["sampling"])
        words = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")]
        size = {"samples": torch.zeros(1, 4, 16, 16), "downscale_ratio_spacial": 8}
        inputs = KSamplerInputs(model=model, positive=words[0], negative=words[1], latent_image=size, **sampling)
        scoring = ScoringSettings(references=modules.load_references("rabbit")[0], vae=vae, clip_vision=vision)
        samples = ComfySeedSampler(inputs, scoring).generate(noise.noise)
        logits = SCALE * vision.similarity(vae.decode(samples), names())
    found = float(logits.softmax(1)[0, names().index(prompt)])
    assert found == pytest.approx(float(noise.details["score"]), rel=1e-3)
    assert found > float(noise.details["mean_score"])


def test_missing_file_and_empty_prefix_and_noise_without_values_rejected(folders):
    assert "there is no seed file" in LoadSeed.validate_inputs("gone.seed.safetensors")
    assert LoadSeed.validate_inputs(None) is True
    noise = custom.RandomNoise.execute(3).args[0]
    with pytest.raises(ValueError, match="got Noise_RandomNoise, which holds no values to save; connect"):
        SaveSeed.execute(noise, "seeds/cat")
    with pytest.raises(ValueError, match="has no file name"):
        SaveSeed.execute(SeedNoise(torch.zeros(1, 4, 8, 8), 0), "")


# errors


def with_nan(model):
    out = model.clone()
    out.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
    return out


def test_non_finite_score_error_names_its_seed(model, select):
    with pytest.raises(ValueError, match=r"the score of seed 5 is nan with 1 step"):
        select(model=with_nan(model))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(references=torch.zeros(0, 32, 32, 3)), "references is empty, its size is 0x32x32x3"),
        (dict(references=torch.full((2, 32, 32, 3), 0.5)), "reference 1 of 2 is of one colour"),
        (
            dict(clip_vision=None),
            "semantic_weight 10 needs an image encoder; connect clip_vision, or set semantic_weight to 0",
        ),
        (dict(semantic_weight=0.0, appearance_weight=0.0), "both 0, so nothing is scored"),
        (dict(latent_image=latent(2, 8, 8)), "2 latents.*batch_size to 1"),
        (
            dict(latent_image={**latent(1, 8, 8), "noise_mask": torch.ones(2, 8, 8)}),
            "expected one noise mask in latent_image, got 2",
        ),
        (
            dict(latent_image={"samples": torch.zeros(1, 8, 3, 8, 8)}),
            r"expected an image latent \[1, C, h, w\] for BaseModel, got the size 1x8x3x8x8",
        ),
        (dict(mode="optimize", sampler_name="dpmpp_2m_sde"), "the sampler dpmpp_2m_sde has no gradient"),
        (dict(mode="search+optimize", last_steps=9), "last_steps 9 is not between 1 and 4"),
        (dict(pick=7), "expected at least 7 candidates to select 1 noise starting at pick 7"),
        (dict(references_used=3), "references_used 3 is outside 1 to 2, the number of references"),
        (dict(share=2, shares=2), "share 2 is not between 0 and 1 for shares 2; number the machines from 0"),
        (dict(shares=2, start="inversion"), "shares 2 needs start noise"),
        (dict(seeds="5, cat"), "'cat' in seeds is not an integer"),
        (
            dict(start="centroid", references=references(1)),
            "start centroid needs at least 2 references, got 1; connect more",
        ),
    ],
    ids="empty colour encoder weights batch masks video sampler last_steps pick references_used share shares seeds"
    " centroid".split(),
)
def test_invalid_inputs_rejected_before_the_search(model, select, inputs, message):
    with forwards(model) as rows, pytest.raises(ValueError, match=message):
        select(**inputs)
    assert not rows  # also for start centroid, which is rejected before the references are inverted


def test_model_without_a_gradient_rejected_before_the_search(model, select):
    cached = with_easycache(model)
    with forwards(model) as rows, pytest.raises(ValueError, match=r"EasyCache.*mode search"):
        select(model=cached, mode="search+optimize")
    assert not rows


def test_nested_latents_and_vae_of_another_model_rejected(select):
    nested = comfy.nested_tensor.NestedTensor([torch.zeros(1, 4, 2, 8, 8), torch.zeros(1, 8, 5)])
    with pytest.raises(ValueError, match="got the size 1x4x2x8x8 of a nested latent"):
        select(latent_image={"samples": nested})
    with pytest.raises(ValueError, match="decodes latents of 8 channels, the model samples 1x4x8x8"):
        select(model=unet(0))


# the schema


@pytest.mark.parametrize("node", [SeedSelect, SaveSeed, LoadSeed], ids=lambda node: node.__name__)
def test_schema_and_signature_agree(node):
    schema = node.define_schema()
    assert [i.id for i in schema.inputs if not i.optional] + [i.id for i in schema.inputs if i.optional] == list(
        inspect.signature(node.execute).parameters
    )
    assert schema.node_id == node.__name__


def test_seed_is_fixed_after_generate():
    seed = next(i for i in SeedSelect.define_schema().inputs if i.id == "seed")
    assert seed.control_after_generate == io.ControlAfterGenerate.fixed


@pytest.mark.parametrize("sampler", sorted(set(comfy.samplers.SAMPLER_NAMES) - {"dpm_adaptive"}))
def test_calls_per_step_equal_the_model_calls_of_each_sampler(model, sampler):
    run = sampler_of(model, sampler)
    run.generate(run.noise_of(0))
    calls = run.counter.rows / 2  # with guidance, each call has two rows
    assert 4 * (run.calls_per_step - 1) < calls <= 4 * run.calls_per_step + 1
