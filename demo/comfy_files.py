"""The heads and refiners of demo/weights, offered among the files of the user's model folders."""

from ..host.model_folders import add_shipped_files
from .weights import FOLDER


def offer_shipped_files() -> None:
    for name in ("cas_dm", "face_refiner"):
        add_shipped_files(name, FOLDER / name)
