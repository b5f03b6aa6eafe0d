"""The image of a trace: its colours, one sheet per sample, and the experts' mask."""

import pytest
import torch

from chorus.common.sheets import model_colour
from chorus.techniques.saliency_blend.trace import BlendRecord, BlendStep, quantised
from chorus.techniques.saliency_blend.view import colour_shares, draw_blend


def make_record(steps=3, batch=1, spatial=(6, 8), models=2, owner=None):
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
    image = colour_shares(shares)
    torch.testing.assert_close(image[0, 0], rgb(0))
    torch.testing.assert_close(image[0, 1], rgb(1))
    torch.testing.assert_close(image[0, 2], (rgb(0) + rgb(1)) / 2)


def test_colours_of_neighbours_differ():
    assert len({model_colour(i) for i in range(7)}) == 7
    assert model_colour(7) == model_colour(1)  # the six colours of experts repeat; only the base is grey
    assert model_colour(0) not in {model_colour(i) for i in range(1, 20)}


def test_mask_is_the_experts_mean_share():
    record = make_record(steps=4, batch=2)
    _, mask = draw_blend(record)
    owners = torch.stack([s.weights for s in record.steps])
    torch.testing.assert_close(mask, (owners != 0).float().mean(0))


def test_each_sample_has_a_sheet_of_its_masks():
    owner = torch.zeros(2, 6, 8, dtype=torch.uint8)
    owner[1] = 1
    image, mask = draw_blend(make_record(batch=2, owner=owner))
    assert image.shape[0] == 2
    assert image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    assert mask.flatten(1).mean(1).tolist() == [0.0, 1.0]
    shown = [(sheet - rgb(1)).abs().amax(-1).lt(1e-3).sum() for sheet in image]
    assert shown[1] > 10 * shown[0]  # on the first sheet only the legend has the expert's colour


def test_sheet_is_not_mirrored():
    owner = torch.zeros(1, 6, 8, dtype=torch.uint8)
    owner[..., 4:] = 1
    image = draw_blend(make_record(owner=owner))[0][0]
    columns = (image - rgb(1)).abs().amax(-1).lt(1e-3).float().mean(0)
    base_columns = (image - rgb(0)).abs().amax(-1).lt(1e-3).float().mean(0)
    assert base_columns.argmax() < columns.argmax()


@pytest.mark.parametrize("spatial", [(6, 8), (64, 64), (3, 40), (40, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 24, 25, 100])
def test_any_size_and_number_of_steps_can_be_drawn(spatial, steps):
    image, mask = draw_blend(make_record(steps=steps, spatial=spatial, models=3))
    assert image.shape[-1] == 3
    assert max(image.shape[1:3]) < 3000
    assert mask.shape == (1, *spatial)


def test_mask_averages_hard_and_soft_steps_and_steps_of_the_base_alone():
    record = make_record(steps=1)
    record.steps.append(BlendStep(0.5, (0,), None))
    record.steps.append(BlendStep(0.2, (0, 1), torch.tensor([0.25, 0.75]).reshape(2, 1, 1, 1).expand(2, 1, 6, 8)))
    _, mask = draw_blend(record)
    first = record.steps[0].weights.float()
    torch.testing.assert_close(mask, (first + 0.0 + 0.75) / 3)


def test_sheet_shows_a_lead_histogram_of_each_expert():
    record = make_record(models=3, spatial=(16, 16))
    plain = draw_blend(record)[0]
    generator = torch.Generator().manual_seed(0)
    record.steps = [
        BlendStep(s.sigma, s.models, s.weights, quantised(torch.randn(2, 1, 16, 16, generator=generator)), (0.0, 1.0, 0.0),
                  (None, None, 20))
        for s in record.steps
    ]  # fmt: skip
    sheet = draw_blend(record)[0]
    added = sheet[0, plain.shape[1] :]
    assert added.shape[0] > 0 and sheet.shape[2] == plain.shape[2]
    for model in range(3):
        assert (added - rgb(model)).abs().amax(-1).lt(1e-3).any(), model


def test_video_has_a_mask_for_every_frame():
    record = make_record(batch=2, spatial=(5, 6, 8))
    image, mask = draw_blend(record)
    assert image.shape[0] == 2
    assert mask.shape == (10, 6, 8)


def test_filmstrip_shows_the_mask_and_the_share_of_every_frame():
    """Frame k of 5 belongs to the expert in its first 2 k columns."""
    owner = torch.zeros(1, 5, 6, 8, dtype=torch.uint8)
    for frame in range(5):
        owner[:, frame, :, : 2 * frame] = 1
    record = make_record(spatial=(5, 6, 8), owner=owner)
    plain = draw_blend(make_record(spatial=(1, 6, 8), owner=owner[:, 2:3]))[0]
    sheet = draw_blend(record)[0][0]
    assert sheet.shape[1] == plain.shape[2]
    strip = sheet[plain.shape[1] - 8 :]  # below the sheet of a video of one frame, which has no filmstrip
    for frame in range(5):
        tile = strip[20:90, 8 + 104 * frame : 8 + 104 * frame + 96]
        own = (tile - rgb(1)).abs().amax(-1).lt(1e-3).float().mean()
        assert abs(float(own) - frame / 4) < 0.1, frame
    assert "expert 1, over the whole run in each latent frame: 0 %, 25 %, 50 %, 75 %, 100 %" in record.report()


def test_filmstrip_has_at_most_sixteen_frames():
    heights = [draw_blend(make_record(spatial=(frames, 6, 8)))[0].shape[1] for frames in (8, 16, 17, 90)]
    assert heights[0] < heights[1] == heights[2] == heights[3]


def test_warnings_are_drawn_above_the_masks():
    plain, _ = draw_blend(make_record())
    record = make_record()
    record.warnings = ("'expert 1' takes part in no step: " + "its window is empty; " * 8,)
    warned, _ = draw_blend(record)
    lines = (warned.shape[1] - plain.shape[1]) // 20
    assert lines >= 3 and warned.shape[2] == plain.shape[2]
    # the text stands between the title and the masks, which only move down
    torch.testing.assert_close(warned[:, 36 + 20 * lines :], plain[:, 36:])
    assert (warned[:, 36 : 36 + 20 * lines] > 0.9).any()
