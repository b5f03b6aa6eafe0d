"""The numbers of: What do fewer evaluations of the expert cost?"""

from ..writing import Claim, bears_out, bold, constant, number, percent, table, verdict

RESULTS = ("dev/benchmarks/results/fusion_fidelity.json",)
COST, RETRIEVAL = (constant("dev/benchmarks/fusion_fidelity", f"AIM_{name}") for name in ("COST", "RETRIEVAL"))
CHOSEN = "refresh 3"
EQUAL = 119  # decibels; equal pictures are kept as a little more


def _row(result: dict, name: str) -> dict:
    return next(row for row in result["rows"] if row["name"] == name)


def _decibels(psnr: list[float] | None) -> str:
    if psnr is None:
        return ""
    low, median, high = ("equal" if v > EQUAL else number(v, 1) for v in psnr)
    return median if low == median else f"{median} ({low}-{high})"


def _retrieval(row: dict) -> str:
    value, low, high = row["retrieval"]
    return percent(value) if row["psnr"] is None else f"{percent(value)} ({number(100 * low)}-{number(100 * high)})"


def fields(result: dict) -> dict[str, str]:
    settings, rows = result["settings"], []
    for row in result["rows"]:
        cells = [number(row["cost"], 2), _decibels(row["psnr"]), _retrieval(row), percent(row["both"]["share"], 0)]
        rows.append([bold(row["name"], row["name"] == CHOSEN), *cells])
    chosen = _row(result, CHOSEN)
    by_damping = {
        n: [_row(result, f"refresh {n}{k}") for k in ("", ", offsets reused as they are", ", full extrapolation")]
        for n in (2, 3, 4)
    }
    nearest = all(
        half["psnr"][1] > max(reused["psnr"][1], full["psnr"][1]) for half, reused, full in by_damping.values()
    )
    late = [_row(result, f"window {start}-1") for start in ("0.2", "0.4")]
    early = [_row(result, f"window 0-{end}") for end in ("0.3", "0.4", "0.6", "0.8")]
    bears_out("half a step is nearer to the full fusion than none or a whole", nearest)
    bears_out("windows that start later keep the retrieval", all(row["retrieval"][2] > 1 for row in late))
    bears_out("windows that end early lose retrieval", all(row["retrieval"][2] < 1 for row in early))
    bears_out("the interval of the recommended setting reaches below the aim", chosen["retrieval"][1] < RETRIEVAL)
    head = [
        f"{result['pictures']} pictures",
        "cost (base alone = 1)",
        "PSNR, dB (quartiles)",
        "retrieval (95 %)",
        "both signs, animal in style",
    ]
    return {
        "pictures": f"{result['pictures']}",
        "steps": f"{settings['steps']}",
        "sampling": f"{settings['sampler']}, {settings['scheduler']}, cfg {settings['cfg']:g}",
        "table": table(head, rows),
        "refresh": f"{chosen['inputs']['refresh']}",
        "cost": number(chosen["cost"], 2),
        "retrieval": _retrieval(chosen),
        "full": number(_row(result, "full fusion")["cost"]),
        "aim": percent(RETRIEVAL, 0),
        "aim_cost": number(COST, 2),
        "verdict": verdict(chosen["retrieval"][0], RETRIEVAL),
        "compared": ", ".join(str(n) for n in by_damping),
    }


def claims(result: dict) -> list[Claim]:
    chosen = _row(result, CHOSEN)
    full, cost = _row(result, "full fusion")["cost"], chosen["cost"]
    reached = verdict(chosen["retrieval"][0], RETRIEVAL)
    return [
        Claim(
            f"`refresh` {chosen['inputs']['refresh']} asks the expert less often and keeps what the fusion is for",
            f"cost {number(cost, 2)} instead of {number(full, 2)} (base alone: 1); keeps {_retrieval(chosen)} of the retrieval",
            f"{percent(RETRIEVAL, 0)} at {number(COST, 2)}: {reached}; the interval reaches below",
        )
    ]
