"""Lists the files of demo/weights/cas_dm and demo/weights/face_refiner in ComfyUI's model folders of the same names."""

from ..host.model_folders import add_shipped_files
from .weights import FOLDER


def register_shipped_files() -> None:
    for name in ("cas_dm", "face_refiner"):
        add_shipped_files(name, FOLDER / name)
