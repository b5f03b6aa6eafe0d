"""A run of SaliencyNoiseBlend and its comparison with the definition.

Every prediction of the run is recorded with its x. ComfyUI then evaluates each model alone at the same x, and the
definition computes the expected blend of these predictions.
"""

import numpy as np

from chorus.tests.support.blend_definition import CFG
from chorus.tests.support.tiny_models import blend, ksample, predictions, recording


def check_mask(record, index, expected):
    """Compare the mask of one step with ``expected``, except where scores may tie."""
    assert expected.certain.mean() > 0.99
    shares = record.shares(index).double().numpy()
    error = np.abs(shares - expected.weights)[:, expected.certain]
    assert error.max() <= expected.weight_bound, f"{(error > expected.weight_bound).sum()} positions differ"


def check_step(record, index, call, expected):
    """Compare the mask and the blended prediction of one step with ``expected``, except where scores may tie."""
    check_mask(record, index, expected)
    error = np.abs(call.denoised.double().numpy() - expected.guided) / expected.bound
    assert error.swapaxes(0, 1)[:, expected.certain].max() <= 1.0


def run(models, prompts, samples, nodes, cfg=CFG, **sampling):
    """Sample with a chain of SaliencyNoiseBlend nodes. Returns record, calls, pairs.

    ``nodes``: the inputs of each node. ``pairs``: for each call, the predictions (cond, uncond) of every model alone.
    """
    model, trace = models[0], None
    for expert, (positive, negative), inputs in zip(models[1:], prompts[1:], nodes, strict=True):
        model, trace = blend(model, expert, positive, negative, **inputs)
    model, calls = recording(model)
    ksample(model, *prompts[0], samples, cfg=cfg, **sampling)
    alone = [predictions(m, p, n, calls) for m, (p, n) in zip(models, prompts, strict=True)]
    assert len(trace.record.steps) == len(calls)
    pairs = [[(a[i].cond, a[i].uncond) for a in alone] for i in range(len(calls))]
    return trace.record, calls, pairs
