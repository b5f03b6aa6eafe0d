"""The picture of a trace: colours, one sheet per sample, the experts' mask."""

import pytest
import torch

from chorus.common.sheets import model_colour
from chorus.techniques.saliency_blend.trace import BlendRecord, BlendStep
from chorus.techniques.saliency_blend.view import colour_shares, draw_blend


def a_record(steps=3, batch=1, spatial=(6, 8), models=2, owner=None):
    generator = torch.Generator().manual_seed(0)
    owners = [
        torch.randint(0, models, (batch, *spatial), generator=generator, dtype=torch.uint8) if owner is None else owner
        for _ in range(steps)
    ]
    return BlendRecord(
        labels=("base", *(f"expert {i}" for i in range(1, models))),
        shape=(batch, *spatial),
        seed=1,
        steps=[BlendStep(float(steps - i), tuple(range(models)), owners[i]) for i in range(steps)],
        spent=[steps] * models,
        saved=[0] * models,
        cost=[float(steps)] * models,
    )


def rgb(model):
    return torch.tensor(model_colour(model)) / 255


def test_each_model_has_its_colour_and_mixtures_lie_between():
    shares = torch.tensor([[[1.0, 0.0, 0.5]], [[0.0, 1.0, 0.5]]])
    picture = colour_shares(shares)
    torch.testing.assert_close(picture[0, 0], rgb(0))
    torch.testing.assert_close(picture[0, 1], rgb(1))
    torch.testing.assert_close(picture[0, 2], (rgb(0) + rgb(1)) / 2)


def test_colours_of_neighbours_differ():
    assert len({model_colour(i) for i in range(7)}) == 7
    assert model_colour(7) == model_colour(1)  # experts take turns; grey stays the base's
    assert model_colour(0) not in {model_colour(i) for i in range(1, 20)}


def test_mask_is_the_experts_mean_share():
    record = a_record(steps=4, batch=2)
    _, mask = draw_blend(record)
    owners = torch.stack([s.weights for s in record.steps])
    torch.testing.assert_close(mask, (owners != 0).float().mean(0))


def test_one_sheet_per_sample_shows_its_own_masks():
    owner = torch.zeros(2, 6, 8, dtype=torch.uint8)
    owner[1] = 1
    image, mask = draw_blend(a_record(batch=2, owner=owner))
    assert image.shape[0] == 2
    assert image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    assert mask.flatten(1).mean(1).tolist() == [0.0, 1.0]
    shown = [(sheet - rgb(1)).abs().amax(-1).lt(1e-3).sum() for sheet in image]
    assert shown[1] > 10 * shown[0]  # on the first sheet only the legend has the expert's colour


def test_left_and_right_are_kept():
    owner = torch.zeros(1, 6, 8, dtype=torch.uint8)
    owner[..., 4:] = 1
    image = draw_blend(a_record(owner=owner))[0][0]
    columns = (image - rgb(1)).abs().amax(-1).lt(1e-3).float().mean(0)
    base_columns = (image - rgb(0)).abs().amax(-1).lt(1e-3).float().mean(0)
    assert base_columns.argmax() < columns.argmax()


@pytest.mark.parametrize("spatial", [(6, 8), (64, 64), (3, 40), (40, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 24, 25, 100])
def test_any_size_and_number_of_steps(spatial, steps):
    image, mask = draw_blend(a_record(steps=steps, spatial=spatial, models=3))
    assert image.shape[-1] == 3
    assert max(image.shape[1:3]) < 3000
    assert mask.shape == (1, *spatial)


def test_soft_weights_and_steps_of_the_base_alone():
    record = a_record(steps=1)
    record.steps.append(BlendStep(0.5, (0,), None))
    record.steps.append(BlendStep(0.2, (0, 1), torch.tensor([0.25, 0.75]).reshape(2, 1, 1, 1).expand(2, 1, 6, 8)))
    _, mask = draw_blend(record)
    first = record.steps[0].weights.float()
    torch.testing.assert_close(mask, (first + 0.0 + 0.75) / 3)


def test_video_gives_the_mask_of_every_frame():
    record = a_record(batch=2, spatial=(5, 6, 8))
    image, mask = draw_blend(record)
    assert image.shape[0] == 2
    assert mask.shape == (10, 6, 8)
