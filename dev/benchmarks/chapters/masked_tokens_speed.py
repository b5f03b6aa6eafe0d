"""The numbers of: How fast is aMUSEd?"""

from ..writing import Claim, constant, gpu_note, middle, number, span, table, verdict

RESULTS = ("dev/benchmarks/results/masked_tokens.json", "dev/benchmarks/results/masked_tokens_linear.json")
TARGET = constant("dev/benchmarks/masked_tokens", "TARGET")
DIFFUSERS = next(pin for pin in constant("dev/tools/setup", "REFERENCE_PINS") if pin.startswith("diffusers"))


def fields(pictures: dict, linear: dict) -> dict[str, str]:
    rows = []
    for one in pictures["measured"]:
        cells = [middle(one["median"][kind], 1) for kind in ("diffusers", "chorus")]
        rows.append(
            [
                f"amused-{one['case']['size']}, batch {one['case']['batch']}",
                *cells,
                middle(one["speedup"], 2, 1, " x", "interval"),
            ]
        )
    first, reached = pictures["measured"][0], [one["speedup"]["median"] for one in pictures["measured"]]
    return {
        "diffusers": DIFFUSERS.replace("==", " "),
        "steps": f"{first['case']['steps']}",
        "dtype": first["case"]["dtype"],
        "rounds": f"{len(first['seconds']['chorus'])}",
        "aim": f"{TARGET['cpu']:g}",
        "verdict": verdict(min(reached), TARGET["cpu"]),
        "reached": span(reached, 2),
        "table": table(
            ["", "diffusers, s (quartiles)", "MaskedTokenSampler, s (quartiles)", "speed-up (interval)"], rows
        ),
        "linear": span([p["chorus"] / p["torch"] for p in linear["measured"]]),
        "gpu": gpu_note(pictures["environment"], f"at least {TARGET['cuda']:g} times"),
    }


def claims(pictures: dict, linear: dict) -> list[Claim]:
    reached = [one["speedup"]["median"] for one in pictures["measured"]]
    seconds = ", ".join(
        f"amused-{o['case']['size']} {number(o['median']['chorus']['median'], 1)} s" for o in pictures["measured"]
    )
    return [
        Claim(
            f"aMUSEd against {DIFFUSERS.replace('==', ' ')}, without a GPU",
            f"{span(reached, 2)} times as fast ({seconds} a picture)",
            f"at least {TARGET['cpu']:g} times: {verdict(min(reached), TARGET['cpu'])}",
        )
    ]
