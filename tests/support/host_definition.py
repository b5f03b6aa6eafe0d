"""A run of the node beside the definition.

Every prediction of a run is recorded with the x the sampler asked at. Each model is then asked alone, by the host, at
the same x, and the definition says which model paints where.
"""

import numpy as np

from chorus.tests.support.blend_definition import CFG
from chorus.tests.support.tiny_models import blend, ksample, predictions, recording


def check_step(record, index, call, expected):
    """Mask and blended prediction of one step; positions within a tie left out."""
    assert expected.certain.mean() > 0.99
    shares = record.shares(index).double().numpy()
    error = np.abs(shares - expected.weights)[:, expected.certain]
    assert error.max() <= expected.weight_bound, f"{(error > expected.weight_bound).sum()} positions differ"

    error = np.abs(call.denoised.double().numpy() - expected.guided) / expected.bound
    assert error.swapaxes(0, 1)[:, expected.certain].max() <= 1.0


def run(models, words, samples, nodes, cfg=CFG, **sampling):
    """Sample with the chain of ``nodes`` (inputs of one SaliencyNoiseBlend each) -> record, calls, answers by model."""
    model, trace = models[0], None
    for expert, (positive, negative), inputs in zip(models[1:], words[1:], nodes, strict=True):
        model, trace = blend(model, expert, positive, negative, **inputs)
    model, calls = recording(model)
    ksample(model, *words[0], samples, cfg=cfg, **sampling)
    answers = [predictions(m, p, n, calls) for m, (p, n) in zip(models, words, strict=True)]
    assert len(trace.record.steps) == len(calls)
    pairs = [[(a[i].cond, a[i].uncond) for a in answers] for i in range(len(calls))]
    return trace.record, calls, pairs
