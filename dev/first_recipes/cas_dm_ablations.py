"""The heads that the shipped one is compared with, into .cache/train: without metric, and of the unguided model."""

from .cas_dm import ABLATIONS, train


def main(minutes=None, workers=1):
    for plan in ABLATIONS.values():
        train(plan, minutes, workers)
