"""The numbers of: How fast is the blend?"""

from ..writing import Claim, gpu_note, number, percent, ranged, span, table, verdict

RESULTS = ("dev/benchmarks/results/saliency_blend.json",)
AIM = 3  # times the definition's speed, as dev/benchmarks/saliency_blend.py judges it
MICRO = 10**6


def _cases(result: dict) -> list[tuple[dict, dict]]:
    """(definition, torch path) of every size."""
    by_case = {}
    for row in result["rows"]:
        by_case.setdefault((*row["shape"], row["models"], row["dtype"]), {})[row["implementation"]] = row
    return [(rows["definition"], rows["fused torch"]) for rows in by_case.values()]


def _speedups(result: dict) -> list[float]:
    return [torch["speedup"]["eager"] for _, torch in _cases(result)]


def _micro(row: dict) -> str:
    low, median, high = row["seconds"]["eager"]
    return ranged(median, low, high, 0, MICRO)


def fields(result: dict) -> dict[str, str]:
    rows = []
    for definition, torch in _cases(result):
        size = "x".join(map(str, torch["shape"])) + (" (exceeds the cache)" if torch["beyond_cache"] else "")
        cells = [_micro(definition), _micro(torch), f"{number(torch['speedup']['eager'], 1)} x"]
        rows.append([size, str(torch["models"]), *cells, percent(torch["share_of_copy"], 0)])
    head = [
        "predictions, float32",
        "models",
        "definition, µs (quartiles)",
        "torch path, µs",
        "speed-up",
        "of a copy's speed",
    ]
    return {
        "runs": f"{result['settings']['runs']}",
        "table": table(head, rows),
        "aim": f"{AIM}",
        "verdict": verdict(min(_speedups(result)), AIM),
        "speedup": span(_speedups(result)),
        "threads": f"{result['threads']}",
        "gpu": gpu_note(result["environment"]),
    }


def claims(result: dict) -> list[Claim]:
    reached = verdict(min(_speedups(result)), AIM)
    return [
        Claim(
            "The blend of a step, without a GPU, against its definition in plain torch",
            f"{span(_speedups(result))} times as fast",
            f"at least {AIM} times at every size: {reached}",
        )
    ]
