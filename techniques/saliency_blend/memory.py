"""The memory that the models of a blend need together, and the part of their weights that ComfyUI will offload.

The arithmetic follows ComfyUI's ``load_models_gpu``, which loads the models of a run one after the other, the base last,
and keeps memory for the computation free. All sizes are in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# How ComfyUI places the weights on a device, by its start options
FIT, DYNAMIC, ALL, NONE, MAIN = "fit", "dynamic", "all", "none", "main"


@dataclass(frozen=True)
class ModelMemory:
    """The weights of one model. Models of the run that use the same weights are one ModelMemory with several names."""

    names: tuple[str, ...]  # as shown to users, such as "base" and "'cats'"
    size: int
    loaded: int = 0  # on the device already

    def __str__(self) -> str:
        return f"{listed(self.names)} ({size_text(self.size)}{', one checkpoint' if len(self.names) > 1 else ''})"


@dataclass(frozen=True)
class DeviceMemory:
    """The models of a run on one device, in the order of the chain, and the memory of the device.

    ``working``: memory that ComfyUI keeps free for the computation. ``free``: free now. ``others``: weights of models
    that are not part of the run, which ComfyUI unloads if it needs their memory. ``placement``: FIT loads as many weights
    as fit before the run, DYNAMIC does so during the run, ALL loads all weights, NONE keeps them in main memory, and
    MAIN is the CPU. ``least_share``: the part of the free memory that is used for weights even if too little is then
    left for the computation.
    """

    device: str
    models: tuple[ModelMemory, ...]
    working: float
    free: float
    others: float = 0.0
    placement: str = FIT
    least_share: float = 0.0
    least_working: float = 0.0  # what ``least_share`` leaves for the computation

    @property
    def weights(self) -> int:
        return sum(m.size for m in self.models)

    @property
    def needed(self) -> float:
        """Memory for all weights and for the computation."""
        return self.weights + self.working

    @property
    def usable(self) -> float:
        """Memory for this run: what is free, what its models occupy, and what other models can give up."""
        return self.free + sum(m.loaded for m in self.models) + self.others

    @property
    def offloaded(self) -> float:
        """About how much of the weights stays in main memory. 0: all weights fit, or all are loaded in any case."""
        if self.placement in (ALL, MAIN):
            return 0.0
        if self.placement == NONE:
            return self.weights
        free, left_out = self.free + self.others, 0.0
        for model in reversed(self.models):  # the base is loaded last
            here = free + model.loaded
            room = max(0.0, here - self.working, min(here * self.least_share, here - self.least_working))
            placed = model.size if room > model.size else min(room, model.size)
            left_out += model.size - placed
            free -= placed - model.loaded
        return left_out

    def __str__(self) -> str:
        """One sentence for users."""
        models, several = listed([str(m) for m in self.models]), len(self.models) > 1
        plural = any(len(m.names) > 1 for m in self.models)  # several models of one checkpoint
        if self.placement == MAIN:
            verb = "are loaded together" if several else "are loaded" if plural else "is loaded"
            return f"memory: {models} {verb} in main memory"
        text = (
            f"memory: {models} {'together need' if several else 'need' if plural else 'needs'} about {size_text(self.needed)} on {self.device},"
            f" with {size_text(self.working)} for the computation; {size_text(self.usable)} can be used"
        )
        if self.others > 0.0 and self.needed > self.usable - self.others:
            text += f", after ComfyUI has unloaded other models ({size_text(self.others)})"
        return f"{text}: {self._outcome()}"

    def _outcome(self) -> str:
        if self.placement == NONE:
            return "because of its option --novram, ComfyUI keeps the weights in main memory, which is slower"
        if self.placement == ALL:
            if self.needed < self.usable:
                return "all weights stay loaded"
            return (
                "because of its start options, ComfyUI loads all weights nevertheless, so the run may be out of memory;"
                " use fp8 weights, a smaller image or a second device for an expert"
            )
        if self.offloaded <= 0.0:
            return "all weights stay loaded"
        return (
            f"ComfyUI will keep about {size_text(self.offloaded)} of the weights in main memory, which is slower; fp8"
            " weights, a smaller image or a second device for an expert need less"
        )

    @property
    def is_loaded(self) -> bool:
        """Whether all weights are on the device already."""
        return all(m.loaded >= m.size for m in self.models)


def listed(names: Sequence[str]) -> str:
    """``names`` as a list in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def size_text(size: float) -> str:
    """``size`` bytes in GiB, or in MiB if it is less than a tenth of a GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
