"""The losses straight from their formulas: slow, plain, one batch of shape (N, C) a call.

What the package computes is held to these, in float64; the speed of :func:`weak` and :func:`strong`
is the benchmark's baseline. All work in the dtype of z.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weak(z: Tensor, sketch: Tensor | None = None, *, squared: bool = False) -> Tensor:
    """|| Cov(Z S) - I ||_F, or its square (arXiv 2603.05924)."""
    y = z if sketch is None else z @ sketch
    y = y - y.mean(0)
    covariance = y.T @ y / (y.shape[0] - 1)
    norm = torch.linalg.norm(covariance - torch.eye(y.shape[1], dtype=y.dtype, device=y.device))
    return norm**2 if squared else norm


def weak_unbiased(z: Tensor, sketch: Tensor | None = None) -> Tensor:
    """Unbiased || Cov - I ||_F^2 as a mean over all quadruples of different samples; O(N^4).

    tr(Cov^2) = E[((y_1 - y_2).(y_3 - y_4))^2] / 4 and tr(Cov) = E|y_1 - y_2|^2 / 2.
    """
    y = z if sketch is None else z @ sketch
    n, k = y.shape
    difference = y[:, None] - y[None, :]
    product = torch.einsum("ijc,klc->ijkl", difference, difference)
    index = torch.cartesian_prod(*[torch.arange(n, device=y.device)] * 4)
    ordered = index.sort(dim=1).values
    a, b, c, d = index[(ordered[:, 1:] != ordered[:, :-1]).all(1)].T
    trace_of_square = product[a, b, c, d].square().mean() / 4
    trace = difference.square().sum() / (n * (n - 1)) / 2
    return trace_of_square - 2 * trace + k


def strong(z: Tensor, directions: Tensor, *, t_max: float = 5.0, n_points: int = 17) -> Tensor:
    """Weighted squared distance of the characteristic functions (arXiv 2511.08544)."""
    t = torch.linspace(-t_max, t_max, n_points, dtype=z.dtype, device=z.device)
    gauss = torch.exp(-(t**2) / 2)
    angles = (z @ directions)[..., None] * t  # (N, K, points)
    phi = torch.exp(1j * angles).mean(0)
    integrand = (phi - gauss).abs().square() * gauss
    return z.shape[0] * torch.trapezoid(integrand, t).mean()


def strong_unbiased(
    z: Tensor, directions: Tensor, *, t_max: float = 5.0, n_points: int = 17
) -> Tensor:
    """As :func:`strong`, |phi|^2 = E cos t(x_1 - x_2) being a mean over pairs of samples."""
    n = z.shape[0]
    t = torch.linspace(-t_max, t_max, n_points, dtype=z.dtype, device=z.device)
    gauss = torch.exp(-(t**2) / 2)
    x = z @ directions
    gaps = (x[:, None] - x[None, :])[~torch.eye(n, dtype=torch.bool, device=z.device)]
    modulus = torch.cos(gaps[..., None] * t).mean(0)
    real = torch.cos(x[..., None] * t).mean(0)
    integrand = (modulus - 2 * real * gauss + gauss**2) * gauss
    return n * torch.trapezoid(integrand, t).mean()
