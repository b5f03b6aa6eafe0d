"""The numbers of: What does the fusion cost beyond its forwards?"""

from ..writing import MIB, Claim, bears_out, constant, gpu_note, judged, middle, number, percent, table, verdict

RESULTS = ("dev/benchmarks/results/fusion_cost.json", "dev/benchmarks/results/fusion_cost_demo.json")
TARGET = constant("dev/benchmarks/fusion_cost", "TIME_TARGET")
MEMORY_TARGET = constant("dev/benchmarks/fusion_cost", "MEMORY_TARGET")
MILLI = 1000
ROWS = (
    ("base alone", "base", 1, " s"),
    ("expert alone", "expert", 1, " s"),
    ("fusion", "fusion", 1, " s"),
    ("**fusion - (base + expert), of the forwards**", "overhead_share", 100, " %"),
    ("between the forwards, fusion - base", "between", MILLI, " ms"),
    ("the same, of the forwards", "between_share", 100, " %"),
)


def fields(large: dict, small: dict) -> dict[str, str]:
    sd15, demo = large["models"]["sd15"], small["models"]["demo"]
    cells = [[title] for title, *_ in ROWS]
    for found in (sd15, demo):
        for line, (_, key, scale, unit) in zip(cells, ROWS):
            line.append(middle(found["time"][key], 2, scale, unit, "interval"))
    memory = sd15["memory"]
    plain, fused = (number(memory[k]["median"] / MIB) for k in ("plain", "fusion"))
    peak = f"{plain} MiB, {fused} MiB ({percent(memory['more'], 1, sign=True)})"
    rows = [
        *cells,
        ["peak memory: plain sampling with each in turn, fusion", peak, ""],
        ["by the interval of whole runs, the aim is", judged(sd15["verdict"]), judged(demo["verdict"])],
    ]
    titles = {"sd15": "two SD 1.5-sized checkpoints", "demo": "the demo checkpoints"}
    setting = {f["setting"]["name"]: f["setting"] for f in (sd15, demo)}
    heads = [f"{titles[n]}, {s['steps']} steps at {s['size']} x {s['size']}" for n, s in setting.items()]
    steps = demo["setting"]["steps"]
    low, high = sd15["time"]["overhead_share"]["interval"]
    aim, share = TARGET["cpu"], demo["time"]["between_share"]["median"]
    bears_out("for large checkpoints the median lies within the aim", sd15["time"]["overhead_share"]["median"] <= aim)
    bears_out("the interval is wider than the aim", high - low > aim)
    bears_out("for the demo checkpoints the time between the forwards is above the aim", share > aim)
    return {
        "title": sd15["title"],
        "title_demo": demo["title"],
        "aim": percent(aim, 0),
        "table": table([f"median of {len(sd15['rounds'])} rounds (95 % interval)", *heads], rows),
        "within": percent(sd15["time"]["between_share"]["median"], 2),
        "demo_forward": number(MILLI * demo["time"]["forwards"]["median"] / 2 / steps),
        "demo_step": number(MILLI * demo["time"]["between"]["median"] / steps, 1),
        "demo_share": percent(share),
        "memory_aim": percent(MEMORY_TARGET, 0),
        "memory_verdict": judged(memory["verdict"]),
        "gpu": gpu_note(large["environment"], f"at most {percent(TARGET['cuda'], 0)}"),
    }


def claims(large: dict, small: dict) -> list[Claim]:
    sd15, demo = large["models"]["sd15"], small["models"]["demo"]
    titles = {
        "sd15": "What fusing costs beyond both models' forwards, at SD 1.5's size",
        "demo": "The same with the demo checkpoints",
    }
    return [_claim(titles[name], found) for name, found in (("sd15", sd15), ("demo", demo))]


def _claim(title: str, found: dict) -> Claim:
    whole, between = (found["time"][f"{key}_share"] for key in ("overhead", "between"))
    inner = verdict(between["median"], TARGET["cpu"], more=False)
    measured = f"{middle(whole, 2, 100, ' %', 'interval')}; between the forwards {percent(between['median'], 2)}"
    aim = f"at most {percent(TARGET['cpu'], 0)}: {judged(found['verdict'])}; between the forwards {inner}"
    return Claim(title, measured, aim)
