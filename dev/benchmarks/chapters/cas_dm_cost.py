"""The numbers of: What does a Cas-DM head cost?"""

from ..writing import MIB, Claim, bears_out, constant, gpu_note, judged, middle, number, percent, table

RESULTS = ("dev/benchmarks/results/cas_dm_cost.json",)
TIME, MEMORY = (constant("dev/benchmarks/cas_dm_cost", f"{name}_TARGET") for name in ("TIME", "MEMORY"))
KINDS = {"unguided": "unguided: one prediction a step", "guided": "guided: two"}
ROWS = (
    ("on - off, of the model's step", "whole_share"),
    ("the same between the model's forwards, where the head computes", "between_share"),
    ("the head alone", "alone_share"),
)
GIGA = 10**9


def _share(found: dict, key: str) -> str:
    return middle(found["time"][key], 2, 100, " %", "interval")


def fields(result: dict) -> dict[str, str]:
    flops, memory = result["flops"], result["memory"]
    part = flops["head"] / flops["model"]
    peaks = [number(sorted(memory["peaks"][k])[len(memory["peaks"][k]) // 2] / MIB) for k in ("off", "on")]
    steps = [middle(result[k]["time"]["model"], 2, 1, " s", "interval") for k in KINDS]
    rows = [
        ["the model's step", *steps],
        *([title, *(_share(result[k], key) for k in KINDS)] for title, key in ROWS),
        [f"by FLOPs ({_gigaflops(flops)} GFLOP a prediction)", percent(part, 2), percent(part / 2, 2)],
        *(
            [f"by {key}, the aim is", *(judged(result[k]["verdict"][key]) for k in KINDS)]
            for key in result["guided"]["verdict"]
        ),
        ["peak memory, without and with", f"{' and '.join(peaks)} MiB ({percent(memory['more'], 1, sign=True)})", ""],
    ]
    bears_out(
        "between the forwards the head stays within the aim",
        all(result[k]["time"]["between_share"]["interval"][1] <= TIME for k in KINDS),
    )
    bears_out("guided whole runs do not decide", result["guided"]["verdict"]["on - off"].startswith("undecided"))
    return {
        "title": result["title"],
        "rounds": f"{len(result['guided']['rounds'])}",
        "aim": percent(TIME, 0),
        "aim_memory": percent(MEMORY, 0),
        "verdict_memory": judged(memory["verdict"]),
        "table": table(["median (interval)", *KINDS.values()], rows),
        "gpu": gpu_note(result["environment"]),
    }


def _gigaflops(flops: dict) -> str:
    return f"{number(flops['head'] / GIGA, 1)} of {number(flops['model'] / GIGA)}"


def claims(result: dict) -> list[Claim]:
    shares = {k: _share(result[k], "between_share") for k in KINDS}
    inner, whole = (
        ", ".join(f"{kind} {judged(result[kind]['verdict'][key]).partition(' ')[0]}" for kind in KINDS)
        for key in ("between the forwards", "on - off")
    )
    return [
        Claim(
            "What a Cas-DM head costs beside a model of SD 1.5's size",
            f"between the forwards {shares['unguided']} of a step unguided, {shares['guided']} guided; memory"
            f" {percent(result['memory']['more'], 1, sign=True)}",
            f"at most {percent(TIME, 0)}: between the forwards {inner}; whole runs {whole}",
        )
    ]
