"""Imports diffusers 0.33.1, the reference for aMUSEd, although ComfyUI requires a newer version of transformers."""

import importlib
import logging
from types import ModuleType


def diffusers_pipelines() -> ModuleType:
    """The package ``diffusers``, whose pipelines can then be imported. Raises ImportError if it is not installed."""
    # the pipelines import this name but do not use it; transformers 5 has removed it
    utils = importlib.import_module("transformers.utils")
    if not hasattr(utils, "FLAX_WEIGHTS_NAME"):
        utils.FLAX_WEIGHTS_NAME = "flax_model.msgpack"
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # hides its deprecation warnings
    return importlib.import_module("diffusers")
