"""The functions of the shipped code that may wait for a GPU. The tests in tests/fake_gpu/ allow no other.

Each entry maps "file:function" to the data that the function reads from the GPU. The functions in STEPS may wait in
every step of a loop. Those in RUNS may wait only at the start or the end of a run, or at chosen steps of a training.
"""

from collections import Counter

STEPS = {
    # sampling
    "techniques/saliency_blend/comfy_prediction.py:predict": "the noise level, which samplers pass only as a tensor: one"
    " read for each prediction. The copies of all other values of the step are complete by then",
    "techniques/cas_dm/comfy_hook.py:__call__": "the noise level, as in the blend; if the model has a blend,"
    " the blend has already waited",
    # a step of a search is a whole sampling run of a batch; the scores of its images decide which candidates survive
    "techniques/seed_select/search.py:_scores": "the scores of a batch of images",
    "techniques/seed_select/search.py:_run_round": "the latents of a batch of images, for the grid",
    "techniques/seed_select/noise_patches.py:_results": "the latents and scores of a batch of images, for the map",
    # a step of an optimisation is a sampling run with its gradients; the score decides whether another step follows
    "techniques/seed_select/optimize.py:_evaluate": "the score of an image, its noise and its latent, for the report",
    "techniques/seed_select/optimize.py:_backward": "whether the gradient of a whole run is finite",
    "techniques/seed_select/prior.py:onto_shell": "the norm of the noise, in float64 on the CPU",
    # training
    "training/finite.py:read_if_finite": "before the weights change: the loss, which is shown after each step, and"
    " whether the loss and its gradients are finite. After the change: whether the weights are finite",
    "techniques/masked_tokens/training.py:_encode": "the tokens of a training image, computed once per crop",
}

RUNS = {
    "common/host_copy.py:tolist": "values whose copy began in an earlier step, or after the last step",
    "common/host_copy.py:tensor": "values whose copy began in an earlier step, or after the last step",
    "common/finite.py:flush": "values whose copy began in an earlier step, or after the last step",
    # saliency_blend
    "techniques/saliency_blend/experts.py:is_off": "whether a region is empty",
    "techniques/saliency_blend/experts.py:begin": "whether a region is empty, and the box around it",
    "techniques/saliency_blend/regions.py:log_region": "whether a region is finite, and whether it has an effect",
    "techniques/saliency_blend/regions.py:box": "the box around a region",
    "techniques/saliency_blend/blend.py:finish": "the regions, for the record of the run",
    "techniques/saliency_blend/trace.py:on_cpu": "the masks of all steps, for the record of the run",
    "techniques/saliency_blend/comfy_hook.py:_sampler_sample": "the schedule",
    "techniques/saliency_blend/comfy_hook.py:_outer_sample": "the finished latent, for the record of the run",
    "techniques/saliency_blend/comfy_expert_run.py:sort_key": "the order of the experts in a batch with the base",
    "host/parametrization.py:percent_to_sigma": "the noise process of a model",
    "host/parametrization.py:__init__": "the range of an expert's noise levels",
    # cas_dm
    "techniques/cas_dm/non_finite.py:__init__": "the last noise level of the schedule",
    # seed_select
    "techniques/seed_select/losses.py:check_references": "whether the references are images",
    "techniques/seed_select/losses.py:embedding_centroid": "whether the references have a mean embedding",
    "techniques/seed_select/losses.py:latent_centroid": "whether the references' latents are finite",
    "techniques/seed_select/inversion.py:_check_sigmas": "the schedule",
    "techniques/seed_select/prior.py:check_noise": "whether a noise is finite",
    "techniques/seed_select/path.py:_in_their_span": "the seeds of a path, which is found on the CPU",
    # face_refiner: one forward pass of a small network, then one paste for each face
    "techniques/face_refiner/refine.py:_changes": "the report of all faces, in one read",
    "techniques/face_refiner/identity.py:limit_identity_change": "the distances of all faces before and after the search",
    "techniques/face_refiner/paste.py:ramp": "the edge of a mask, found by scipy on the CPU",
    "techniques/face_refiner/boxes.py:_areas": "the areas of a mask, found by scipy on the CPU",
    # trainings: evaluations, previews and results, only at chosen steps
    "training/loop.py:evaluate": "the best checkpoint, kept on the CPU",
    "techniques/cas_dm/training.py:_validation_predictions": "θ's predictions, kept on the CPU",
    "techniques/cas_dm/training.py:_predictions": "θ's predictions, kept on the CPU",
    "techniques/cas_dm/training.py:_measure": "an evaluation",
    "techniques/cas_dm/training.py:_scores": "an evaluation",
    "techniques/cas_dm/training.py:examples": "a preview",
    "techniques/cas_dm/training.py:head": "the trained weights",
    "techniques/face_refiner/training/paired.py:_measure": "an evaluation",
    "techniques/face_refiner/training/unpaired.py:_set_features": "an evaluation",
    "techniques/face_refiner/training/base.py:examples": "a preview",
    "techniques/face_refiner/training/base.py:weights": "the trained weights",
    "techniques/masked_tokens/training.py:fixed_loss": "an evaluation",
    "techniques/masked_tokens/lora.py:weights": "the trained weights",
    # masked_tokens
    "techniques/masked_tokens/decode.py:_known_and_free": "the known tokens and the mask, which are counted on the CPU",
    "techniques/masked_tokens/decode.py:_check_ids": "the known tokens, which are checked on the CPU",
}


def unlisted_step_waits(short: Counter[str], long: Counter[str]) -> dict[str, int]:
    """The additional waits of a longer run, by place, except at the places in STEPS.

    ``short`` and ``long``: the waits by place of two runs, the second of which has more steps.
    """
    return {place: count - short[place] for place, count in long.items() if count > short[place] and place not in STEPS}
