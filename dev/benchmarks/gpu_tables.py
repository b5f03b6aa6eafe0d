"""The tables that ``bench gpu`` prints, made from the content of a result file. Needs only torch."""

from collections.abc import Callable

import torch

from . import saliency_blend
from .sections import MEASURED, NO_TIME

NOT_A_GPU = "not measured on a GPU"
FOR_A_GPU = "not compared: the target is for a GPU"
TARGETS = "Targets are for the sizes of a full run on a GPU."


def text(result: dict) -> str:
    """All tables of a result file in Markdown, each with the state of its section."""
    facts = result["environment"]
    found = [f"# {facts['device']}, {result['date']}", ""]
    if result["smoke"]:
        note = "no measurement of this GPU" if "compute_capability" in facts else NOT_A_GPU
        found += [f"A smoke run with tiny sizes, which tests the command: **{note}**.", ""]
    known = ("driver", "cuda", "python", "torch", "triton", "comfyui", "diffusers", "chorus")
    found += ["; ".join(f"{name} {facts[name]}" for name in known if facts.get(name)), ""]
    for section in result["sections"]:
        found += [f"## {section['name']}", "", state(section), ""]
        if "found" in section:
            found += [TABLES[section["kind"]](section["found"], facts), ""]
    if result["smoke"]:
        found += [TARGETS, ""]
    return "\n".join(found)


def state(section: dict) -> str:
    """The outcome of a section in one sentence."""
    if section["status"] == MEASURED:
        return f"Measured in {section['seconds']:.0f} s."
    if section["reason"] == NO_TIME:
        return "**Skipped: time.** Run it alone with --part, or with more --minutes."
    return f"**{section['status'].capitalize()}: {section['reason']}**"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def timed(quartiles: list[float] | None) -> str:
    """Median and quartiles in ms."""
    if quartiles is None:
        return "-"
    first, middle, third = (1e3 * q for q in quartiles)
    return f"{middle:.3f} ({first:.3f}-{third:.3f})"


def correctness(found: dict, facts: dict) -> str:
    """For each implementation and dtype, the largest error relative to its bound."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in found["rows"]:
        groups.setdefault((row["implementation"], row["dtype"]), []).append(row)
    lines = []
    for (name, dtype), rows in groups.items():
        ratios = [error / bound for row in rows for error, bound in row["errors"].values() if bound]
        correct = sum(row["correct"] for row in rows)
        lines.append([name, dtype, f"{correct} of {len(rows)}", f"{max(ratios):.2f}"])
    lines += [[name, "-", "not run", reason] for name, reason in found.get("absent", {}).items()]
    return table(["implementation", "dtype", "correct cases", "largest error, relative to its bound"], lines)


def speed(found: dict, facts: dict) -> str:
    device = torch.device("cuda" if "compute_capability" in facts else "cpu")
    if device.type == "cpu":  # the targets are for the sizes and the devices of users
        return saliency_blend.markdown(found["rows"], device)
    verdicts = "\n".join(f"- {target}: {verdict}" for target, verdict in found["verdicts"].items())
    return f"{saliency_blend.markdown(found['rows'], device)}\n\n{verdicts}"


def network(found: dict, facts: dict) -> str:
    """Times of each way, and the speed relative to the first way. The best of both times counts."""

    def best(row: dict) -> float:
        return min(quartiles[1] for quartiles in row["seconds"].values() if quartiles)

    rows = found["rows"]
    lines = [
        [
            row["way"],
            row["dtype"],
            timed(row["seconds"]["eager"]),
            timed(row["seconds"]["graph"]),
            f"{best(rows[0]) / best(row):.2f} x",
            f"{row['difference']:.1e}",
            f"{row['first_call']:.1f}",
        ]
        for row in rows
    ]
    lines += [[name, "-", reason, "-", "-", "-", "-"] for name, reason in found["absent"].items()]
    head = ["way", "dtype", "calls, ms (quartiles)", "CUDA graph, ms (quartiles)", "speed, relative to the first row"]
    return table([*head, "difference from float32", "first call, s"], lines)


def overhead(found: dict, facts: dict) -> str:
    share, between = (found["time"][key] for key in ("overhead_share", "between_share"))

    def seconds(key: str) -> str:
        return f"{found['time'][key]['median']:.3f} s"

    def percent(value: dict) -> str:
        low, high = (100 * v for v in value["interval"])
        return f"{100 * value['median']:.2f} % ({low:.2f} to {high:.2f})"

    lines = [
        ["base alone, expert alone, blend", f"{seconds('base')}, {seconds('expert')}, {seconds('fusion')}"],
        ["blend - (base + expert), relative to the forward passes", percent(share)],
        ["time outside the forward passes, blend - base, relative to the forward passes", percent(between)],
        ["the expert's share of the mask", f"{100 * found['expert_share']:.0f} %"],
        ["target", found["verdict"] if "compute_capability" in facts else FOR_A_GPU],
    ]
    return f"{found['title']}; {len(found['rounds'])} rounds\n\n{table(['median (95 % interval)', ''], lines)}"


def cost(found: dict, facts: dict) -> str:
    lines = [
        [kind, f"{found['seconds'][kind]['median']:.3f} s", str(found["rows"][kind])]
        for kind in ("base", "expert", "fusion")
    ]
    ratio = found["relative_to_base"]
    low, high = ratio["interval"]
    note = f"The blend takes {ratio['median']:.2f} ({low:.2f} to {high:.2f}) times the time of the base alone."
    return f"{found['title']}\n\n{table(['', 'whole run, median', 'predicted rows'], lines)}\n\n{note}"


def memory(found: dict, facts: dict) -> str:
    lines = [
        [kind, f"{process['peak'] / 2**20:,.0f}" if "peak" in process else process["refused"]]
        for kind, process in found["processes"].items()
    ]
    if (ratio := found["optimize without the activations / plain"]) is None:
        return table(["", "peak memory, MiB"], lines)
    note = f"Without the activations of one call, optimize needs {ratio:.2f} times the memory of plain sampling."
    return f"{table(['', 'peak memory, MiB'], lines)}\n\n{note}"


TABLES: dict[str, Callable[[dict, dict], str]] = {
    "correctness": correctness,
    "speed": speed,
    "network": network,
    "overhead": overhead,
    "cost": cost,
    "memory": memory,
}
