"""The expert: animals in Twemoji style, all equally often, starting from the general checkpoint.

The committed weights are 1,772 of the 2,000 steps (19 minutes by --minutes on two busy cores).
"""

from .diffusion import Plan, train

PLAN = Plan(
    "expert-animals",
    style="twemoji",
    domain="animal",
    steps=2000,
    lr=8e-4,
    warmup=100,
    seed=2,
    start="general",
    balanced=True,
    decay=0.998,
)


def main(minutes=None, workers=1):
    train(PLAN, minutes, workers)
