"""SaveSeed and LoadSeed: save the noises that Seed Select finds to files, and load them."""

from comfy_api.latest import io

from ..demo.modules import shipped_seeds
from ..techniques.seed_select.comfy_files import FILES, SeedNoise, load_seed, read_seed, save_seed
from .checked_inputs import checks_inputs
from .file_widgets import filename_prefix


@checks_inputs
class SaveSeed(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveSeed",
            display_name="Save Seed",
            category="chorus",
            description="Saves a noise from Seed Select with its score, its settings and the model's hash.",
            search_aliases=["save noise", "export seed"],
            is_output_node=True,
            inputs=[
                io.Noise.Input("noise", tooltip="From Seed Select or Load Seed."),
                filename_prefix("seeds/ComfyUI"),
            ],
            outputs=[io.Noise.Output("noise", display_name="noise", tooltip="The saved noise.")],
        )

    @classmethod
    def execute(cls, noise: object, filename_prefix: str) -> io.NodeOutput:
        if not isinstance(noise, SeedNoise):
            raise ValueError(
                f"expected a noise of Seed Select or Load Seed, got {type(noise).__name__}, which holds no values to save;"
                " connect one of these nodes, or write down the integer seed instead"
            )
        return io.NodeOutput(noise, ui={"seeds": [save_seed(noise, filename_prefix)]})


@checks_inputs
class LoadSeed(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadSeed",
            display_name="Load Seed",
            category="chorus",
            description="Loads a noise that Save Seed wrote, for SamplerCustomAdvanced.",
            search_aliases=["load noise", "saved seed"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[*FILES.names(), *shipped_seeds()],
                    tooltip="A .seed.safetensors file in the input or output folder, or one that comes with the pack. The latent must have"
                    " the same size as the noise.",
                )
            ],
            outputs=[io.Noise.Output("noise", display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return file in list(shipped_seeds()) or FILES.validate(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str | float:
        return file if file is not None and file in list(shipped_seeds()) else FILES.fingerprint(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        shipped = shipped_seeds().get(file)
        return io.NodeOutput(load_seed(file) if shipped is None else read_seed(shipped, file))


NODES: list[type[io.ComfyNode]] = [SaveSeed, LoadSeed]
