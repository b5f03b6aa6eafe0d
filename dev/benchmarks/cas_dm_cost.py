"""What does a Cas-DM head cost beside the model that wears it? Times and memory of sampling with the head on and off.

Every round samples four times by the host's sampler, with the head and without it in turn, first one and then the other:
unguided (cfg 1), where the model makes one prediction a step and the head weighs most, and guided, where it makes two. The
model's step is the time inside its forwards with the head off; what the head adds is, of the two runs of one round,

  on - off, per step: everything that a user waits for. It holds the jitter of the model's own forwards, which on a CPU is
    larger than the head's work.
  between the forwards, on - off, per step: without that jitter, but also without what the head may do to the model's
    forwards by taking turns with them in the caches. The head computes nowhere else, so this is held against the target
    too.
  the head alone: its hook's computation, called by itself.

FLOPs are counted by torch on the shapes of a step (2 per multiplication and addition), of the SD 1.5-sized model.

Memory is the highest of a fresh process that samples unguided: what CUDA has allocated, or on a CPU the resident memory,
less what it was before there was a model. The SD 1.5-sized checkpoint is random: what it costs is real.
"""

import argparse
from dataclasses import asdict, dataclass

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import headless

headless.start()

import comfy.ldm.modules.attention as attention  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402

from ...demo.modules import load_checkpoint  # noqa: E402
from ...nodes.cas_dm import CasDMHead  # noqa: E402
from ...techniques.cas_dm.comfy_hook import CASTING, made_for  # noqa: E402
from ...techniques.cas_dm.mix import refine  # noqa: E402
from ...techniques.cas_dm.network import CasDMHeadConfig, CasDMHeadNet, Head, HeadFacts, new_head  # noqa: E402
from .environment import facts, keep  # noqa: E402
from .fresh_process import forget_peak, in_fresh_process, resident  # noqa: E402
from .fusion_case import DTYPES, GIB, ROOM  # noqa: E402
from .fusion_cost import verdict  # noqa: E402
from .random_models import SD15, SD15_PARAMETERS, conditioning, sd15  # noqa: E402
from .stopwatch import Stopwatch, Timing, median  # noqa: E402

TIME_TARGET, MEMORY_TARGET = 0.05, 0.02
HELD = {"whole_share": "on - off", "between_share": "between the forwards"}  # against the former
GUIDANCE = {"unguided": 1.0, "guided": 5.0}
OFF, ON = "off", "on"
SEED, ALONE = 1, 20  # calls of the head by itself


@dataclass(frozen=True)
class Setting:
    """``size``: side of the latent."""

    name: str
    size: int
    steps: int
    dtype: str

    @property
    def title(self) -> str:
        model = {"sd15": f"an SD 1.5-sized checkpoint of {SD15_PARAMETERS / 1e6:.0f} M random parameters"}
        return (
            f"{model.get(self.name, 'the demo checkpoint general')}, {self.dtype}, latent {self.size} x {self.size},"
            f" batch 1, euler, steps: {self.steps}, cfg 1 and {GUIDANCE['guided']:g}"
        )


class Case:
    """A model and a head of the default size, ready to sample."""

    def __init__(self, setting: Setting):
        self.setting = setting
        if setting.name == "sd15":
            self.model = sd15(1, DTYPES[setting.dtype])
            self.words = conditioning(3), conditioning(4)
        else:
            self.model, clip, _ = load_checkpoint("general")
            self.words = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a cat", "")]
        self.channels = self.model.get_model_object("latent_format").latent_channels

    def head(self, cfg: float) -> Head:
        """As if trained: no weight is zero."""
        made, draws = made_for(self.model, cfg), torch.Generator().manual_seed(2)
        known = HeadFacts(latent_format=made.latent_format, prediction=made.prediction, cfg=cfg)
        head = new_head(CasDMHeadConfig(channels=made.channels, condition_on_x_t=True), known, draws)
        weights = {k: w if w.any() else 0.02 * torch.randn(w.shape, generator=draws) for k, w in head.weights.items()}
        return Head(head.config, weights, known)

    def models(self, cfg: float) -> dict:
        return {OFF: self.model, ON: CasDMHead.execute(self.model, self.head(cfg), 1.0, 0.0, 1.0).args[0]}

    def paint(self, model, cfg: float) -> torch.Tensor:
        """What the KSampler node does."""
        s = self.setting
        latent = torch.zeros(1, self.channels, s.size, s.size)
        noise = comfy.sample.prepare_noise(latent, SEED)
        return comfy.sample.sample(
            model, noise, s.steps, cfg, "euler", "normal", *self.words, latent, disable_pbar=True, seed=SEED
        )


def rounds(case: Case, watch: Stopwatch, count: int) -> dict[str, list[dict[str, Timing]]]:
    """By guidance, timings of each of ``count`` rounds, after the paths have been warmed up."""
    models = {name: case.models(cfg) for name, cfg in GUIDANCE.items()}
    for name, cfg in GUIDANCE.items():
        if not case.paint(models[name][ON], cfg).isfinite().all():
            raise SystemExit(f"sampling is not finite in {case.setting.dtype}; try another --dtype")
    found = {name: [] for name in GUIDANCE}
    for n in range(count):
        for name, cfg in GUIDANCE.items():
            pictures, row = {}, {}
            for kind in (OFF, ON) if n % 2 == 0 else (ON, OFF):

                def run(kind=kind, name=name, cfg=cfg, pictures=pictures):
                    pictures[kind] = case.paint(models[name][kind], cfg)

                row[kind] = watch.time(run)
            if torch.equal(pictures[ON], pictures[OFF]) or row[ON].batches != row[OFF].batches:
                raise SystemExit(
                    f"the runs do not compare: forwards of {row[OFF].batches} rows without the head and of"
                    f" {row[ON].batches} with it, which must be the same; pictures must not be"
                )
            found[name].append(row)
        print(f"{case.setting.name}: round {n + 1} of {count}", flush=True)
    return found


def alone(case: Case, watch: Stopwatch) -> dict:
    """Seconds of what the hook computes in a step."""
    s, device = case.setting, comfy.model_management.get_torch_device()
    network = case.head(1.0).network(CASTING).to(device)
    x0, x = (torch.randn(1, case.channels, s.size, s.size, device=device, dtype=torch.float32) for _ in range(2))
    sigma = torch.ones(1, device=device)
    refine(network, x0, x, sigma)
    return median([watch.time(lambda: refine(network, x0, x, sigma)).seconds for _ in range(ALONE)])


def flops(size: int) -> dict[str, int]:
    """Of one prediction of SD 1.5 and of the head."""
    config = comfy.supported_models.SD15(SD15)
    config.set_inference_dtype(torch.float32, None)
    theta = config.get_model({}, device=torch.device("meta")).diffusion_model
    before = attention.optimized_attention
    attention.optimized_attention = attention.attention_basic  # others ask the device for its memory
    try:
        with torch.device("meta"):
            x, t, words = torch.zeros(1, 4, size, size), torch.zeros(1), torch.zeros(1, 77, SD15["context_dim"])
            head = CasDMHeadNet(CasDMHeadConfig(channels=4, condition_on_x_t=True))
            with FlopCounterMode(display=False) as of_theta:
                theta(x, t, context=words)
            with FlopCounterMode(display=False) as of_head:
                head(x, t, x)
    finally:
        attention.optimized_attention = before
    return {"model": of_theta.get_total_flops(), "head": of_head.get_total_flops()}


def costs(found: list[dict[str, Timing]], by_itself: float, steps: int) -> dict[str, dict]:
    """Medians of the quantities of the tables; one value a round, in seconds per step, or shares of the model's step."""
    theta = [row[OFF].forwards / steps for row in found]
    whole = [(row[ON].seconds - row[OFF].seconds) / steps for row in found]
    between = [(row[ON].between - row[OFF].between) / steps for row in found]
    rows = {"model": theta, "whole": whole, "between": between}
    shares = {"whole": whole, "between": between, "alone": [by_itself] * len(found)}
    rows |= {f"{name}_share": [v / t for v, t in zip(values, theta)] for name, values in shares.items()}
    return {name: median(values) for name, values in rows.items()}


def peak_of(setting: dict, kind: str) -> dict[str, int]:
    """Bytes above those before there was a model, at most while sampling unguided. For a fresh process."""
    comfy.utils.PROGRESS_BAR_ENABLED = False
    cuda = torch.cuda.is_available()
    with torch.inference_mode():
        before = 0 if cuda else resident(peak=False)
        case = Case(Setting(**setting))
        model = case.models(1.0)[kind]
        if cuda:
            case.paint(model, 1.0)  # loads the model
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()  # of making the model
        case.paint(model, 1.0)
        peak = torch.cuda.max_memory_allocated() if cuda else resident(peak=True)
    return {"peak": peak - before}


def memory(setting: Setting, repeats: int) -> dict:
    found = {OFF: [], ON: []}
    for n in range(repeats):
        for kind in found:
            found[kind].append(in_fresh_process(peak_of, asdict(setting), kind)["peak"])
            print(f"{setting.name}: memory {n + 1} of {repeats}, {kind}: {found[kind][-1] / 2**20:.1f} MiB", flush=True)
    more = median(found[ON])["median"] / median(found[OFF])["median"] - 1.0
    return {"peaks": found, "more": more, "verdict": "met" if more <= MEMORY_TARGET else "missed"}


def measure(setting: Setting, options, device: torch.device) -> dict:
    found = {"setting": asdict(setting), "title": setting.title}
    if not options.no_memory:
        found["memory"] = memory(setting, options.memory_repeats)
    if setting.name == "sd15":
        found["flops"] = flops(setting.size)
    case = Case(setting)
    watch = Stopwatch([case.model.model.diffusion_model], device)
    try:
        timings = rounds(case, watch, options.rounds)
        found["alone"] = alone(case, watch)
    finally:
        watch.close()
    for name, rows in timings.items():
        values = costs(rows, found["alone"]["median"], setting.steps)
        found[name] = {
            "time": values,
            "verdict": {name: verdict(values[key], TIME_TARGET) for key, name in HELD.items()},
            "rounds": [{k: {"seconds": t.seconds, "forwards": t.forwards} for k, t in row.items()} for row in rows],
        }
    return found


def markdown(found: dict) -> str:
    lines = [f"\n## {found['title']}\n"]
    lines += ["| | unguided (interval of the median) | guided |", "|---|---|---|"]
    rows = [
        ("the model's step", "model", "ms", 1e3),
        ("**on - off**", "whole", "ms", 1e3),
        ("**the same, of the model's step**", "whole_share", "%", 100),
        ("between the forwards, on - off", "between", "ms", 1e3),
        ("the same, of the model's step", "between_share", "%", 100),
        ("the head alone, of the model's step", "alone_share", "%", 100),
    ]
    for title, key, unit, factor in rows:
        cells = []
        for name in GUIDANCE:
            value = found[name]["time"][key]
            low, high = (factor * v for v in value["interval"])
            cells.append(f"{factor * value['median']:.2f} {unit} ({low:.2f} to {high:.2f})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    count = len(found["guided"]["rounds"])
    lines.append(f"\n{count} rounds. The head alone: {1e3 * found['alone']['median']:.2f} ms, median of {ALONE} calls.")
    if "flops" in found:
        theta, head = (found["flops"][name] / 1e9 for name in ("model", "head"))
        lines.append(
            f"GFLOP of one prediction: model {theta:.1f}, head {head:.2f}: {100 * head / theta:.2f} % unguided,"
            f" {50 * head / theta:.2f} % guided."
        )
    if found["setting"]["name"] == "demo":
        lines.append("The targets are for models of SD 1.5's size; this one is small beside the head.")
    for name in GUIDANCE:
        verdicts = "; ".join(f"{what}: **{said}**" for what, said in found[name]["verdict"].items())
        lines.append(f"Time, {name}, at most {100 * TIME_TARGET:g} % wanted: {verdicts}.")
    if "memory" in found:
        m = found["memory"]
        peaks = {kind: median(values)["median"] / 2**20 for kind, values in m["peaks"].items()}
        lines.append(
            f"Peak memory: {peaks[OFF]:.1f} MiB without the head, {peaks[ON]:.1f} with it, {100 * m['more']:+.2f} %; at most"
            f" {100 * MEMORY_TARGET:+g} % wanted: **{m['verdict']}**."
        )
    return "\n".join(lines)


def check_room(setting: Setting) -> None:
    needed = SD15_PARAMETERS * DTYPES[setting.dtype].itemsize + ROOM["ram"]
    if setting.name == "sd15" and (free := psutil.virtual_memory().available) < needed:
        raise SystemExit(
            f"an SD 1.5-sized model in {setting.dtype} needs {needed / GIB:.1f} GiB of RAM and {free / GIB:.1f} GiB are"
            " free; free some, or use --models demo"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=("sd15", "demo"), default="sd15", help="demo: small, to try it quickly")
    parser.add_argument("--rounds", type=int, help="(10; on a CPU 3)")
    parser.add_argument("--size", type=int, help="side of the latent (64; of the demo 16)")
    parser.add_argument("--steps", type=int, help="of each run (20; on a CPU 1 for the SD 1.5-sized model)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the SD 1.5-sized model (fp16; on a CPU fp32)")
    parser.add_argument("--memory-repeats", type=int, default=1, help="processes of each kind")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--name", help="of the result file (cas_dm_cost, cas_dm_cost_demo)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    device = comfy.model_management.get_torch_device()
    if device.type not in ("cuda", "cpu"):
        raise SystemExit(f"this measures on CUDA and on CPUs, not on {device.type}")
    cuda, demo = device.type == "cuda", options.models == "demo"
    options.rounds = options.rounds or (10 if cuda or demo else 3)
    setting = Setting(
        options.models,
        options.size or (16 if demo else 64),
        options.steps or (20 if cuda or demo else 1),
        "fp32" if demo else options.dtype or ("fp16" if cuda else "fp32"),
    )
    check_room(setting)
    if (busy := psutil.cpu_percent(interval=1.0)) > 20.0:
        print(f"other work keeps the processor {busy:.0f} % busy: the times will jitter", flush=True)
    with torch.inference_mode():
        found = measure(setting, options, device)
    path = keep(
        options.name or ("cas_dm_cost_demo" if demo else "cas_dm_cost"),
        {"settings": vars(options), "busy_percent_before": busy, **found},
    )
    print(markdown(found))
    print(f"\n{facts()['device']}; kept in {path.name}")


if __name__ == "__main__":
    main()
