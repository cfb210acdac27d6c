"""The arithmetic of the two losses, with gradients computed by hand where that is faster.

Each statistic is written twice: as a differentiable expression (used under ``torch.func``, for
second derivatives, for gradients of the random matrix, and for Weak inside ``torch.compile``), and
as an autograd function whose forward pass prepares the gradient. Tests hold both to float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from sigreg_lib.distributed import process_count, sample_count, sum_over_processes

_CHUNK = 1 << 13  # projections a thread handles at once: 8 complex powers of them fit a core's L2
_GATHERED_CHUNKS = 4  # of them at once when gathering, however many threads a process has


def without_autocast(device_type: str) -> AbstractContextManager:
    """Statistics are computed in full precision, inside autocast too."""
    if device_type in ("cpu", "cuda") and not torch.is_autocast_enabled(device_type):
        return nullcontext()  # entering the other takes longer than a small operation
    return torch.autocast(device_type, enabled=False)


def _is_transformed(*tensors: Tensor) -> bool:
    """Under torch.func, whose transforms these autograd functions do not serve."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


def _whole_count(local: int, at_least: int, device: torch.device, gather: bool) -> int:
    """N over all processes; where it is too small all of them raise, and none waits."""
    n = sample_count(local, device, gather)
    if process_count(gather) > 1 and n < at_least:
        raise ValueError(f"all processes together have {n} samples; needs {at_least}")
    return n


# ---------------------------------------------------------------- covariance (Weak)


def covariance_deviation(
    z: Tensor, sketch: Tensor | None, squared: bool, unbiased: bool, gather: bool
) -> Tensor:
    """||Cov(z S) - I||_F or its (unbiased) square; (..., N, C) -> (...)."""
    if sketch is not None and (sketch.requires_grad or sketch.ndim > 2):
        z, sketch = z @ sketch, None
    inputs = (z,) if sketch is None else (z, sketch)
    alone = process_count(gather) == 1
    if alone and (torch.compiler.is_compiling() or _is_transformed(*inputs)):
        return _covariance_expression(z, sketch, squared, unbiased)
    return _CovarianceDeviation.apply(z, sketch, squared, unbiased, gather)


def _covariance_expression(
    z: Tensor, sketch: Tensor | None, squared: bool, unbiased: bool
) -> Tensor:
    y = z if sketch is None else z @ sketch
    n, k = y.shape[-2:]
    centred = y - y.mean(-2, keepdim=True)
    covariance = centred.mT @ centred / (n - 1)
    if unbiased:
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        trace_of_square = covariance.square().sum((-2, -1))
        fourth = centred.square().sum(-1).square().sum(-1) / (n - 1)
        return _unbiased_square(n, k, trace, trace_of_square, fourth)
    deviation = covariance - torch.eye(k, dtype=y.dtype, device=y.device)
    if squared:
        return deviation.square().sum((-2, -1))
    return torch.linalg.vector_norm(deviation, dim=(-2, -1))  # its gradient at 0 is 0


def _unbiased_square(n: int, k: int, trace: Tensor, of_square: Tensor, fourth: Tensor) -> Tensor:
    scale = (n - 1) / (n * (n - 2) * (n - 3))
    population = scale * ((n - 1) * (n - 2) * of_square + trace.square() - n * fourth)
    return population - 2 * trace + k


class _CovarianceDeviation(torch.autograd.Function):
    """Value and gradient in the sketched space in the forward pass; one product in the backward."""

    @staticmethod
    def forward(ctx, z: Tensor, sketch: Tensor | None, squared: bool, unbiased: bool, gather: bool):
        ctx.options = squared, unbiased
        ctx.processes = process_count(gather)
        y = z if sketch is None else z @ sketch
        n = _whole_count(y.shape[-2], 4 if unbiased else 2, y.device, gather)
        k = y.shape[-1]
        if ctx.processes == 1:
            mean = y.mean(-2, keepdim=True)
        else:
            mean = sum_over_processes(y.sum(-2, keepdim=True), gather) / n
        centred = y - mean if sketch is None else y.sub_(mean)
        covariance = sum_over_processes(centred.mT @ centred, gather)
        covariance /= n - 1
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        if unbiased:
            radius = centred.square().sum(-1)
            trace = diagonal.sum(-1)
            fourth = sum_over_processes(radius.square().sum(-1), gather) / (n - 1)
            value = _unbiased_square(n, k, trace, covariance.square().sum((-2, -1)), fourth)
            # d value / d centred = centred @ product + centred * radius * cubic, then centred again
            a = 4 / (n * (n - 2) * (n - 3))
            product = covariance.mul_(a * (n - 1) * (n - 2))
            diagonal += (a * trace - 4 / (n - 1))[..., None]
            cubic = radius[..., None] * centred
            cubic -= sum_over_processes(cubic.sum(-2, keepdim=True), gather) / n
            gradient = (centred @ product).sub_(cubic, alpha=a * n)
        else:
            diagonal -= 1
            norm = torch.linalg.vector_norm(covariance, dim=(-2, -1))
            value = norm.square() if squared else norm
            # at a norm of exactly 0 covariance is 0 too: the subgradient 0 is taken
            scale = 4 / (n - 1) if squared else 2 / (n - 1) / norm.clamp_min(1e-30)[..., None, None]
            gradient = centred @ covariance.mul_(scale)
        ctx.save_for_backward(z, sketch, gradient if ctx.needs_input_grad[0] else None)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor):
        z, sketch, gradient = ctx.saved_tensors
        nothing = (None,) * 4
        if torch.is_grad_enabled():  # a derivative of this gradient is wanted
            _refuse_second_derivative(ctx.processes)

            def expression(x: Tensor) -> Tensor:
                return _covariance_expression(x, sketch, *ctx.options)

            return _derive(expression, z, grad), *nothing
        with without_autocast(z.device.type):  # backward may be called inside it
            gradient = gradient * (grad * ctx.processes)[..., None, None]
            return (gradient if sketch is None else gradient @ sketch.mT), *nothing


# ---------------------------------------------------------------- characteristic function (Strong)


def characteristic_deviation(
    z: Tensor, directions: Tensor, t_max: float, points: int, unbiased: bool, gather: bool
) -> Tensor:
    """Strong SIGReg of each batch; ``points`` are the positive grid points; (..., N, C) -> (...).

    The integrand is even in t and zero at t = 0, so the positive half of the grid carries all.
    """
    if directions.ndim > 2:  # a matrix for each batch: projected here, the rest is the same for all
        z = z @ directions
        directions = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    if process_count(gather) == 1:
        if torch.compiler.is_compiling():
            rows = _project(z, directions, t_max / points)
            values, _ = _row_deviation(rows, t_max, points, unbiased)
            return values.view(directions.shape[-1], -1).mean(0).view(z.shape[:-2])
        if _is_transformed(z, directions) or directions.requires_grad:
            return _characteristic_expression(z, directions, t_max, points, unbiased)
    return _CharacteristicDeviation.apply(z, directions, t_max, points, unbiased, gather)


class _Grid(NamedTuple):
    """The positive points of a grid, each (points, 1) so as to act on (points, rows).

    ``slope`` is i times what turns a deviation at t into its part of the gradient, 2 t weight.
    """

    t: Tensor
    gauss: Tensor
    minus_gauss: Tensor  # complex
    weight: Tensor  # of the trapezoid rule times exp(-t^2/2), doubled for the negative points
    slope: Tensor


_GRIDS: dict[tuple[float, int, torch.dtype], _Grid] = {}


def _grid(t_max: float, points: int, like: Tensor) -> _Grid:
    if like.device.type != "cpu" or type(like) is not Tensor:
        # made where it is used: a copy from the host would wait, and cannot be captured in a graph;
        # and a fake tensor wants fake constants
        return _make_grid(t_max, points, like.dtype, like.device)
    key = float(t_max), points, like.dtype
    if key not in _GRIDS:
        # what is kept must be plain tensors, whatever mode or transform the first call came from
        with torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
            _GRIDS[key] = _make_grid(*key, like.device)
    return _GRIDS[key]


def _make_grid(t_max: float, points: int, dtype: torch.dtype, device: torch.device) -> _Grid:
    j = torch.arange(1, points + 1, dtype=dtype, device=device)[:, None]
    t = j * (t_max / points)
    gauss = torch.exp(-t.square() / 2)
    weight = 2 * (t_max / points) * gauss * torch.where(j == points, 0.5, 1.0).to(dtype)
    nothing = torch.zeros_like(t)
    slope = torch.complex(nothing, 2 * t * weight)
    return _Grid(t, gauss, torch.complex(-gauss, nothing), weight, slope)


def _project(z: Tensor, directions: Tensor, dt: float) -> Tensor:
    """Angles dt a.z, one row a direction and batch: (..., N, C) -> (K * batches, N).

    Sums over samples then run along memory.
    """
    flat = z.reshape(-1, z.shape[-1])
    angles = torch.addmm(z.new_zeros(()), directions.T, flat.T, beta=0, alpha=dt)
    # no -1: among several processes one may have no samples
    return angles.view(directions.shape[-1] * math.prod(z.shape[:-2]), z.shape[-2])


def _characteristic_expression(
    z: Tensor, directions: Tensor, t_max: float, points: int, unbiased: bool
) -> Tensor:
    n = z.shape[-2]
    grid = _grid(t_max, points, z)
    t, gauss, weight = (each.squeeze(-1) for each in (grid.t, grid.gauss, grid.weight))
    angle = (z @ directions)[..., None] * t
    real, imag = torch.cos(angle).mean(-3), torch.sin(angle).mean(-3)  # (..., K, points)
    square = (real - gauss).square() + imag.square()
    if unbiased:
        square = square - (1 - real.square() - imag.square()) / (n - 1)
    return n * (square * weight).sum(-1).mean(-1)


def _rows_with_gradient(
    rows: Tensor, t_max: float, points: int, unbiased: bool, gather: bool, with_gradient: bool
) -> Tensor:
    """The deviation of each row's sample from the Gaussian; rows (R, N) of angles -> (R,).

    Overwrites the angles with the gradient in the projection a.z if asked for. Works on a few rows
    at a time: with w = exp(i dt a.z) every grid point is a power of w, powers come by doubling, and
    for m_j = mean_n w^j - g_j the gradient is sum_j 2 W_j t_j Re(i conj(m_j) w^j). Memory O(R N).
    """
    n = _whole_count(rows.shape[-1], 2, rows.device, gather)
    grid = _grid(t_max, points, rows)
    size = len(rows)
    if rows.device.type == "cpu":
        # the same in every process, as the shapes of the sums must be
        processes = process_count(gather)
        at_once = torch.get_num_threads() if processes == 1 else _GATHERED_CHUNKS
        size = max(1, min(size, _CHUNK * at_once // max(1, n // processes)))
    values = []
    for angle in rows.split(size) if size < len(rows) else (rows,):
        powers = _powers(angle, points)  # (points, rows, N)
        phi = powers.sum(-1)
        if process_count(gather) > 1:
            phi = torch.view_as_complex(sum_over_processes(torch.view_as_real(phi), gather))
        slope = torch.add(grid.minus_gauss, phi, alpha=1 / n)
        square = torch.view_as_real(slope).square()  # (points, rows, 2)
        value = (square.view(points, -1).T @ (n * grid.weight)).view(-1, 2).sum(-1)
        if unbiased:
            phi /= n
            variance = 1 - torch.view_as_real(phi).square().sum(-1)
            value -= (variance * grid.weight).sum(0) * (n / (n - 1))
            slope += phi / (n - 1)
        values.append(value)
        if with_gradient:  # the angles are not needed any more
            # physical: a compiled graph calls this operator where a lazy conjugation is not seen
            factor = slope.conj_physical_().mul_(grid.slope)[..., None]
            torch.sum(powers.mul_(factor).real, 0, out=angle)
    return values[0] if len(values) == 1 else torch.cat(values)


# One opaque operator in a compiled graph: the compiler's own code for the sums over all grid points
# repeats the recurrence for each of them and takes minutes to compile.
@torch.library.custom_op("sigreg_lib::row_deviation", mutates_args=())
def _row_deviation(
    rows: Tensor, t_max: float, points: int, unbiased: bool
) -> tuple[Tensor, Tensor]:
    gradient = rows.contiguous().clone()
    values = _rows_with_gradient(gradient, t_max, points, unbiased, False, True)
    return values, gradient.mul_(points / t_max)  # in the angle, not the projection


@_row_deviation.register_fake
def _(rows: Tensor, t_max: float, points: int, unbiased: bool) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[0]), rows.new_empty(rows.shape)


def _row_deviation_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _row_deviation_backward(ctx, grad: Tensor, _):
    (gradient,) = ctx.saved_tensors
    return grad[:, None] * gradient, None, None, None


_row_deviation.register_autograd(_row_deviation_backward, setup_context=_row_deviation_context)


class _CharacteristicDeviation(torch.autograd.Function):
    """Projection, value and gradient in the forward pass."""

    @staticmethod
    def forward(ctx, z, directions, t_max, points, unbiased, gather) -> Tensor:
        rows = _project(z, directions, t_max / points)
        with_gradient = any(ctx.needs_input_grad[:2])
        values = _rows_with_gradient(rows, t_max, points, unbiased, gather, with_gradient)
        ctx.save_for_backward(z, directions, rows if with_gradient else None)
        ctx.options = t_max, points, unbiased
        ctx.processes = process_count(gather)
        return values.view(directions.shape[-1], -1).mean(0).view(z.shape[:-2])

    @staticmethod
    def backward(ctx, grad: Tensor):
        z, directions, gradient = ctx.saved_tensors
        nothing = (None,) * 4
        if gradient is None:
            return None, None, *nothing
        if torch.is_grad_enabled():  # a derivative of this gradient is wanted
            _refuse_second_derivative(ctx.processes)

            def expression(x: Tensor) -> Tensor:
                return _characteristic_expression(x, directions, *ctx.options)

            # directions have no gradient here: alone, those that want one take the expression
            return _derive(expression, z, grad), None, *nothing
        k, n = directions.shape[-1], z.shape[-2]
        scale = grad.reshape(1, -1, 1) * (ctx.processes / k)
        # (K, samples of all batches)
        rows = (gradient.view(k, grad.numel(), n) * scale).view(k, grad.numel() * n)
        in_z, in_directions, *_ = ctx.needs_input_grad
        with without_autocast(z.device.type):  # backward may be called inside it
            return (
                (rows.T @ directions.T).view(z.shape) if in_z else None,
                (rows @ z.reshape(-1, z.shape[-1])).T if in_directions else None,
                *nothing,
            )


def _powers(angle: Tensor, points: int) -> Tensor:
    """exp(i j angle) for j = 1..points; (R, N) -> (points, R, N) complex."""
    complex_dtype = torch.complex128 if angle.dtype == torch.float64 else torch.complex64
    powers = angle.new_empty((points, *angle.shape), dtype=complex_dtype)
    torch.polar(torch.ones_like(angle), angle, out=powers[0])
    done = 1
    while done < points:
        more = min(done, points - done)
        torch.mul(powers[:more], powers[done - 1], out=powers[done : done + more])
        done += more
    return powers


def _derive(expression: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the expression, itself differentiable in x and grad."""
    with without_autocast(x.device.type):
        return torch.autograd.grad(expression(x), x, grad, create_graph=True)[0]


def _refuse_second_derivative(processes: int) -> None:
    if processes > 1:
        raise NotImplementedError("second derivatives of a loss gathered over processes")
