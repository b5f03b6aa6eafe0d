"""The numbers of: Does SeedSelect find rare signs?"""

from ..writing import Claim, bears_out, bold, constant, listed, number, percent, points, share, table, verdict

RESULTS = ("dev/benchmarks/results/seed_rare_signs.json", "dev/benchmarks/results/seed_ranking.json")
AIM_PART = 8  # the best of all seeds for an eighth of what painting them takes
JUDGES = constant("dev/benchmarks/seed_rare_signs", "JUDGES")
REPEATS = constant("dev/benchmarks/generated_training", "REPEATS")
REFERENCES = constant("demo/references", "EACH")


def _ways(settings: dict) -> dict[str, str]:
    return {
        "random": "a random seed",
        "search": f"search among {settings['candidates']}",
        "optimise": f"{settings['iterations']} iterations from a random seed",
        "both": f"both: {settings['iterations']} iterations from the search's best",
    }


def _table(result: dict) -> str:
    ways, rows = _ways(result["settings"]), []
    for name, found in result["table"].items():
        best = max(row["classifier"]["share"] for row in found.values())
        for way, row in found.items():
            classifier, encoder = (share(row[j]["share"], row[j]["interval"]) for j in JUDGES)
            right = bold(classifier, name == "rare" and row["classifier"]["share"] == best)
            counts = number(row["score"], 2), number(row["evaluations"])
            rows.append([f"{name} signs", ways[way], str(row["classifier"]["pictures"]), right, encoder, *counts])
    return table(["", "noise by", "pictures", "right, classifier", "right, encoder", "score", "evaluations"], rows)


def _trained(found: dict) -> str:
    return f"{percent(found['mean'])} ({number(100 * found['lowest'], 1)}-{number(100 * found['highest'], 1)})"


def _reached(best: dict, way: str) -> bool:
    return best[way]["of all in full"] <= 1 / AIM_PART and best[way]["score"] <= min(best["best of k in full"].values())


def fields(result: dict, ranking: dict) -> dict[str, str]:
    settings, best, trained = result["settings"], result["best of all"], result["classifiers"]
    rare, aim = result["table"]["rare"], {j: result["table"]["frequent"]["random"][j]["share"] for j in JUDGES}
    gap = {j: aim[j] - rare["both"][j]["share"] for j in JUDGES}
    in_full = best["best of k in full"]
    fewer = max((k for k in in_full if in_full[k] >= best["search"]["score"]), key=int)
    more = min((k for k in in_full if in_full[k] <= best["search"]["score"]), key=int)
    evaluations = int(max(in_full, key=int)) * settings["steps"]
    order = ranking["rank correlation"]
    steps = list(order["normal"])
    bears_out(
        "every way gains over random seeds by both judges",
        all(g[j][1] > 0 for g in result["gains"].values() for j in JUDGES),
    )
    bears_out("optimising alone reaches the best of all for the share that was aimed at", _reached(best, "optimise"))
    bears_out("search alone does not", best["search"]["score"] > min(in_full.values()))
    bears_out(
        "the encoder is pleased more than the classifier",
        all(g["encoder"][0] > g["classifier"][0] for g in result["gains"].values()),
    )
    bears_out(
        "short runs tell more with the beta schedule",
        all(order["beta"][n][0] >= order["normal"][n][0] - 1e-9 for n in steps),
    )
    return {
        "signs": f"{rare['random']['classifier']['pictures'] // settings['seeds']}",
        "references": f"{REFERENCES}",
        "groups": f"{settings['seeds']}",
        "searched": f"{settings['searches']}",
        "steps": f"{settings['steps']}",
        "sampling": f"{settings['sampler']}, {settings['scheduler']}, cfg {settings['cfg']:g}",
        "table": _table(result),
        "gains": "\n".join(
            f"- {_ways(settings)[name.partition(' - ')[0]]}: {points(gain['classifier'])} by the classifier,"
            f" {points(gain['encoder'])} by the encoder"
            for name, gain in result["gains"].items()
        ),
        "failures": percent(1 - rare["random"]["classifier"]["share"], 0),
        "failures_left": percent(1 - rare["both"]["classifier"]["share"], 0),
        "aim": percent(aim["classifier"]),
        "verdict": verdict(0.0, gap["classifier"]),
        "gap": number(100 * abs(gap["classifier"]), 1),
        "verdict_encoder": verdict(0.0, gap["encoder"]),
        "gap_encoder": number(100 * abs(gap["encoder"]), 1),
        "all": max(in_full, key=int),
        "best": number(min(in_full.values()), 2),
        "best_evaluations": number(evaluations),
        "part": f"1/{AIM_PART}",
        "optimised": number(best["optimise"]["score"], 2),
        "optimised_evaluations": number(best["optimise"]["evaluations"]),
        "optimised_part": percent(best["optimise"]["of all in full"]),
        "search": number(best["search"]["score"], 2),
        "search_evaluations": number(best["search"]["evaluations"]),
        "search_like": listed(dict.fromkeys((fewer, more))),
        "both": number(best["both"]["score"], 2),
        "both_evaluations": number(best["both"]["evaluations"]),
        "each": f"{trained['pictures of each sign']}",
        "real": f"{trained['of real test renderings']}",
        "repeats": f"{REPEATS}",
        **{
            f"trained_{name}": _trained(trained[name])
            for name in ("random", "search", "optimise", "both", "renderings")
        },
        "ranked": f"{ranking['settings']['seeds']}",
        "ranked_signs": f"{ranking['settings']['signs']}",
        "ranked_steps": listed(steps),
        "ranked_full": f"{ranking['settings']['sampling']['steps']}",
        "ranking": table(
            ["scheduler of the short run", *(f"after {n}" for n in steps)],
            [
                [name, *(f"{number(v, 2)} ({number(low, 2)} to {number(high, 2)})" for v, low, high in row.values())]
                for name, row in order.items()
            ],
        ),
        "first_steps": f"{settings['first_steps']}",
        "proxy": f"{settings['optimize_steps']}",
    }


def claims(result: dict, ranking: dict) -> list[Claim]:
    rare, best = result["table"]["rare"], result["best of all"]
    aim = result["table"]["frequent"]["random"]
    shares = {w: percent(rare[w]["classifier"]["share"]) for w in ("random", "both")}
    gaps = {j: 100 * (rare["both"][j]["share"] - aim[j]["share"]) for j in JUDGES}
    told = [f"by the {j} {verdict(gap, 0)} ({number(gap, 1, sign=True)} points)" for j, gap in gaps.items()]
    gain, seeds = points(result["gains"]["both - random"]["classifier"]), max(best["best of k in full"], key=int)
    return [
        Claim(
            "SeedSelect finds noise from which rare signs come out right",
            f"{shares['both']} right instead of {shares['random']} (classifier); gain in points {gain}",
            f"as often as frequent signs by random seeds, {percent(aim['classifier']['share'])}: {', '.join(told)}",
        ),
        Claim(
            f"Optimising one seed scores as well as the best of {seeds} seeds painted in full, for less",
            f"{percent(best['optimise']['of all in full'])} of the evaluations",
            f"at most 1/{AIM_PART}: {'reached' if _reached(best, 'optimise') else 'missed'}",
        ),
    ]
