"""Cost of a Cas-DM head: time and memory of sampling with and without the head.

Every round samples four times with ComfyUI's sampler: unguided and guided, each with and without the head in
alternating order. Unguided sampling (cfg 1) needs one prediction of the model per step, so the head's relative cost is
largest there. Guided sampling needs two. The model's step is the time in its forward passes without the head. The cost
of the head is measured in three ways, for unguided and for guided sampling ("on" is with the head, "off" without it):

  on - off, per step: the difference of the whole runs, as a user notices it. It contains the variation of the model's
    forward passes, which exceeds the head's time on a CPU.
  between the forwards, on - off, per step: the difference of the time outside the model's forward passes. The head
    computes only there, so this quantity is also compared with the target. It excludes the variation of the forward
    passes. It also excludes effects of the head on the forward passes, such as cache misses.
  the head alone: the time of its hook, called separately.

torch counts the FLOPs of one prediction of the SD 1.5-sized model and of the head (2 per multiplication and addition).

Memory is the peak of a new process that samples unguided, minus its memory before the model was created. It is the
memory that CUDA allocated, or the resident memory on a CPU. The SD 1.5-sized checkpoint has random weights; its cost is
that of a real one.
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
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402

from ...demo.modules import load_checkpoint  # noqa: E402
from ...nodes.cas_dm import CasDMHead  # noqa: E402
from ...techniques.cas_dm.comfy_hook import CASTING, head_target  # noqa: E402
from ...techniques.cas_dm.mix import refine  # noqa: E402
from ...techniques.cas_dm.network import CasDMHeadConfig, CasDMHeadNet, Head, HeadFacts, new_head  # noqa: E402
from .environment import busy_percent, publish, script_parser  # noqa: E402
from .fresh_process import allocated, in_fresh_process, reset_peak  # noqa: E402
from .fusion_case import DTYPES, GIB, RESERVE  # noqa: E402
from .fusion_cost import verdict  # noqa: E402
from .random_models import SD15, SD15_PARAMETERS, conditioning, sd15  # noqa: E402
from .sampling import encode, sample  # noqa: E402
from .stopwatch import Stopwatch, Timing, median  # noqa: E402

TIME_TARGET, MEMORY_TARGET = 0.05, 0.02
# quantities that are compared with TIME_TARGET
COMPARED = {"whole_share": "on - off", "between_share": "between the forwards"}
GUIDANCE = {"unguided": 1.0, "guided": 5.0}
OFF, ON = "off", "on"
SEED, ALONE = 1, 20  # ALONE: number of separate calls of the head


@dataclass(frozen=True)
class Setting:
    """A checkpoint and its sampling settings."""

    name: str
    size: int  # side of the latent
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
            self.prompts = conditioning(3), conditioning(4)
        else:
            self.model, clip, _ = load_checkpoint("general")
            self.prompts = encode(clip, "a cat"), encode(clip, "")
        self.channels = self.model.get_model_object("latent_format").latent_channels

    def head(self, cfg: float) -> Head:
        """A head with random weights. No weight tensor is all zero, as after a training."""
        made, generator = head_target(self.model, cfg), torch.Generator().manual_seed(2)
        facts = HeadFacts(latent_format=made.latent_format, prediction=made.prediction, cfg=cfg)
        head = new_head(CasDMHeadConfig(channels=made.channels, condition_on_x_t=True), facts, generator)
        weights = {
            k: w if w.any() else 0.02 * torch.randn(w.shape, generator=generator) for k, w in head.weights.items()
        }
        return Head(head.config, weights, facts)

    def models(self, cfg: float) -> dict:
        return {OFF: self.model, ON: CasDMHead.execute(self.model, self.head(cfg), 1.0, 0.0, 1.0).args[0]}

    def generate(self, model, cfg: float) -> torch.Tensor:
        """Sample as the KSampler node does."""
        s = self.setting
        latent = torch.zeros(1, self.channels, s.size, s.size)
        return sample(model, *self.prompts, SEED, latent, s.steps, cfg, "euler", "normal")


def rounds(case: Case, watch: Stopwatch, count: int) -> dict[str, list[dict[str, Timing]]]:
    """{guidance: timings of ``count`` rounds}, after warm-up runs."""
    models = {name: case.models(cfg) for name, cfg in GUIDANCE.items()}
    for name, cfg in GUIDANCE.items():
        if not case.generate(models[name][ON], cfg).isfinite().all():
            raise SystemExit(f"sampling returned non-finite values in {case.setting.dtype}; try another --dtype")
    found = {name: [] for name in GUIDANCE}
    for n in range(count):
        for name, cfg in GUIDANCE.items():
            images, row = {}, {}
            for kind in (OFF, ON) if n % 2 == 0 else (ON, OFF):

                def run(kind=kind, name=name, cfg=cfg, images=images):
                    images[kind] = case.generate(models[name][kind], cfg)

                row[kind] = watch.time(run)
            if torch.equal(images[ON], images[OFF]) or row[ON].batches != row[OFF].batches:
                raise SystemExit(
                    f"expected equal batch sizes of the forward passes and different images, got batches"
                    f" {row[OFF].batches} without the head and {row[ON].batches} with it; if ComfyUI splits batches"
                    " because memory is low, free memory"
                )
            found[name].append(row)
        print(f"{case.setting.name}: round {n + 1} of {count}", flush=True)
    return found


def alone(case: Case, watch: Stopwatch) -> dict:
    """Seconds of the hook's computation in a step."""
    s, device = case.setting, comfy.model_management.get_torch_device()
    network = case.head(1.0).network(CASTING).to(device)
    x0, x = (torch.randn(1, case.channels, s.size, s.size, device=device, dtype=torch.float32) for _ in range(2))
    sigma = torch.ones(1, device=device)
    refine(network, x0, x, sigma)
    return median([watch.time(lambda: refine(network, x0, x, sigma)).seconds for _ in range(ALONE)])


def flops(size: int) -> dict[str, int]:
    """FLOPs of one prediction of SD 1.5 and of the head."""
    config = comfy.supported_models.SD15(SD15)
    config.set_inference_dtype(torch.float32, None)
    theta = config.get_model({}, device=torch.device("meta")).diffusion_model
    before = attention.optimized_attention
    # the other implementations of attention query the free memory of the device, which fails on the meta device
    attention.optimized_attention = attention.attention_basic
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
    """Medians over the rounds of the table's quantities, in seconds per step or as shares of the model's step."""
    theta = [row[OFF].forwards / steps for row in found]
    whole = [(row[ON].seconds - row[OFF].seconds) / steps for row in found]
    between = [(row[ON].between - row[OFF].between) / steps for row in found]
    rows = {"model": theta, "whole": whole, "between": between}
    shares = {"whole": whole, "between": between, "alone": [by_itself] * len(found)}
    rows |= {f"{name}_share": [v / t for v, t in zip(values, theta)] for name, values in shares.items()}
    return {name: median(values) for name, values in rows.items()}


def peak_of(setting: dict, kind: str) -> dict[str, int]:
    """Peak bytes while sampling unguided, minus the bytes before the model was created. Called in a new process."""
    comfy.utils.PROGRESS_BAR_ENABLED = False
    with torch.inference_mode():
        before = allocated(peak=False)
        case = Case(Setting(**setting))
        model = case.models(1.0)[kind]
        if torch.cuda.is_available():
            case.generate(model, 1.0)  # loads the model
        reset_peak()  # excludes the creation of the model
        case.generate(model, 1.0)
        return {"peak": allocated(peak=True) - before}


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
            "verdict": {name: verdict(values[key], TIME_TARGET) for key, name in COMPARED.items()},
            "rounds": [{k: {"seconds": t.seconds, "forwards": t.forwards} for k, t in row.items()} for row in rows],
        }
    return found


def markdown(found: dict) -> str:
    lines = [f"\n## {found['title']}\n"]
    lines += ["| | unguided (interval of the median) | guided |", "|---|---|---|"]
    rows = [
        ("the model's step", "model", "ms", 1e3),
        ("**on - off**", "whole", "ms", 1e3),
        ("**on - off, relative to the model's step**", "whole_share", "%", 100),
        ("between the forwards, on - off", "between", "ms", 1e3),
        ("between the forwards, on - off, relative to the model's step", "between_share", "%", 100),
        ("the head alone, relative to the model's step", "alone_share", "%", 100),
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
        lines.append("The targets are for models of SD 1.5's size; this model is small in relation to the head.")
    for name in GUIDANCE:
        verdicts = "; ".join(f"{quantity}: **{result}**" for quantity, result in found[name]["verdict"].items())
        lines.append(f"Time, {name}, target at most {100 * TIME_TARGET:g} %: {verdicts}.")
    if "memory" in found:
        m = found["memory"]
        peaks = {kind: median(values)["median"] / 2**20 for kind, values in m["peaks"].items()}
        lines.append(
            f"Peak memory: {peaks[OFF]:.1f} MiB without the head, {peaks[ON]:.1f} with it, {100 * m['more']:+.2f} %; target at"
            f" most {100 * MEMORY_TARGET:+g} %: **{m['verdict']}**."
        )
    return "\n".join(lines)


def check_memory(setting: Setting) -> None:
    needed = SD15_PARAMETERS * DTYPES[setting.dtype].itemsize + RESERVE["ram"]
    if setting.name == "sd15" and (free := psutil.virtual_memory().available) < needed:
        raise SystemExit(
            f"an SD 1.5-sized model in {setting.dtype} needs {needed / GIB:.1f} GiB of RAM, but only"
            f" {free / GIB:.1f} GiB are available; free memory, or use --models demo"
        )


def arguments() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--models", choices=("sd15", "demo"), default="sd15", help="demo: a small model, for a quick try"
    )
    parser.add_argument(
        "--rounds", type=int, help="number of rounds (default 10; 3 for the SD 1.5-sized model on a CPU)"
    )
    parser.add_argument("--size", type=int, help="side of the latent (default 64; demo: 16)")
    parser.add_argument(
        "--steps", type=int, help="sampling steps of each run (default 20; 1 for the SD 1.5-sized model on a CPU)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the SD 1.5-sized model (default fp16; fp32 on a CPU)")
    parser.add_argument(
        "--memory-repeats", type=int, default=1, help="number of new processes with the head and without it"
    )
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--name", help="name of the result file (default cas_dm_cost or cas_dm_cost_demo)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    device = comfy.model_management.get_torch_device()
    if device.type not in ("cuda", "cpu"):
        raise SystemExit(f"expected a CUDA device or a CPU, got {device.type}")
    cuda, demo = device.type == "cuda", options.models == "demo"
    options.rounds = options.rounds or (10 if cuda or demo else 3)
    setting = Setting(
        options.models,
        options.size or (16 if demo else 64),
        options.steps or (20 if cuda or demo else 1),
        "fp32" if demo else options.dtype or ("fp16" if cuda else "fp32"),
    )
    check_memory(setting)
    busy = busy_percent()
    with torch.inference_mode():
        found = measure(setting, options, device)
    name = options.name or ("cas_dm_cost_demo" if demo else "cas_dm_cost")
    publish(name, {"settings": vars(options), "busy_percent_before": busy, **found}, markdown(found))


if __name__ == "__main__":
    main()
