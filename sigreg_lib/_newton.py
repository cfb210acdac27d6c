"""Newton's iteration for the inverse square root, for a function of a batch and for a layer."""

from __future__ import annotations

import torch
from torch import Tensor


def newton_inverse_root(covariance: Tensor, iterations: int, eps: float) -> Tensor:
    r"""Approximates (Sigma + eps I)^{-1/2}, (..., C, C) to the same.

    .. math:: \Sigma_N = \Sigma/\mathrm{tr}\,\Sigma, \quad P_0 = I, \quad
              P_{k+1} = \tfrac12 (3 P_k - P_k^3 \Sigma_N), \quad P_T / \sqrt{\mathrm{tr}\,\Sigma}

    with eps I in Sigma. A matrix of zeros, with eps = 0, gives a finite one. Source: Huang et al.,
    arXiv 1904.03441, algorithm 1, in the coupled form.
    """
    shape = covariance.shape
    sigma = covariance.reshape(-1, *shape[-2:])
    identity = torch.eye(shape[-1], dtype=sigma.dtype, device=sigma.device)
    sigma = sigma + eps * identity
    trace = sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    trace = torch.where(trace > 0, trace, 1)  # a collapsed batch stays 0
    # Q = Sigma_N P is carried along: P^3 Sigma_N = P Q P, but products of P alone let rounding
    # errors grow at every step, to any size once eigenvalues differ by more than a few times
    root, product = identity.expand_as(sigma), sigma / trace
    for k in range(iterations):
        if k == 0:  # a product with P_0 = I
            root = step = 1.5 * identity - 0.5 * product
        else:
            step = torch.baddbmm(1.5 * identity, root, product, alpha=-0.5)
            root = step @ root
        if k < iterations - 1:
            product = product @ step
    return (root * trace.rsqrt()).view(shape)
