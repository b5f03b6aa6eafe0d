"""Generators compared with reference implementations of the published layouts in torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F

from chorus.techniques.face_refiner.networks.image_generators import NETWORKS, detect, load_generator
from chorus.techniques.face_refiner.networks.residual import FaceRefinerNet, RefinerConfig
from chorus.techniques.face_refiner.networks.resnet import ResnetConfig, ResnetGenerator
from chorus.techniques.face_refiner.networks.unet import UnetConfig, UnetGenerator
from chorus.tests.support.casting import CASTING

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = RefinerConfig(widths=(8, 16, 24), blocks=(1, 2, 1), reduction=4)


def fill(network):
    """The state dict of ``network`` with random weights, so that every layer changes the result."""
    weights = {}
    for name, weight in network.state_dict().items():
        if name.endswith("filt"):
            weights[name] = weight
        elif name.endswith("running_var"):
            weights[name] = torch.rand(weight.shape) + 0.5
        elif name.endswith(("bias", "running_mean")):
            weights[name] = 0.2 * torch.randn(weight.shape)
        elif weight.ndim == 1:
            weights[name] = 1.0 + 0.2 * torch.randn(weight.shape)
        else:
            weights[name] = torch.randn(weight.shape) * (1.5 / weight[0].numel()) ** 0.5
    return weights


def state_of(config):
    return fill(NETWORKS[type(config)](config))


class Reference:
    """Reference implementation of the published layouts, computed layer by layer from a state dict."""

    def __init__(self, weights, config, generators=None):
        self.w, self.config, self.generators = weights, config, generators

    def conv(self, x, name, transposed=False, **options):
        function = F.conv_transpose2d if transposed else F.conv2d
        return function(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"), **options)

    def norm(self, x, name):
        if self.config.norm == "instance":
            assert f"{name}.weight" not in self.w
            return F.instance_norm(x)
        weight, bias, mean, var = (self.w[f"{name}.{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
        if self.generators is None:
            return F.batch_norm(x, mean, var, weight, bias)
        # as in pix2pix's test code: batches of one sample, in train()
        return torch.cat([F.batch_norm(one[None], None, None, weight, bias, training=True) for one in x])

    def dropout(self, x):
        if self.generators is None:
            return x
        masks = [torch.rand(x.shape[1:], generator=generator) >= 0.5 for generator in self.generators]
        return x * torch.stack(masks).to(x.dtype) / 0.5

    def resnet(self, x):
        def reflect(x, n):
            return F.pad(x, (n,) * 4, mode="reflect")

        dropout = self.config.dropout
        x = F.relu(self.norm(self.conv(reflect(x, 3), "model.1"), "model.2"))
        index = 4
        for _ in range(2):
            stride = 1 if self.config.blur_down else 2
            x = F.relu(self.norm(self.conv(x, f"model.{index}", stride=stride, padding=1), f"model.{index + 1}"))
            index += 3
            if self.config.blur_down:
                filters = self.w[f"model.{index}.filt"]
                x = F.conv2d(reflect(x, 1), filters, stride=2, groups=x.shape[1])
                index += 1
        for _ in range(self.config.blocks):
            block = f"model.{index}.conv_block."
            y = F.relu(self.norm(self.conv(reflect(x, 1), f"{block}1"), f"{block}2"))
            if dropout:
                y = self.dropout(y)
            second = 6 if dropout else 5
            x = x + self.norm(self.conv(reflect(y, 1), f"{block}{second}"), f"{block}{second + 1}")
            index += 1
        for _ in range(2):
            if self.config.blur_up:
                filters = self.w[f"model.{index}.filt"]
                x = F.pad(x, (1,) * 4, mode="replicate")
                x = F.conv_transpose2d(x, filters, stride=2, padding=2, groups=x.shape[1])[:, :, 1:, 1:][:, :, :-1, :-1]
                x = self.conv(x, f"model.{index + 1}", padding=1)
                index += 1
            else:
                x = self.conv(x, f"model.{index}", transposed=True, stride=2, padding=1, output_padding=1)
            x = F.relu(self.norm(x, f"model.{index + 1}"))
            index += 3
        return torch.tanh(self.conv(reflect(x, 3), f"model.{index + 1}"))

    def unet(self, x):
        x = self.conv(x, "model.model.0", stride=2, padding=1)
        x = self.skip(x, "model.model.1.model.", 1)
        return torch.tanh(self.conv(F.relu(x), "model.model.3", transposed=True, stride=2, padding=1))

    def skip(self, x, at, depth):
        # the published LeakyReLU has inplace=True, so the skip connection carries its result
        F.leaky_relu_(x, 0.2)
        y = self.conv(x, f"{at}1", stride=2, padding=1)
        innermost = depth == self.config.downs - 1
        if not innermost:
            y = self.skip(self.norm(y, f"{at}2"), f"{at}3.model.", depth + 1)
        index = 3 if innermost else 5
        y = self.conv(F.relu(y), f"{at}{index}", transposed=True, stride=2, padding=1)
        y = self.norm(y, f"{at}{index + 1}")
        if not innermost and depth >= 4:
            y = self.dropout(y)
        return torch.cat([x, y], 1)

    def refiner(self, x):
        def group(x, name):
            return F.group_norm(x, x.shape[1] // 8, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

        def block(x, name):
            y = self.conv(F.silu(group(x, f"{name}.norm1")), f"{name}.conv1", padding=1)
            y = self.conv(F.silu(group(y, f"{name}.norm2")), f"{name}.conv2", padding=1)

            def mlp(v):
                return self.conv(F.relu(self.conv(v, f"{name}.attention.squeeze")), f"{name}.attention.excite")

            y = y * torch.sigmoid(mlp(F.adaptive_avg_pool2d(y, 1)) + mlp(F.adaptive_max_pool2d(y, 1)))
            places = torch.stack([y.mean(1), y.max(1).values], 1)
            return x + y * torch.sigmoid(self.conv(places, f"{name}.attention.spatial", padding=3))

        y, skips = self.conv(x, "conv_in", padding=1), []
        for i, number in enumerate(self.config.blocks):
            if i:
                y = self.conv(y, f"halve.{i - 1}", stride=2, padding=1)
            for j in range(number):
                y = block(y, f"down.{i}.{j}")
            skips.append(y)
        for i in reversed(range(len(skips) - 1)):
            y = self.conv(y, f"narrow.{i}").repeat_interleave(2, 2).repeat_interleave(2, 3)
            y = block(self.conv(torch.cat([skips[i], y], 1), f"merge.{i}", padding=1), f"up.{i}.0")
        return (x + self.conv(F.silu(y), "conv_out", padding=1)).clamp(-1, 1)

    def __call__(self, x):
        kinds = {ResnetConfig: self.resnet, UnetConfig: self.unet, RefinerConfig: self.refiner}
        return kinds[type(self.config)](x.clone())


def seeds(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


LAYOUTS = [
    (ResnetConfig(ngf=8), 2, (24, 32)),
    (ResnetConfig(ngf=8, blocks=6), 1, (8, 12)),
    (ResnetConfig(ngf=5, blocks=2, dropout=True), 3, (16, 16)),
    (ResnetConfig(ngf=8, blocks=6, norm="batch"), 2, (16, 20)),
    (ResnetConfig(ngf=8, blocks=3, norm="batch", dropout=True), 2, (16, 16)),
    (ResnetConfig(ngf=8, blocks=9, blur_down=True, blur_up=True), 1, (24, 16)),
    (ResnetConfig(ngf=8, blocks=6, blur_down=True), 2, (16, 16)),
    (ResnetConfig(ngf=8, blocks=6, blur_up=True, norm="batch"), 1, (16, 16)),
    (UnetConfig(ngf=4, downs=7), 1, (128, 128)),
    (UnetConfig(ngf=4, downs=5), 3, (32, 64)),
    (UnetConfig(ngf=4, downs=6, norm="instance"), 2, (128, 64)),
    (TINY, 2, (20, 24)),
    (RefinerConfig(widths=(8, 16), blocks=(2, 1), reduction=16), 1, (2, 6)),
]


def relative(value, exact):
    return ((value - exact).abs().max() / exact.std()).item()


def assert_matches_reference(network, weights, config, x, generators=lambda: None):
    actual = network(x, generators())
    reference = Reference(weights, config, generators())(x)
    exact = Reference({k: w.double() for k, w in weights.items()}, config, generators())(x.double())
    assert exact.std() > 0.01 and exact.abs().min() < 1.0
    error, reference_error = relative(actual, exact), relative(reference, exact)
    assert error <= 3 * reference_error + 1e-6 < 1e-3
    return actual


@pytest.mark.parametrize(("config", "batch", "size"), LAYOUTS, ids=str)
def test_outputs_match_the_published_layout(config, batch, size):
    weights = state_of(config)
    network = load_generator(weights)
    assert network.config == config
    x = torch.rand(batch, 3, *size) * 2 - 1
    actual = assert_matches_reference(network, weights, config, x)
    assert actual.shape == x.shape and actual.dtype is torch.float32
    assert torch.equal(network(x), actual)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (ResnetConfig(ngf=8, blocks=2, norm="batch", dropout=True), (16, 16)),
        (ResnetConfig(ngf=8, blocks=2, dropout=True), (16, 20)),
        (UnetConfig(ngf=4, downs=7), (128, 128)),
        (UnetConfig(ngf=4, downs=6, norm="instance"), (64, 64)),
    ],
    ids=str,
)
def test_train_mode_depends_on_the_generators(config, size):
    weights = state_of(config)
    network = load_generator(weights)
    x = torch.rand(2, 3, *size) * 2 - 1
    actual = assert_matches_reference(network, weights, config, x, lambda: seeds(2))
    assert not torch.allclose(actual, network(x), atol=0.01)
    # the result of a sample depends on its seed, and is independent of the other samples
    assert relative(network(x[1:], seeds(2)[1:]), actual[1:]) < 1e-4
    assert not torch.allclose(network(x[1:], seeds(1)), actual[1:], atol=0.01)
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())


def test_skip_connections_carry_the_leaky_relu():
    config = UnetConfig(ngf=4, downs=5)
    weights, x = state_of(config), torch.randn(2, 4, 16, 16)
    before = x.clone()
    actual = load_generator(weights).model.model[1](x)
    assert torch.equal(actual[:, :4], F.leaky_relu(x, 0.2)) and actual.shape == (2, 8, 16, 16)
    assert relative(actual, Reference(weights, config).skip(x.clone(), "model.model.1.model.", 1)) < 1e-5
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [
        (ResnetConfig(), 11_378_179, 48),
        (ResnetConfig(blocks=6), 7_837_699, 36),
        (UnetConfig(), 54_413_955, 82 - 13),  # without the counters of the batch norms
        (UnetConfig(downs=7), 41_828_995, 70 - 11),
    ],
    ids=str,
)
def test_sizes_match_the_published_networks(config, parameters, tensors):
    with torch.device("meta"):
        network = NETWORKS[type(config)](config)
    assert sum(weight.numel() for weight in network.parameters()) == parameters
    assert len(network.state_dict()) == tensors
    assert detect(network.state_dict()) == config


def test_weight_names_match_the_published_files():
    def names(config):
        with torch.device("meta"):
            return {name: tuple(w.shape) for name, w in NETWORKS[type(config)](config).state_dict().items()}

    resnet = names(ResnetConfig())
    assert {int(name.split(".")[1]) for name in resnet} == {1, 4, 7, *range(10, 19), 19, 22, 26}
    assert resnet["model.19.weight"] == (256, 128, 3, 3) and resnet["model.26.bias"] == (3,)
    assert "model.12.conv_block.5.bias" in resnet
    assert "model.12.conv_block.6.bias" in names(ResnetConfig(dropout=True))
    batch = names(ResnetConfig(norm="batch"))
    assert "model.1.bias" not in batch and "model.26.bias" in batch and "model.12.conv_block.6.running_var" in batch
    cut_names = names(ResnetConfig(blur_down=True, blur_up=True))
    assert {name for name in cut_names if name.endswith("filt")} == {f"model.{i}.filt" for i in (7, 11, 21, 25)}
    assert (
        cut_names["model.22.weight"] == (128, 256, 3, 3)
        and "model.26.weight" in cut_names
        and "model.30.weight" in cut_names
    )
    unet = names(UnetConfig())
    assert unet["model.model.0.weight"] == (64, 3, 4, 4) and "model.model.0.bias" not in unet
    assert unet["model.model.1.model.1.weight"] == (128, 64, 4, 4)
    assert unet["model.model.1.model.5.weight"] == (256, 64, 4, 4)
    assert unet["model.model.3.weight"] == (128, 3, 4, 4) and "model.model.3.bias" in unet
    innermost = "model.model.1.model." + 6 * "3.model."
    assert unet[f"{innermost}3.weight"] == (512, 512, 4, 4) and f"{innermost}4.running_mean" in unet


def test_blurs_match_cut():
    weights = ResnetGenerator(ResnetConfig(ngf=4, blocks=1, blur_down=True, blur_up=True)).state_dict()
    down = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    up = torch.tensor([[1, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]]) / 16
    assert torch.equal(weights["model.7.filt"], down.expand(8, 1, 3, 3))
    assert torch.equal(weights["model.13.filt"], up.expand(16, 1, 4, 4))


def test_files_of_old_torch_and_of_data_parallel_load():
    config = ResnetConfig(ngf=4, blocks=2)
    weights, x = state_of(config), torch.rand(1, 3, 16, 16)
    expected = load_generator(weights)(x)
    old = dict(weights)
    for name in ("model.2", "model.10.conv_block.2", "model.10.conv_block.6"):
        old[f"{name}.running_mean"], old[f"{name}.running_var"] = torch.full((16,), 9.0), torch.full((16,), 0.1)
        old[f"{name}.num_batches_tracked"] = torch.tensor(7)
    for actual in (old, {f"module.{name}": w for name, w in weights.items()}):
        assert torch.equal(load_generator(actual)(x), expected)
    # batch norms need their statistics
    batch = state_of(ResnetConfig(ngf=4, blocks=2, norm="batch"))
    counted = {**batch, "model.2.num_batches_tracked": torch.tensor(7)}
    assert torch.equal(load_generator(counted)(x), load_generator(batch)(x))
    del batch["model.2.running_mean"]
    with pytest.raises(ValueError, match=r"1 missing: model\.2\.running_mean \(4,\)"):
        load_generator(batch)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "got an empty file; supported: ResNet"),
        (
            {"conv_first.weight": torch.zeros(64, 3, 3, 3)},
            r"got conv_first\.weight \(64, 3, 3, 3\); supported: ResNet",
        ),
        ({"state_dict": {}, "epoch": 3}, r"got state_dict a dict, epoch a int"),
        ({"model.0.weight": torch.zeros(64, 3, 4, 4), "model.0.bias": torch.zeros(64)}, "a discriminator.*net_G"),
        ([torch.zeros(1)], "expected a state dict, got a list"),
        ({"model.model.0.weight": torch.zeros(8, 3, 4, 4)}, "expected 5 to 12 halvings, got 1"),
        ({"model.10.conv_block.1.weight": torch.zeros(8, 8, 3, 3)}, "it has no 'model.1.weight'"),
        ({"model.1.weight": 3, "model.10.conv_block.1.weight": torch.zeros(8, 8, 3, 3)}, "4 dimensions, got a int"),
    ],
    ids=str,
)
def test_unknown_generator_rejected(weights, message):
    with pytest.raises(ValueError, match=message):
        load_generator(weights)


def test_wrong_weights_are_listed():
    weights = state_of(ResnetConfig(ngf=4, blocks=2))
    grey = {**weights, "model.1.weight": torch.zeros(4, 1, 7, 7)}
    with pytest.raises(ValueError, match=r"model\.1\.weight: expected \(4, 3, 7, 7\), got \(4, 1, 7, 7\)"):
        load_generator(grey)
    weights["model.10.conv_block.5.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.10\.conv_block\.5\.weight: expected finite numbers, got NaN"):
        load_generator(weights)


def test_untrained_refiner_changes_nothing():
    network, images = FaceRefinerNet(TINY), torch.rand(2, 3, 16, 24)
    x = 2 * images - 1
    assert torch.equal(network(x), x)
    assert torch.equal(network.refine(images), images)
    assert torch.equal(network.refine(images, dtype=torch.float32), images)
    other = load_generator(state_of(TINY))
    assert not torch.allclose(other.refine(images), images, atol=0.01)


def test_refiner_is_small_enough_to_ship():
    with torch.device("meta"):
        network = FaceRefinerNet()
    assert 2 * sum(w.numel() for w in network.parameters()) < 7e6
    assert detect(network.state_dict()) == RefinerConfig()


@pytest.mark.parametrize("config", [ResnetConfig(ngf=8, blocks=2), UnetConfig(ngf=4, downs=5), TINY], ids=str)
def test_images_are_scaled_for_the_network_and_back(config):
    network, images = load_generator(state_of(config)), torch.rand(1, 3, 32, 32)
    expected = (network(2 * images - 1) + 1) / 2
    assert (network.refine(images) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("config", [ResnetConfig(ngf=8), UnetConfig(ngf=4, downs=6, norm="instance"), TINY], ids=str)
def test_weights_are_cast_to_the_compute_dtype(config):
    weights = state_of(config)
    halves = {name: w.half() if w.ndim == 4 else w for name, w in weights.items()}
    network = load_generator(halves, CASTING)
    x = torch.rand(1, 3, 64, 64)
    float32_network = load_generator({name: w.float() for name, w in halves.items()})
    # float32 by default, bfloat16 on request
    assert torch.equal(network(x), float32_network(x))
    actual = network(x, dtype=torch.bfloat16)
    assert actual.dtype is torch.float32
    assert 1e-5 < relative(actual, float32_network(x)) < 0.2


def photo(size):
    """An image with shading, edges and grain."""
    shade = F.interpolate(torch.rand(1, 3, 4, 4), (size, size), mode="bicubic").clamp(0, 1)
    shade[..., size // 3 : size // 2, size // 4 :] *= 0.3
    return rounded(shade + 0.03 * torch.randn(shade.shape))


def flat(size):
    """A nearly uniform image, in which norms amplify differences."""
    return rounded(0.85 + 0.02 * torch.randn(1, 3, size, size))


def rounded(images):
    return (255 * images.clamp(0, 1)).round() / 255


@pytest.mark.slow
@pytest.mark.parametrize("image", [photo, flat])
@pytest.mark.parametrize(
    "config", [ResnetConfig(), UnetConfig(ngf=32, downs=7), RefinerConfig()], ids=["resnet", "unet", "own"]
)
def test_bfloat16_changes_an_image_by_a_few_levels(config, image):
    """Random weights are the worst case: trained weights change an image less."""
    weights = state_of(config)
    network = load_generator(weights, CASTING)
    images = image(128)
    expected = network.refine(images)
    assert 255 * (expected - images).abs().mean() > 20
    levels = 255 * (network.refine(images, dtype=torch.bfloat16) - expected).abs().flatten()
    assert 0 < levels.mean() < 2.5 and levels.quantile(0.999) < 16


@pytest.mark.parametrize(
    "config", [ResnetConfig(ngf=8, blocks=2, norm="batch", dropout=True), UnetConfig(ngf=4, downs=5), TINY], ids=str
)
def test_every_weight_gets_a_gradient(config):
    network = load_generator(state_of(config)).requires_grad_(True)
    network(torch.rand(2, 3, 32, 32)).square().mean().backward()
    without_gradient = [
        name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    # biases before a norm have no effect
    assert not [name for name in without_gradient if not name.endswith("bias")]


def test_min_side_and_multiple_are_sufficient():
    for config in (ResnetConfig(ngf=4, blocks=1, blur_down=True, blur_up=True), UnetConfig(ngf=4, downs=5), TINY):
        network = load_generator(state_of(config))
        for height, width in (
            (network.min_side, network.min_side),
            (network.min_side + network.multiple, 2 * network.min_side),
        ):
            x = torch.rand(1, 3, height, width)
            if isinstance(network, UnetGenerator):
                assert network.multiple == 32
            assert network(x).shape == x.shape
