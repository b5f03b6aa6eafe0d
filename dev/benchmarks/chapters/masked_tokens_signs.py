"""The numbers of: Does the small masked token model know its signs?"""

from ..writing import MIB, Claim, bears_out, number, percent, share, table, weights

RESULTS = ("demo/results/masked_tokens.json",)
FILES = [f"demo/weights/masked_token/{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vqvae")]
ORDER = ("steps", "order", "guidance", "temperature")


def _top(found: dict) -> list[str]:
    return [share(found["top1"]["share"], found["top1"]["interval"]), percent(found["top5"]["share"])]


def _title(name: str, value: str) -> str:
    return f"{value} steps" if name == "steps" else f"{name} {value.removesuffix('.0')}"


def fields(result: dict) -> dict[str, str]:
    tables, default = result["tables"], result["default"]
    rows = []
    for name in ORDER:
        for value, found in tables[name].items():
            is_default = value == str(default[name])
            if not is_default or name == "steps":
                title = _title(name, value)
                rows.append([f"**{title}** (the defaults)" if is_default else title, *_top(found)])
    rows += [[f"{name} signs", *_top(tables["prompts"][name])] for name in ("frequent", "medium", "rare")]
    rows.append(["shuffled prompts (chance)", *_top(tables["prompts"]["shuffled prompts"])])
    again, whole = (result["reconstruction"][k] for k in ("reconstructions", "pictures"))
    rows.append(["*unseen renderings through the VQ-GAN and back*", *_top(again)])
    rows.append(["*unseen renderings as they are*", *_top(whole)])
    order = tables["order"]
    bears_out(
        "orders that ignore the confidence do better",
        all(order[n]["top1"]["share"] > order["confidence"]["top1"]["share"] for n in ("halton", "random")),
    )
    bears_out(
        "their intervals overlap",
        all(order[n]["top1"]["interval"][0] < order["confidence"]["top1"]["interval"][1] for n in ("halton", "random")),
    )
    guidance = tables["guidance"]
    widest = max(guidance, key=float)
    bears_out(
        "a wide guidance scale breaks pictures",
        guidance[widest]["top1"]["interval"][1] < guidance["1.0"]["top1"]["interval"][0],
    )
    sizes = [weights(file) for file in FILES]
    trained = result["weights"]["masked_token/transformer"]
    return {
        "seeds": f"{default['seeds']}",
        "steps": f"{default['steps']}",
        "guidance": f"{default['guidance']:g}",
        "temperature": f"{default['temperature']:g}",
        "order": default["order"],
        "table": table(["", "top-1", "top-5"], rows),
        "millions": number(sum(count for count, _ in sizes) / 10**6, 1),
        "size": number(sum(size for _, size in sizes) / MIB, 1),
        "trained": number(int(trained["steps"])),
        "minutes": number(int(trained["seconds"]) / 60),
        "seconds": number(result["seconds per picture"], 2),
    }


def claims(result: dict) -> list[Claim]:
    found, limit = result["tables"]["prompts"], result["reconstruction"]["reconstructions"]["top1"]["share"]
    chance = found["shuffled prompts"]["top1"]["share"]
    return [
        Claim(
            "The small masked token model paints what it is asked for",
            f"{percent(found['all']['top1']['share'])} of the signs named right; chance {percent(chance)}, its tokens allow"
            f" {percent(limit)}",
        )
    ]
