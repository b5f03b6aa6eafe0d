"""The numbers of: What is a face refiner worth?"""

from ..writing import (
    MIB,
    Claim,
    bears_out,
    bold,
    grouped,
    number,
    percent,
    points,
    ranged,
    share,
    table,
    verdict,
    weights,
)

RESULTS = ("dev/benchmarks/results/face_refiner_quality.json",)
AIM_COMPUTE, AIM_CLOSED = 0.82, 0.5  # less compute than the teacher, with this share of the distance closed
HEAD, UNPAIRED = "chorus-demo-faces", "face_refiner-unpaired"
FILE = f"demo/weights/face_refiner/{HEAD}.safetensors"
STUDENT, REFINED, TEACHER = "student", "student, paired", "teacher"
JUDGES = ("encoder", "classifier")
BRIEF, LONGER = "teacher in", "student of"  # and so many steps
NOTHING = "as they are"


def _frechet(cell: dict, judge: str) -> str:
    found = cell[f"{judge} features"]["distance"]
    if found["value"] == 0:
        return "0"
    digits = 1 if found["value"] > 10 else 2
    return ranged(*(found[k] for k in ("value", "low", "high")), digits)


def _closed(cell: dict, judge: str) -> float:
    return cell[f"{judge} features"]["closed"]


def _closed_cell(name: str, cell: dict, judge: str) -> str:
    """Empty where the distance grows out of all proportion, and for both ends."""
    if name in (STUDENT, TEACHER) or _closed(cell, judge) < -1:
        return ""
    return bold(percent(_closed(cell, judge), 0), name == REFINED)


def _named(result: dict, begin: str) -> tuple[str, int]:
    """The row whose name begins so, and the steps that its name tells."""
    name = next(name for name in result["tables"]["all"] if name.startswith(begin))
    return name, int(name.split()[2])


def _ways(result: dict) -> dict[str, tuple[str, float]]:
    """Of a table's row: title and evaluations."""
    n, s, t = result["cost"]["evaluations"], result["settings"]["student"], result["settings"]["teacher"]
    refined = n["student and refiner"]
    (longer, longer_steps), (brief, brief_steps) = (_named(result, begin) for begin in (LONGER, BRIEF))
    return {
        STUDENT: (f"student, steps: {s['steps']}", n["student"]),
        REFINED: ("**student, refined**", refined),
        "student, paired, color_lock": ("the same with `color_lock`", refined),
        "student, unpaired": ("student, refined without pairs", refined),
        "student, unpaired, color_lock": ("the same with `color_lock`", refined),
        longer: (f"another student, steps: {longer_steps}", longer_steps),
        brief: (f"teacher, steps: {brief_steps}", brief_steps * n["teacher"] / t["steps"]),
        "teacher, other noise": ("teacher, other noise", n["teacher"]),
        TEACHER: (f"teacher, steps: {t['steps']}", n["teacher"]),
    }


def _rows(result: dict) -> list[list[str]]:
    rows = []
    for name, (title, evaluations) in _ways(result).items():
        cell = result["tables"]["all"][name]
        judged = [text for j in JUDGES for text in (_frechet(cell, j), _closed_cell(name, cell, j))]
        right = [share(cell[j][0], cell[j][1:]) for j in reversed(JUDGES)]
        rows.append([title, f"{evaluations:.2g}", *judged, *right])
    return rows


def _tones(result: dict) -> list[list[str]]:
    rows = []
    for tone, count in result["tones"].items():
        cells = result["tables"][tone]
        before, after = cells[STUDENT], cells[REFINED]
        line = ["none given (yellow)" if tone == NOTHING else tone, str(count)]
        for judge in JUDGES:
            values = [number(c[f"{judge} features"]["distance"]["value"], 2) for c in (before, after)]
            line += [" to ".join(values), percent(_closed(after, judge), 0)]
        for judge in reversed(JUDGES):
            line.append(" to ".join(number(100 * c[judge][0], 1) for c in (before, after)) + " %")
        rows.append(line)
    return rows


def _difference(cell: dict, judge: str) -> tuple[float, float, float]:
    found = cell[f"{judge} features"]["FIDdiff"]
    return found["value"], found["low"], found["high"]


def _bias(result: dict) -> str:
    """What part of the tones' distances is the bias of small sets."""
    found = []
    for tone in result["tones"]:
        one = [result["tables"][tone][way][f"{j} features"]["distance"] for j in JUDGES for way in (STUDENT, REFINED)]
        found += [1 - d["corrected"] / d["value"] for d in one]
    return f"{number(100 * min(found))} to {percent(max(found), 0)}"


def _check(result: dict) -> None:
    found, tones = result["tables"]["all"], {t: result["tables"][t][REFINED] for t in result["tones"]}
    bears_out(
        "refining without pairs learned nothing",
        all(abs(_closed(found["student, unpaired"], j)) < 0.02 for j in JUDGES),
    )
    bears_out(
        "a student of more steps closes more",
        all(_closed(found[_named(result, LONGER)[0]], j) > _closed(found[REFINED], j) for j in JUDGES),
    )
    chance = [low < 0 < high for _, low, high in (_difference(tones["dark"], j) for j in JUDGES)]
    bears_out("dark faces gain nothing that can be told from chance", all(chance))
    bears_out("light faces lose by the classifier", _difference(tones["light"], "classifier")[2] < 0)
    bears_out("refining gains by both judges", all(_difference(found[REFINED], j)[1] > 0 for j in JUDGES))
    bears_out(
        "the teacher in few steps is useless", all(_closed(found[_named(result, BRIEF)[0]], j) < -1 for j in JUDGES)
    )


def fields(result: dict) -> dict[str, str]:
    _check(result)
    settings, heads, cost, found = result["settings"], result["heads"], result["cost"], result["tables"]["all"]
    count, size = weights(FILE)
    seconds, (_, longer_steps) = cost["seconds"], _named(result, LONGER)
    one, many = seconds.values()
    head = [
        "",
        "evaluations",
        "distance, encoder",
        "closed",
        "distance, classifier",
        "closed",
        "right, classifier",
        "right, encoder",
    ]
    extra = longer_steps - cost["evaluations"]["student and refiner"]

    def saved(timed: dict) -> str:
        low, high = (number(100 * v, 1) for v in timed["less time"]["interval"])
        return f"{percent(timed['less time']['median'])} ({low}-{high})"

    return {
        "student_steps": f"{settings['student']['steps']}",
        "teacher_steps": f"{settings['teacher']['steps']}",
        "teacher_evaluations": f"{cost['evaluations']['teacher']}",
        "millions": number(count / 10**6, 1),
        "size": number(size / MIB, 1),
        "data": grouped(heads[HEAD]["data"]),
        "minutes": number(int(heads[HEAD]["seconds"]) / 60),
        "pictures": number(settings["pictures"]),
        "table": table(head, _rows(result)),
        "gain_encoder": ranged(*_difference(found[REFINED], "encoder")),
        "gain_classifier": ranged(*_difference(found[REFINED], "classifier")),
        "aim_compute": percent(AIM_COMPUTE, 0),
        "aim_closed": percent(AIM_CLOSED, 0),
        "less": percent(cost["less compute"]),
        "verdict_compute": verdict(cost["less compute"], AIM_COMPUTE),
        "pass": number(cost["evaluations"]["refiner"], 2),
        "less_time": saved(one),
        "less_time_many": saved(many),
        "many": list(seconds)[1],
        "seconds": number(one["student"]["median"] + one["refiner"]["median"], 3),
        "seconds_teacher": number(one["teacher"]["median"], 3),
        "closed": "; ".join(_judged_closed(found[REFINED], j) for j in JUDGES),
        "unpaired_minutes": number(int(heads[UNPAIRED]["seconds"]) / 60),
        "unpaired_batch": heads[UNPAIRED]["batch_size"],
        "unpaired_steps": heads[UNPAIRED]["steps"],
        "extra": number(extra, 1),
        "more_steps": f"{longer_steps}",
        "bias": _bias(result),
        "tones": table(["tone", "pictures", *head[2:]], _tones(result)),
        "light": points(_difference(result["tables"]["light"][REFINED], "classifier"), 2, 1),
    }


def _judged_closed(cell: dict, judge: str) -> str:
    gap = 100 * (_closed(cell, judge) - AIM_CLOSED)
    return f"by the {judge} {percent(_closed(cell, judge), 0)}, {verdict(gap, 0)} ({number(gap, 0, sign=True)} points)"


def _both_closed(cell: dict) -> str:
    return " and ".join(percent(_closed(cell, judge), 0) for judge in JUDGES)


def claims(result: dict) -> list[Claim]:
    _check(result)
    found = result["tables"]["all"]
    less = result["cost"]["less compute"]
    tones = [f"{'yellow' if t == NOTHING else t} {_both_closed(result['tables'][t][REFINED])}" for t in result["tones"]]
    return [
        Claim(
            "A one-step student, refined, comes nearer to its teacher for a fraction of the compute",
            f"{percent(less)} less compute; of the distance closed, {' and '.join(JUDGES)}: {_both_closed(found[REFINED])}",
            f"{percent(AIM_COMPUTE, 0)} less: {verdict(less, AIM_COMPUTE)}; {percent(AIM_CLOSED, 0)} closed: "
            + ", ".join(f"by the {j} {verdict(_closed(found[REFINED], j), AIM_CLOSED)}" for j in JUDGES),
        ),
        Claim(
            "**Not every skin tone gains**: dark ones nothing that can be told from chance, light ones lose by the"
            " classifier",
            f"closed, {' and '.join(JUDGES)}: {'; '.join(tones)}",
            price=True,
        ),
        Claim(
            "**Training without pairs learned nothing** here (CycleGAN, minutes on a CPU)",
            f"closed: {_both_closed(found['student, unpaired'])}",
            price=True,
        ),
    ]
