"""The demo networks as ComfyUI classes, compared with the plain torch networks of the recipes."""

import comfy.model_base
import comfy.sample
import comfy.samplers
import pytest
import torch

from chorus.demo import denoisers, modules, weights
from chorus.demo.autoencoder import Autoencoder
from chorus.demo.comfy_denoisers import NETWORKS, make_model
from chorus.demo.comfy_latent import ChorusEmojiLatent, make_vae
from chorus.demo.comfy_text import make_clip
from chorus.demo.text import TextModel, read
from chorus.dev.recipes import denoiser, snapshots
from chorus.dev.recipes.networks import flux, unet


def random_weights(module, seed=0):
    """Weights of variance 1 / fan-in everywhere, so that every branch affects the output."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.5
        p.data = torch.randn(p.shape, generator=generator) * scale + (0.5 if p.ndim == 1 else 0.0)
    return module.eval()


def network(name):
    config = NETWORKS[name]
    return random_weights(flux.Flux(config) if "image_model" in config else unet.UNet(config))


@pytest.fixture
def autoencoder():
    model = random_weights(Autoencoder())
    model.shift.copy_(torch.linspace(-0.2, 0.2, 8))
    model.scale.copy_(torch.linspace(0.8, 1.2, 8))
    return model


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_plain_network_matches_comfyui(name, autoencoder):
    plain = network(name)
    patcher = make_model(name, plain.state_dict(), autoencoder)
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 8, 16, 16, generator=generator), torch.randn(2, 20, 96, generator=generator)
    summary = torch.randn(2, 96, generator=generator)
    is_flow = "image_model" in NETWORKS[name]
    t = torch.tensor([0.3, 0.8]) if is_flow else torch.tensor([300.0, 800.0])
    output = patcher.model.diffusion_model(x, t, context=context, y=summary)
    expected = plain(x, t, context, summary)
    assert expected.abs().mean() > 0.1
    assert (output - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_comfyui_x0_matches_recipe_schedule(name, autoencoder):
    """ComfyUI's denoised latent equals the x0 computed with the recipe's schedule."""
    plain = network(name)
    model = make_model(name, plain.state_dict(), autoencoder).model
    model.latent_format = ChorusEmojiLatent(autoencoder)
    generator = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(2, 1, 8, 16, 16, generator=generator)
    context, summary = torch.randn(1, 20, 96, generator=generator), torch.randn(1, 96, generator=generator)
    if "image_model" in NETWORKS[name]:
        t = torch.tensor([0.6])
        schedule = denoiser.Flow()
        x, target = schedule.noisy(x0, noise, t)
        sigma, host_x = t, x
        expected = x - 0.6 * plain(x, t, context, summary)
        assert torch.allclose(target, noise - x0)
        scaled = model.model_sampling.noise_scaling(sigma, noise, x0)
    else:
        t = torch.tensor([640])
        schedule = denoiser.Diffusion()
        x, _ = schedule.noisy(x0, noise, t)
        a, b = schedule.factors(t)
        sigma = (b / a).flatten()
        host_x = x / a
        assert sigma.item() == pytest.approx(model.model_sampling.sigmas[640].item(), rel=1e-4)
        expected = a * x - b * plain(x, t, context, summary)
        scaled = x0 + sigma.view(-1, 1, 1, 1) * noise
    assert torch.allclose(scaled, host_x, atol=1e-4)
    denoised = model.apply_model(host_x, sigma, c_crossattn=context, y=summary)
    assert (denoised - expected).abs().max() < 2e-4


@torch.no_grad()
def test_vae_matches_autoencoder(autoencoder):
    vae = make_vae(autoencoder)
    image = torch.rand(2, 128, 96, 3, generator=torch.Generator().manual_seed(3))
    latent = vae.encode(image)
    expected = autoencoder.encode(image.movedim(-1, 1) * 2 - 1)
    assert latent.shape == (2, 8, 16, 12)
    assert torch.allclose(latent, expected, atol=1e-4)
    decoded = vae.decode(latent)
    assert torch.allclose(decoded, (autoencoder.decode(expected) / 2 + 0.5).clamp(0, 1).movedim(1, -1), atol=1e-4)
    assert (vae.latent_channels, vae.spacial_compression_decode(), vae.spacial_compression_encode()) == (8, 8, 8)
    assert vae.decode_tiled(latent, tile_x=8, tile_y=8, overlap=2).shape == (2, 128, 96, 3)


def test_empty_latent_of_128_pixels_is_extended_to_8_channels(autoencoder):
    patcher = make_model("general", network("general").state_dict(), autoencoder)
    fixed = comfy.sample.fix_empty_latent_channels(patcher, torch.zeros(1, 4, 16, 16), 8)
    assert fixed.shape == (1, 8, 16, 16)


@torch.no_grad()
def test_preview_is_the_mean_colour_of_the_linear_decoder(autoencoder):
    for p in autoencoder.decoder.net.parameters():
        p.zero_()
    z = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(4))
    latent = ChorusEmojiLatent(autoencoder)
    factors, bias = torch.tensor(latent.latent_rgb_factors), torch.tensor(latent.latent_rgb_factors_bias)
    preview = torch.einsum("bchw,cr->brhw", z, factors) + bias.view(1, 3, 1, 1)
    assert torch.allclose(preview, torch.nn.functional.avg_pool2d(autoencoder.decode(z), 8), atol=1e-5)


@torch.no_grad()
def test_clip_states_match_recipe_text_encoder():
    text = random_weights(TextModel())
    clip = make_clip(text.state_dict())
    caption = "a dark baby left of a koala on blue fading to white"
    (tokens, options), *_ = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
    states, summary = read(text, [caption])
    assert torch.allclose(tokens, states, atol=1e-5)
    assert torch.allclose(options["pooled_output"], summary, atol=1e-5)


@pytest.fixture
def shipped(tmp_path, monkeypatch, autoencoder):
    """A weights folder with random weights of the text encoder, the autoencoder and every denoiser."""
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    snapshots.save("autoencoder", autoencoder.state_dict(), style="flat")
    snapshots.save("text", random_weights(TextModel()).state_dict(), style="glossy")
    for name in NETWORKS:
        snapshots.save(name, network(name).state_dict(), style="glossy")


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpoint_samples_in_comfyui(name, shipped):
    model, clip, vae = modules.load_checkpoint(name)
    expected = comfy.model_base.ModelType.FLUX if name == "expert-food" else comfy.model_base.ModelType.V_PREDICTION
    assert model.model.model_type == expected
    conditioning = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a burger", "")]
    latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 4, 16, 16), 8)
    noise = comfy.sample.prepare_noise(latent, 5)
    arguments = (model, noise, 3, 3.0, "euler", "simple", *conditioning, latent)
    samples = comfy.sample.sample(*arguments, seed=5, disable_pbar=True)
    assert samples.shape == (1, 8, 16, 16) and torch.isfinite(samples).all()
    assert vae.decode(samples).shape == (1, 128, 128, 3)
    assert model.cached_patcher_init == (modules.load_model, (name,))


def test_unknown_checkpoint_rejected():
    with pytest.raises(ValueError, match=r"'genral' is unknown; use one of general, expert-animals"):
        modules.load_model("genral")


def test_denoisers_share_one_latent_space():
    assert {config["in_channels"] for config in NETWORKS.values()} == {8}
    assert NETWORKS["expert-food"] is denoisers.FOOD
