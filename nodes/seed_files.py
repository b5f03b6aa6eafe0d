"""Noises that Seed Select found, on disk."""

from comfy_api.latest import io

from ..demo.modules import found_seeds
from ..techniques.seed_select.comfy_files import FILES, SeedNoise, load_seed, read_seed, save_seed
from .checked_inputs import checks_inputs


@checks_inputs
class SaveSeed(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveSeed",
            display_name="Save Seed",
            category="chorus",
            description="Writes a noise of Seed Select with its score, its settings and the model's hash.",
            search_aliases=["save noise", "export seed"],
            is_output_node=True,
            inputs=[
                io.Noise.Input("noise", tooltip="From Seed Select or Load Seed."),
                io.String.Input(
                    "filename_prefix",
                    default="seeds/ComfyUI",
                    tooltip="Below the output folder. A number follows; no file is overwritten.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, noise: object, filename_prefix: str) -> io.NodeOutput:
        if not isinstance(noise, SeedNoise):
            raise ValueError(
                f"this noise ({type(noise).__name__}) is drawn anew for each latent and holds nothing to save; wire that of"
                " Seed Select or Load Seed, or keep its integer seed"
            )
        return io.NodeOutput(ui={"seeds": [save_seed(noise, filename_prefix)]})


@checks_inputs
class LoadSeed(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadSeed",
            display_name="Load Seed",
            category="chorus",
            description="Reads a noise that Save Seed wrote, for SamplerCustomAdvanced.",
            search_aliases=["load noise", "saved seed"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[*FILES.names(), *found_seeds()],
                    tooltip="From the input or the output folder, or one that comes with the pack. The latent must have the"
                    " size that it was found for.",
                )
            ],
            outputs=[io.Noise.Output("noise", display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        return file in list(found_seeds()) or FILES.validate(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str | float:
        return file if file is not None and file in list(found_seeds()) else FILES.fingerprint(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        ours = found_seeds().get(file)
        return io.NodeOutput(load_seed(file) if ours is None else read_seed(ours, file))


NODES: list[type[io.ComfyNode]] = [SaveSeed, LoadSeed]
