"""The numbers of: What does SeedSelect cost?"""

from ..writing import MIB, Claim, constant, gpu_note, middle, number, percent, table, verdict

RESULTS = ("dev/benchmarks/results/seed_select_demo.json",)
TARGET = constant("dev/benchmarks/seed_select", "TARGET")
RATIO = "optimize without the activations / plain"
PLAIN, OPTIMIZE, KEPT = "one picture", "optimize", "optimize, activations of all steps kept"


def _peak(result: dict, kind: str) -> float:
    return result["memory"]["processes"][kind]["peak"] / MIB


def fields(result: dict) -> dict[str, str]:
    setting, times, memory = result["setting"], result["times"], result["memory"]
    rows = [
        [kind, str(row["evaluations"]), middle(row["median"], 1), number(_peak(result, kind))]
        for kind, row in times.items()
    ]
    seconds = {kind: times[kind]["median"]["median"] for kind in (OPTIMIZE, KEPT)}
    parts = {name: f"{number(size / MIB, 1)} MiB" for name, size in memory["activations"].items()}
    return {
        "steps": f"{setting['steps']}",
        "candidates": f"{setting['candidates']}",
        "iterations": f"{setting['iterations']}",
        "rounds": f"{len(times[PLAIN]['seconds'])}",
        "table": table(["", "evaluations", "seconds (quartiles)", "peak memory, MiB"], rows),
        "step": parts["denoiser"],
        "decode": parts["VAE"],
        "encoding": parts["image encoder"],
        "ratio": number(memory[RATIO], 2),
        "aim": f"{TARGET:g}",
        "verdict": verdict(memory[RATIO], TARGET, more=False),
        "kept": f"{number(_peak(result, KEPT))} MiB",
        "optimize": f"{number(_peak(result, OPTIMIZE))} MiB",
        "longer": percent(seconds[OPTIMIZE] / seconds[KEPT] - 1, 0),
        "gpu": gpu_note(result["environment"]),
    }


def claims(result: dict) -> list[Claim]:
    ratio = result["memory"][RATIO]
    peaks = {kind: f"{number(_peak(result, kind))} MiB" for kind in (PLAIN, OPTIMIZE, KEPT)}
    return [
        Claim(
            "SeedSelect's gradient takes little more memory than plain sampling (demo checkpoint)",
            f"peak {peaks[OPTIMIZE]}, plain sampling {peaks[PLAIN]}, all activations kept {peaks[KEPT]}",
            f"at most {TARGET:g} times plain sampling beside one step's activations:"
            f" {verdict(ratio, TARGET, more=False)}, {number(ratio, 2)}",
        )
    ]
