"""Training of the demo denoisers: v-prediction, plain MSE, EMA, resumable, weights exported at every checkpoint.

The general checkpoint learns the UNet and the text encoder together; an expert starts from the general's averaged
weights and learns the UNet only, so that all checkpoints share one text encoder.
"""

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import comfy.latent_formats  # noqa: F401  (after comfy's arguments were set by the recipes' __main__)
import torch
from torch import nn
from tqdm import tqdm

from .. import weights
from ..canvas import Canvases
from ..data_source import ROOT
from ..latent import CHANNELS, PATCH, PatchPCA
from ..text import TextModel, token_rows
from ..unet import initialise, make_unet
from .device import DEVICE, autocast, to_device

STATES = ROOT / ".cache" / "train"
DROP = 0.1  # share of captions replaced by the empty one, for guidance


@dataclass(frozen=True)
class Plan:
    name: str
    style: str
    domain: str | None
    steps: int
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 200
    decay: float = 0.999
    seed: int = 1
    one: float = 0.5
    start: str | None = None  # the checkpoint whose weights this one starts from; its text encoder stays frozen
    balanced: bool = False


class Student(nn.Module):
    """text + UNet: the loss of a batch."""

    def __init__(self, train_text):
        super().__init__()
        self.unet, self.text = make_unet(), TextModel()
        self.train_text = train_text
        self.text.requires_grad_(train_text)
        alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
        self.register_buffer("alphas", alphas.float(), persistent=False)  # the host's discrete schedule (SD's)

    def forward(self, latents, tokens, t, noise):
        """latents and noise [B, 12, 16, 16], tokens [B, 20], t [B] -> mean squared error of v."""
        a = self.alphas[t].sqrt().view(-1, 1, 1, 1)
        b = (1 - self.alphas[t]).sqrt().view(-1, 1, 1, 1)
        with autocast(), torch.set_grad_enabled(self.train_text):
            states, _, pooled, _ = self.text(tokens)
        with autocast():
            v = self.unet(a * latents + b * noise, t, context=states, y=pooled)
        return (v.float() - (a * noise - b * latents)).square().mean()


class Data:
    """Batch k holds canvases k * batch ... (k + 1) * batch - 1 of the plan's data set, encoded by the PCA.

    With several workers each makes its part of the batch; the numbers are the same for any number of them.
    """

    def __init__(self, plan, pca, worker=0, workers=1):
        self.plan, self.pca = plan, pca
        self.canvases = Canvases(plan.style, seed=plan.seed, domain=plan.domain, one=plan.one, balanced=plan.balanced)
        part = plan.batch // workers
        self.part = slice(worker * part, (worker + 1) * part)

    def batch(self, k):
        """latents, tokens, t, noise"""
        start, stop = self.part.start, self.part.stop
        images, captions, _ = self.canvases.batch(k * self.plan.batch + start, stop - start)
        x = torch.from_numpy(images).movedim(3, 1).float() / 127.5 - 1
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + k)
        count = self.plan.batch
        drop = (torch.rand(count, generator=generator) < DROP)[self.part]
        captions = ["" if d else c for d, c in zip(drop.tolist(), captions)]
        # most of the time where a picture is decided (sigma about 0.3 to 2), the rest anywhere
        t = (
            torch.where(
                torch.rand(count, generator=generator) < 0.3,
                torch.rand(count, generator=generator) * 1000,
                380 + 200 * torch.randn(count, generator=generator),
            )
            .long()
            .clamp(0, 999)
        )
        noise = torch.randn(count, *self.pca_shape(x), generator=generator)
        return self.pca.encode(x), token_rows(captions), t[self.part], noise[self.part]

    def pca_shape(self, x):
        return CHANNELS, x.shape[2] // PATCH, x.shape[3] // PATCH


def rate(plan, step, progress):
    """Warm-up, then a cosine to 2 % at progress 1."""
    return plan.lr * min((step + 1) / plan.warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(plan, minutes=None, workers=1, save_minutes=5.0):
    """Runs or resumes a plan. minutes: end after that time instead of after plan.steps."""
    if workers > 1 and DEVICE.type != "cpu":
        raise ValueError(f"{workers} workers share a CPU, and this machine has a GPU; leave --workers out")
    if workers == 1:
        return work(0, plan, minutes, 1, save_minutes)
    STATES.mkdir(parents=True, exist_ok=True)
    (STATES / "meeting").unlink(missing_ok=True)
    fork = torch.multiprocessing.get_context("fork")
    team = [fork.Process(target=work, args=(n, plan, minutes, workers, save_minutes)) for n in range(workers)]
    for process in team:
        process.start()
    for process in team:
        process.join()
    if any(process.exitcode for process in team):
        raise RuntimeError(
            f"{plan.name}: a worker failed, see above; run the recipe again to go on from the last checkpoint."
        )


def work(worker, plan, minutes, workers, save_minutes):
    """One of the workers: each takes its part of every batch on one thread, and they meet once per step."""
    if workers > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{STATES / 'meeting'}", rank=worker, world_size=workers
        )
    torch.manual_seed(plan.seed)
    pca = PatchPCA()
    pca.load_state_dict(weights.load("pca"))
    student = Student(train_text=plan.start is None)
    data = Data(plan, pca, worker, workers)
    begin(student, plan)
    student.to(DEVICE)
    params = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=plan.lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = {k: v.detach().clone() for k, v in student.state_dict().items()}
    step, spent, log = 0, 0.0, []
    file = STATES / f"{plan.name}.pt"
    if file.exists():
        state = torch.load(file, weights_only=True, map_location=DEVICE)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, spent, log = state["average"], state["step"], state["spent"], state["log"]
    elif worker == 0:
        export(plan, average, step, spent, log)
    started, saved, mean = time.time(), time.time(), None
    # a resumed run goes on with the rate where it was
    before = 0.0 if not minutes else spent / (spent + minutes * 60)
    bar = tqdm(total=plan.steps, initial=step, desc=plan.name, mininterval=10, disable=worker > 0)
    progress = 0.0
    pool = ThreadPoolExecutor(1)  # draws the next batch while this one is learned
    batch = pool.submit(data.batch, step)
    while step < plan.steps and progress < 1:
        now, batch = to_device(*batch.result()), pool.submit(data.batch, step + 1)
        loss = student(*now)
        loss.backward()
        progress = before + (1 - before) * (time.time() - started) / (minutes * 60) if minutes else step / plan.steps
        value, progress = meet(params, workers, loss.item(), progress)
        for group in optimizer.param_groups:
            group["lr"] = rate(plan, step, progress)
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        decay = min(plan.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            current = student.state_dict()
            torch._foreach_lerp_([average[k] for k in current], [current[k] for k in current], 1 - decay)
        mean = value if mean is None else 0.98 * mean + 0.02 * value
        bar.update()
        bar.set_postfix(loss=f"{mean:.4f}", lr=f"{group['lr']:.1e}", refresh=False)
        if step % 50 == 0:
            log.append([step, round(mean, 5)])
        if worker == 0 and (time.time() - saved > save_minutes * 60 or step == plan.steps or progress >= 1):
            spent += time.time() - saved
            saved = time.time()
            keep(
                file,
                student=student.state_dict(),
                optimizer=optimizer.state_dict(),
                average=average,
                step=step,
                spent=spent,
                log=log,
            )
            export(plan, average, step, spent, log)
    pool.shutdown(cancel_futures=True)
    bar.close()


def meet(params, workers, *values):
    """Averages gradients and values over the workers."""
    if workers == 1:
        return values
    flat = torch.cat([*(p.grad.flatten() for p in params), torch.tensor(values)])
    torch.distributed.all_reduce(flat)
    flat /= workers
    for p, part in zip(params, flat.split([p.numel() for p in params] + [len(values)])):
        p.grad.copy_(part.view_as(p))
    return flat[-len(values) :].tolist()


def begin(student, plan):
    if plan.start is None:
        generator = torch.Generator().manual_seed(plan.seed)
        initialise(student.unet, generator)
        return
    student.unet.load_state_dict(weights.load(plan.start))
    student.text.load_state_dict(weights.load("text"))


def export(plan, average, step, spent, log):
    """The averaged weights, as demo/weights/<name>.safetensors, at any time."""
    facts = {
        "steps": step,
        "canvases": step * plan.batch,
        "seconds": round(spent),
        "style": plan.style,
        "domain": plan.domain or "all",
        "loss": log[-1][1] if log else "",
        "prediction": "v",
        "seed": plan.seed,
        "start": plan.start or "",
        "license": "Apache-2.0" if plan.style == "noto" else "CC-BY-4.0",
    }
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in average.items() if k.startswith(prefix)}  # noqa: E731
    weights.save(plan.name, part("unet."), **facts)
    if plan.start is None:
        weights.save("text", part("text."), **facts)


def keep(file, **state):
    STATES.mkdir(parents=True, exist_ok=True)
    torch.save(state, file.with_suffix(".part"))
    os.replace(file.with_suffix(".part"), file)
    file.with_suffix(".json").write_text(
        json.dumps({"step": state["step"], "seconds": round(state["spent"]), "loss": state["log"]}) + "\n"
    )
