"""Shapes and samples as text for messages."""

from collections.abc import Iterable, Sequence

from torch import Tensor


def size_of(x: Tensor | Sequence[int]) -> str:
    """The shape of ``x``, or the shape ``x``, as text: 1x4x64x64."""
    return "x".join(map(str, x.shape if isinstance(x, Tensor) else x))


def pixels(size: Sequence[int]) -> str:
    """A size (height, width) as text, in the order width x height."""
    return f"{size[1]}x{size[0]}"


def named_samples(samples: Iterable[int]) -> str:
    """The numbers of ``samples``, counted from 1, for a report: "sample 2", "samples 1 and 3"."""
    numbers = [str(sample + 1) for sample in sorted(samples)]
    if len(numbers) == 1:
        return f"sample {numbers[0]}"
    return f"samples {', '.join(numbers[:-1])} and {numbers[-1]}"
