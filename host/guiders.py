"""Names of ComfyUI's guiders for messages."""


def guider_name(guider: object) -> str:
    """The name of the node that makes ``guider``: ComfyUI calls the class of BasicGuider Guider_Basic."""
    name = type(guider).__name__
    return f"{name.removeprefix('Guider_')}Guider" if name.startswith("Guider_") else name
