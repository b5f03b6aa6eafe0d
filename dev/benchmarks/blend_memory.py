"""Peak memory of a blend of two checkpoints of SD 1.5's size, to compare with the computed numbers of docs/memory.md.

The peak is that of a new process that holds both models and samples one step with the blend, or with each model in turn,
minus its memory before the models were created. The image has the usual 512 x 512 pixels. After this benchmark, run
``python run.py memory --write``.
"""

import argparse
from dataclasses import asdict

from .. import headless

headless.start()

import comfy.model_management  # noqa: E402

from .environment import publish  # noqa: E402
from .fusion_case import DTYPES, Setting, check_memory  # noqa: E402
from .peak_memory import memory, memory_table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights (default fp32)")
    parser.add_argument("--repeats", type=int, default=3, help="new processes with and without the blend (default 3)")
    options = parser.parse_args()
    setting = Setting("sd15", 64, 1, options.dtype, 1)
    check_memory(setting, comfy.model_management.get_torch_device().type)
    found = memory(setting, options.repeats)
    publish("blend_memory", {"setting": asdict(setting), "title": setting.title, **found}, memory_table(found))


if __name__ == "__main__":
    main()
