"""The numbers of: What is a Cas-DM head worth?"""

import json

from ..writing import (
    MIB,
    Claim,
    bears_out,
    bold_best,
    grouped,
    listed,
    number,
    points,
    ranged,
    share,
    span,
    table,
    weights,
)

RESULTS = ("dev/benchmarks/results/cas_dm_quality.json",)
HEAD, UNGUIDED = "chorus-demo-general", "cas_dm-unguided"
FILE = f"demo/weights/cas_dm/{HEAD}.safetensors"
ALONE, WITHOUT, WITH, FIXED, PHI = "model alone", "head without metric", "head with metric", "fixed r", "φ alone"
JUDGES = ("classifier", "encoder")


def _titles(cfg: float, r: str) -> dict[str, str]:
    head = "head" if cfg > 1 else "a head trained without guidance"
    return {
        ALONE: ALONE,
        WITHOUT: "head trained without metric",
        WITH: head,
        FIXED: f"its φ, r = {r}",
        PHI: "its φ alone",
    }


def _of(result: dict, cfg: float) -> dict[int, dict[str, dict]]:
    found = {}
    for row in result["table"]:
        if row["cfg"] == cfg:
            found.setdefault(row["steps"], {})[row["way"]] = row
    return found


def _table(result: dict, cfg: float) -> str:
    titles, rows = _titles(cfg, _config(result)["fixed"]), []
    for steps, ways in _of(result, cfg).items():
        frechet = [ranged(*(row["frechet"][k] for k in ("value", "low", "high"))) for row in ways.values()]
        distance = [number(row["distance"][0], 3) for row in ways.values()]
        judged = [[share(row[j][0], row[j][1:]) for row in ways.values()] for j in JUDGES]
        if len(ways) > 1:
            frechet = bold_best(frechet, [row["frechet"]["value"] for row in ways.values()], min)
            distance = bold_best(distance, [row["distance"][0] for row in ways.values()], min)
            judged = [bold_best(cells, [row[j][0] for row in ways.values()]) for cells, j in zip(judged, JUDGES)]
        rows += [[str(steps), titles[way], *cells] for way, *cells in zip(ways, frechet, distance, *judged)]
    head = ["Fréchet distance", "distance to the reference", "right, classifier", "right, encoder"]
    return table([f"steps, cfg {cfg:g}", "", *head], rows)


def _config(result: dict) -> dict:
    return json.loads(result["heads"][HEAD]["config"])


def _gain(row: dict, what: str) -> str:
    found = row["against the model alone"][what]
    if isinstance(found, dict):
        return points([found[k] for k in ("value", "low", "high")], 2, 1)
    return points(found)


def _r(result: dict, head: str) -> list[float]:
    """The learned r by part of the sampling, first steps first."""
    return [r for _, r in json.loads(result["heads"][head]["gate"])]


def _check(guided: dict, few: int, most: int, reference: int, later: list[int]) -> None:
    squares = [
        ways[WITHOUT]["against the model alone"]["frechet"]["value"] for n, ways in guided.items() if n != reference
    ]
    bears_out("without the metric the head is further from the canvases than the model", min(squares) > 0)
    head, fixed = guided[few][WITH], [guided[n][FIXED] for n in later]
    bears_out(
        "in few steps the head helps by every measure",
        head["against the model alone"]["frechet"]["high"] < 0
        and all(head["against the model alone"][j][1] > 0 for j in JUDGES),
    )
    bears_out(
        "it gets nearer than the model's own reference",
        head["frechet"]["value"] < guided[reference][ALONE]["frechet"]["value"],
    )
    bears_out(
        "r = one half beats the model from then on",
        all(row["against the model alone"]["frechet"]["high"] < 0 for row in fixed),
    )
    bears_out(
        "and φ alone", all(row["frechet"]["value"] < guided[n][PHI]["frechet"]["value"] for n, row in zip(later, fixed))
    )
    bears_out(
        "the learned r costs signs in many steps", guided[most][WITH]["against the model alone"]["classifier"][2] < 0
    )
    bears_out("a fixed r does not", guided[most][FIXED]["against the model alone"]["classifier"][2] > 0)
    bears_out(
        "the head leads elsewhere from then on",
        all(guided[n][WITH]["against the model alone"]["distance"][1] > 0 for n in later),
    )


def fields(result: dict) -> dict[str, str]:
    settings, head = result["settings"], result["heads"][HEAD]
    guided = _of(result, float(head["cfg"]))
    *steps, reference = sorted(guided)
    few, *later = steps
    _check(guided, few, later[-1], reference, later)
    count, size = weights(FILE)
    r, in_few, many = _r(result, HEAD), guided[few][WITH], guided[later[-1]][WITH]
    squares = [guided[n][WITHOUT]["against the model alone"]["frechet"]["value"] for n in steps]
    return {
        "millions": number(count / 10**6, 1),
        "size": number(size / MIB, 1),
        "cfg": f"{float(head['cfg']):g}",
        "trained": number(int(head["steps"])),
        "data": grouped(head["data"]),
        "minutes": number(int(head["seconds"]) / 60),
        "pictures": number(settings["pictures"]),
        "sampling": f"{settings['sampler']}, scheduler {settings['scheduler']}",
        "reference": f"{reference}",
        "table": _table(result, float(head["cfg"])),
        "worse": span(squares, 1),
        "few": f"{few}",
        "frechet": _gain(in_few, "frechet"),
        **{f"few_{j}": _gain(in_few, j) for j in JUDGES},
        "fixed": f"{_config(result)['fixed']}",
        "later": listed(map(str, later)),
        "mixed": listed([_gain(guided[n][FIXED], "frechet") for n in later]),
        "later_first": f"{later[0]}",
        "r_first": number(r[0], 2),
        "r_last": number(r[-1], 2),
        "most": f"{later[-1]}",
        "lost": _gain(many, "classifier"),
        "table_unguided": _table(result, float(result["heads"][UNGUIDED]["cfg"])),
        "r_unguided": number(sum(_r(result, UNGUIDED)) / len(_r(result, UNGUIDED)), 2),
        "order": ", then ".join(map(str, steps)),
        "weight": f"{float(head['metric_weight']):g}",
    }


def claims(result: dict) -> list[Claim]:
    guided = _of(result, float(result["heads"][HEAD]["cfg"]))
    *steps, _ = sorted(guided)
    few, most = guided[steps[0]], guided[steps[-1]]
    distances = {way: number(few[way]["frechet"]["value"], 2) for way in (ALONE, WITH)}
    right = {way: number(100 * few[way]["classifier"][0], 1) for way in (ALONE, WITH)}
    return [
        Claim(
            f"A Cas-DM head helps in few steps ({steps[0]}, demo checkpoint)",
            f"Fréchet distance {distances[WITH]} instead of {distances[ALONE]}; {right[WITH]} % of the signs right instead"
            f" of {right[ALONE]} %",
        ),
        Claim(
            f"In {steps[-1]} steps a Cas-DM head's learned r is too large and costs signs, a fixed one does not",
            f"points by the classifier: {_gain(most[WITH], 'classifier')}; fixed at {_config(result)['fixed']}:"
            f" {_gain(most[FIXED], 'classifier')}",
            price=True,
        ),
    ]
