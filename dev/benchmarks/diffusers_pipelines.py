"""diffusers 0.33.1, whose aMUSEd pipelines the pack is compared with, beside the host's newer transformers."""

import importlib
import logging
from types import ModuleType


def diffusers_pipelines() -> ModuleType:
    """The package ``diffusers``, with pipelines that can be imported; ImportError where it is not installed."""
    # they ask transformers for this name, which version 5 has dropped; nothing of them uses it
    utils = importlib.import_module("transformers.utils")
    if not hasattr(utils, "FLAX_WEIGHTS_NAME"):
        utils.FLAX_WEIGHTS_NAME = "flax_model.msgpack"
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # they are deprecated, which we know
    return importlib.import_module("diffusers")
