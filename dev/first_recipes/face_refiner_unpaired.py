"""The face refiner without pairs, for dev/benchmarks/face_refiner_quality.py; see face_refiner.py."""

from .face_refiner import UNPAIRED, train


def main(minutes=None):
    train(UNPAIRED, minutes)
