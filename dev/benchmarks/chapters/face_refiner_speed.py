"""The numbers of: How fast is a face refiner?"""

from ..writing import Claim, constant, gpu_note, middle, number, percent, span, table, verdict

RESULTS = ("dev/benchmarks/results/face_refiner.json",)
TARGET = constant("dev/benchmarks/face_refiner", "TARGET")
NETWORKS = {"resnet9": "ResNet-9", "unet256": "U-Net-256", "own": "residual U-Net"}
MILLI = 1000


def fields(result: dict) -> dict[str, str]:
    step, rows = result["sd15_step"]["median"]["median"], []
    for one in result["measured"]:
        case, medians = one["case"], one["median"]
        title = f"{NETWORKS[case['network']]}, {case['size']}, batch {case['batch']}"
        cells = [middle(medians[kind], 1, MILLI) for kind in ("plain", "chorus")]
        faster = middle(one["speedup"], 2, 1, " x", "interval")
        apart = ", ".join(f"{v:.2g}" for v in one["levels_apart"].values())
        rows.append([title, *cells, faster, percent(medians["chorus"]["median"] / step), apart])
    reached = [one["speedup"]["median"] for one in result["measured"]]
    head = [
        "faces",
        "plain, ms (quartiles)",
        "chorus, ms (quartiles)",
        "speed-up (95 %)",
        "of a sampling step",
        "apart, of 255: mean, 99.9 %",
    ]
    return {
        "aim": f"{TARGET['cpu']:g}",
        "verdict": verdict(min(reached), TARGET["cpu"]),
        "reached": span(reached, 2),
        "dtypes": ", ".join(dict.fromkeys(one["case"]["dtype"] for one in result["measured"])),
        "step": number(step, 1),
        "step_dtype": result["sd15_step"]["dtype"],
        "table": table(head, rows),
        "gpu": gpu_note(result["environment"], f"at least {TARGET['cuda']:g} times"),
    }


def claims(result: dict) -> list[Claim]:
    reached = [one["speedup"]["median"] for one in result["measured"]]
    return [
        Claim(
            "A refiner's pass against the same network in plain eager float32, without a GPU",
            f"{span(reached, 2)} times as fast",
            f"at least {TARGET['cpu']:g} times: {verdict(min(reached), TARGET['cpu'])}",
        )
    ]
