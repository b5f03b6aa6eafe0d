"""The optimizer Muon with its Newton-Schulz iteration in float32.

torch.optim.Muon iterates in bfloat16, which takes seconds per step on a processor without native bfloat16.
"""

import torch


class Muon(torch.optim.Optimizer):
    """Muon for matrices: the update is the momentum, orthogonalised by a Newton-Schulz iteration.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. The update is scaled to the root mean square of
    AdamW's updates, 0.2 (Moonlight, arXiv 2502.16982, equation 4).
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.01, iterations=3):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=iterations))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(momentum, group["momentum"]), group["iterations"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonalise(matrix, iterations):
    """An approximation of U Vᵀ, for ``matrix`` [R, C] with the singular value decomposition U S Vᵀ."""
    a, b, c = Muon.COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
