"""A blend of two models with a forced region, written with ComfyUI's own guider and wrappers, independently of the pack.

The reference is the base MODEL with wrappers that put the expert's predictions into the region. The expert samples in a
separate run with a separate guider. This run lasts as long as that of the base, and predicts at the base's x and sigma.
Everything that a node adds to the expert's MODEL therefore acts as in a run of the expert alone.
"""

import queue
import threading

import comfy.nested_tensor
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from chorus.tests.families.family_cells import conversion
from chorus.tests.support.tiny_models import in_inference_mode, recording

KEY = "reference"


class Alone:
    """A run of ``model`` alone in a separate thread. It waits for jobs, and each job makes one prediction."""

    def __init__(self, model, prompts, shapes, sigmas):
        self.jobs, self.results = queue.Queue(), queue.Queue()
        self.model, self.calls = recording(model)
        self.guider = comfy.samplers.CFGGuider(self.model)
        self.guider.set_conds(*prompts)
        self.shapes, self.sigmas = shapes, sigmas
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    @in_inference_mode
    def _run(self):
        zeros = [torch.zeros(shape) for shape in self.shapes]
        zeros = zeros[0] if len(zeros) == 1 else comfy.nested_tensor.NestedTensor(zeros)
        sampler = comfy.samplers.KSAMPLER(self._run_jobs)
        try:
            self.guider.sample(zeros, zeros, sampler, self.sigmas, disable_pbar=True, seed=0)
        except Exception as error:
            self.results.put(error)

    def _run_jobs(self, network, noise, sigmas, extra_args, callback, disable):
        while (job := self.jobs.get()) is not None:
            self.results.put(job(network, extra_args["model_options"]))
        return noise

    def _run_job(self, job):
        self.jobs.put(job)
        found = self.results.get()
        if isinstance(found, Exception):
            raise found
        return found

    def raw(self, x, sigma):
        """(c, u): predictions without guidance."""
        conds = ("positive", "negative")
        return self._run_job(
            lambda network, options: comfy.samplers.calc_cond_batch(
                self.guider.inner_model, [self.guider.conds[name] for name in conds], x, sigma, options
            )
        )

    def guided(self, x, sigma, cfg):
        """Predictions (c', u) such that u + cfg (c' - u) is the model's guided x0 at ``cfg``."""

        def job(network, options):
            self.guider.set_cfg(cfg)
            self.calls.clear()
            return network.inner_model(x, sigma, model_options=options, seed=0)

        x0 = self._run_job(job)
        # no call was recorded if a cache node on the model has skipped the prediction
        uncond = self.calls[-1].uncond if self.calls else self.raw(x, sigma)[1]
        return uncond + (x0 - uncond) / cfg, uncond

    def close(self):
        self.jobs.put(None)
        self.thread.join()


class Reference:
    """Wrappers of the base. ``region``: booleans [1, h, w], true where the expert generates.

    ``shapes``: those of the parts of the latent. The expert generates only in the first.
    """

    def __init__(self, expert, prompts, region, shapes):
        self.expert, self.prompts, self.region, self.shapes = expert, prompts, region, shapes

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, *args):
        self.guider, self.x = guider, None
        self.convert = conversion(guider.model_patcher, self.expert)
        theirs = torch.cat([self.convert(noise[:1], sigma.reshape(1))[1] for sigma in sigmas])
        shapes = self.shapes if len(self.shapes) > 1 else [noise.shape]
        self.alone = Alone(self.expert, self.prompts, shapes, theirs)
        try:
            return executor(guider, sigmas, extra_args, callback, noise, *args)
        finally:
            self.alone.close()

    def calc_cond_batch(self, executor, model, conds, x, sigma, options):
        out = executor(model, conds, x, sigma, options)
        sides = [self.guider.conds["positive"], self.guider.conds["negative"]]
        wanted = [next((n for n, side in enumerate(sides) if cond is side), None) for cond in conds]
        if x is self.x:  # a second call at the same x, made by a node
            found = self.pair
        elif 0 in wanted:
            found = self.pair = self.alone.guided(*self.convert(x, sigma), self.guider.cfg)
            self.x = x
        else:
            found = self.alone.raw(*self.convert(x, sigma))
        return [o if n is None else self._mixed(found[n], o) for o, n in zip(out, wanted, strict=True)]

    def _mixed(self, experts, base):
        if len(self.shapes) == 1:
            return torch.where(self.region, experts, base)
        (first, *_), (ours, *others) = (comfy.utils.unpack_latents(x, self.shapes) for x in (experts, base))
        return comfy.utils.pack_latents([torch.where(self.region, first, ours), *others])[0]


@in_inference_mode
def reference(base, expert, prompts, region, shapes):
    """``base`` with the expert in ``region`` of the first part of a latent. ``shapes``: those of its parts."""
    out, wrappers = base.clone(), Reference(expert, prompts, region, shapes)
    out.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, wrappers.sampler_sample)
    out.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, wrappers.calc_cond_batch)
    return out
