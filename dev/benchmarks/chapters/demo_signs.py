"""The numbers of: Do the demo checkpoints know their signs?"""

import json

from ..writing import ROOT, Claim, bears_out, number, percent, share, table

RESULTS = ("demo/results/retrieval.json",)
TITLES = {"in domain (animals)": "animals", "out of domain": "everything but animals"}
GENERAL, EXPERT = "general", "expert-animals"
BINS = ("frequent", "medium", "rare")


def _top(found: dict) -> list[str]:
    return [share(found["top1"]["share"], found["top1"]["interval"]), percent(found["top5"]["share"])]


def _trained(weights: dict) -> dict[str, str]:
    steps = int(weights["steps"])
    return {
        "steps": number(steps),
        "batch": number(int(weights["canvases"]) / steps),
        "minutes": number(int(weights["seconds"]) / 60),
    }


def fields(result: dict) -> dict[str, str]:
    found, settings, rows = result["checkpoints"], result["settings"], []
    for group in (*BINS, *TITLES):
        rows.append([GENERAL, TITLES.get(group, f"{group} signs"), *_top(found[GENERAL][group])])
    for group in (*TITLES, *(f"{name} animals" for name in BINS)):
        rows.append([EXPERT, TITLES.get(group, group), *_top(found[EXPERT][group])])
    rows += [[name, "shuffled prompts (chance)", *_top(found[name]["shuffled prompts"])] for name in found]
    judge = {name: cell for name, cell in result["judge"].items() if "unseen" in name}
    rows += [["*the judge itself*", name, *_top(cell)] for name, cell in judge.items()]
    bears_out(
        "the expert knows animals and little else",
        found[EXPERT]["in domain (animals)"]["top1"]["interval"][0]
        > found[EXPERT]["out of domain"]["top1"]["interval"][1],
    )
    shares = [found[GENERAL][name]["top1"]["share"] for name in BINS]
    bears_out(
        "the general checkpoint knows signs the better, the oftener it saw them", shares == sorted(shares, reverse=True)
    )
    general, expert = (_trained(result["weights"][name]) for name in (GENERAL, EXPERT))
    signs = json.loads((ROOT / "demo" / "data" / "frequency.json").read_text(encoding="utf-8"))["rank"]
    return {
        "seeds": f"{settings['seeds']}",
        "signs": f"{len(signs)}",
        "steps": f"{settings['steps']}",
        "sampling": f"{settings['sampler']}, {settings['scheduler']}, cfg {settings['cfg']:g}",
        "table": table(["checkpoint", "prompts", "top-1", "top-5"], rows),
        **{f"general_{key}": value for key, value in general.items()},
        **{f"expert_{key}": expert[key] for key in ("steps", "minutes")},
    }


def claims(result: dict) -> list[Claim]:
    found = result["checkpoints"]
    named = {name: percent(found[GENERAL][name]["top1"]["share"]) for name in BINS}
    animals = percent(found[EXPERT]["in domain (animals)"]["top1"]["share"])
    return [
        Claim(
            "The demo checkpoints know their signs",
            f"general: {', '.join(f'{name} {value}' for name, value in named.items())} right; expert: animals {animals}",
        )
    ]
