"""The numbers of: Does fusing help?"""

from ..writing import Claim, bears_out, bold, constant, percent, points, share, span, table

RESULTS = ("dev/benchmarks/results/saliency_effect.json",)
METRICS = constant("dev/benchmarks/saliency_effect", "METRICS")


def _rows(result: dict) -> list[list[str]]:
    scores, names = result["scores"], {"general": "general alone", "expert": "expert alone", "fused": "fused"}
    rows = []
    for name, title in names.items():
        cells = [share(scores[name][m]["share"], scores[name][m]["interval"], 1) for m in METRICS]
        best = [scores[name][m]["share"] == max(s[m]["share"] for s in scores.values()) for m in METRICS]
        rows.append([title, *map(bold, cells, best)])
    for name, gains in result["gains"].items():
        rows.append([f"{name}, points", *(points(gains[m]) for m in METRICS)])
    ceiling = [percent(result["ceiling"][m]) for m in METRICS]
    return [*rows, ["*composed from the emoji: the judge's ceiling*", *ceiling]]


def fields(result: dict) -> dict[str, str]:
    settings, scores, gains = result["settings"], result["scores"], result["gains"]
    over_best = {
        m: scores["fused"][m]["share"] / max(scores[name][m]["share"] for name in ("general", "expert"))
        for m in METRICS
    }
    certain = all(gains[name]["both"][1] > 0 for name in gains)
    bears_out("the fusion gains in both signs with the animal in style", certain and over_best["both"] > 1)
    bears_out("the gain in both signs over the general model may be chance", gains["fused - general"]["scene"][1] < 0)
    bears_out("the fusion has less of the expert's style", gains["fused - expert"]["subject"][2] < 0)
    bears_out(
        "the fusion has more of the expert's style than the general model", gains["fused - general"]["subject"][1] > 0
    )
    return {
        "pairs": f"{result['pairs']}",
        "prompts": f"{settings['prompts']}",
        "seeds": f"{settings['seeds']}",
        "steps": f"{settings['steps']}",
        "sampling": f"{settings['sampler']}, {settings['scheduler']}, cfg {settings['cfg']:g}",
        "table": table([f"{result['pairs']} pairs", *METRICS.values()], _rows(result)),
        "both": points(gains["fused - general"]["both"]),
        "both_expert": points(gains["fused - expert"]["both"]),
        "ratio": span([over_best["both"]]),
        "lost": points(gains["fused - expert"]["subject"]),
        "scene_gain": points(gains["fused - general"]["scene"]),
        "general_scene": percent(scores["general"]["scene"]["share"]),
        "mask": span([result["expert_share"][k] for k in ("lowest", "highest")], 0, 100),
    }


def claims(result: dict) -> list[Claim]:
    both, style = ({name: percent(s[m]["share"]) for name, s in result["scores"].items()} for m in ("both", "subject"))
    return [
        Claim(
            "Fused checkpoints paint what neither paints alone: both signs, the animal in the expert's style",
            f"{both['fused']} of {result['pairs']} pictures; general alone {both['general']}, expert alone {both['expert']}",
        ),
        Claim(
            "What fusing costs: less of the expert's style than the expert alone",
            f"{style['fused']} instead of {style['expert']}; general alone {style['general']}",
            price=True,
        ),
    ]
