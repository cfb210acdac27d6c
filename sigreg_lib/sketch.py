"""Random matrices behind the losses: sketches S and projection directions, fixed or redrawn.

A sketch S of shape (C, K) replaces the C channels of a batch by K random combinations. Directions
are the same thing with unit columns. Every draw comes from a generator that is passed in or seeded
here; the global random state is never read or changed.
"""

from __future__ import annotations

import itertools
import math
import weakref

import torch
from torch import Tensor

from sigreg_lib._names import suggest
from sigreg_lib._types import is_integer


def gaussian(
    n_channels: int,
    n_columns: int,
    *,
    generator: torch.Generator,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Gaussian sketch, entries independent N(0, 1/C), so that E[S'S] = I_K.

    Args:
        n_channels: C, number of channels.
        n_columns: K, number of columns.
        generator: source of the draw; drawn on its device.
        device: where the result lies; default the generator's.

    Returns:
        float32, shape (C, K).

    Source: Weak-SIGReg, arXiv 2603.05924.
    """
    shape = (n_channels, n_columns)
    draw = torch.empty(shape, device=generator.device, dtype=torch.float32)
    draw.normal_(0.0, 1.0 / math.sqrt(n_channels), generator=generator)
    return draw if device is None else draw.to(device)


def orthonormal(
    n_channels: int,
    n_columns: int,
    *,
    generator: torch.Generator,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Orthonormal sketch, uniform over all C x K matrices with S'S = I_K.

    Q = G L^{-T} with G Gaussian and L L' = G'G: invariance of G under rotations from the left makes
    Q uniform (Haar), whatever the factor on the right.

    Args, returns: as :func:`gaussian`.

    Raises:
        ValueError: more columns than channels.
    """
    if n_columns > n_channels:
        raise ValueError(
            f"an orthonormal sketch has at most as many columns as channels: "
            f"n_columns={n_columns}, n_channels={n_channels}"
        )
    draw = gaussian(n_channels, n_columns, generator=generator, device=device)
    if n_channels < 2 * n_columns:  # the Gram matrix of a nearly square G is ill-conditioned
        q, r = torch.linalg.qr(draw)
        return (q * torch.sign(torch.diagonal(r))).contiguous()
    factor = torch.linalg.cholesky_ex(draw.T @ draw).L  # _ex: no device sync for an error code
    return torch.linalg.solve_triangular(factor, draw.T, upper=False).T.contiguous()


def directions(
    n_channels: int,
    n_columns: int,
    *,
    generator: torch.Generator,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Unit columns, independent and uniform on the sphere of R^C (the slices of Strong).

    Args, returns: as :func:`gaussian`.

    Source: LeJEPA, arXiv 2511.08544.
    """
    draw = gaussian(n_channels, n_columns, generator=generator, device=device)
    return draw / torch.linalg.vector_norm(draw, dim=0, keepdim=True)


KINDS = {"gaussian": gaussian, "orthonormal": orthonormal, "directions": directions}

_SOURCES: weakref.WeakValueDictionary[int, MatrixSource] = weakref.WeakValueDictionary()
_KEYS = itertools.count()
_STREAM = (
    0x51672E65  # keeps our draws apart from data or weights drawn elsewhere from the same seed
)


class MatrixSource:
    """Gives a loss its random matrix, one for each number of channels, fixed or drawn anew.

    A fixed matrix of C channels depends on (seed, C) alone, whatever widths came before: it needs
    no place in a checkpoint and is the same in every process. A redrawn one is the next draw of the
    generator.

    Args:
        kind: ``"gaussian"``, ``"orthonormal"`` or ``"directions"``.
        n_columns: K; an orthonormal matrix has min(K, C) columns.
        resample: draw anew at every call.
        generator: source of the draws, on any device; default a private one seeded from ``seed``.
            For fixed matrices one draw is made here, which takes the place of ``seed``.
        seed: of the private generator, and of fixed matrices when no generator is given.
    """

    def __init__(
        self,
        kind: str,
        n_columns: int,
        *,
        resample: bool,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of sketch {kind!r}; {suggest(kind, KINDS)}")
        if not is_integer(n_columns) or n_columns < 1:
            raise ValueError(f"the number of columns must be a positive int, not {n_columns!r}")
        if generator is not None and not resample:
            # below 2^40, so that what is made of it below is still a seed
            seed = int(torch.randint(1 << 40, (), device=generator.device, generator=generator))
            generator = None
        self.kind, self.n_columns, self.resample, self.seed = kind, n_columns, resample, seed
        self.generator = generator
        self._fixed: dict[int, Tensor] = {}
        # of compiled draws, see _draw_matrix; on the CPU even where modules are built on "meta"
        self._calls = torch.zeros((), dtype=torch.int64, device="cpu")
        self._register()

    def _register(self) -> None:
        self.key = next(_KEYS)
        _SOURCES[self.key] = self

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._register()  # a copy draws for itself

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        state["_fixed"] = {}  # the seed gives them again
        if isinstance(self.generator, torch.Generator):  # generators themselves are not copied
            copy = torch.Generator(self.generator.device)
            copy.set_state(self.generator.get_state())
            state["generator"] = copy
        return state

    def columns(self, n_channels: int) -> int:
        """Number of columns of the matrix for ``n_channels`` channels."""
        return min(self.n_columns, n_channels) if self.kind == "orthonormal" else self.n_columns

    def draw(self, n_channels: int, device: torch.device) -> Tensor:
        """The matrix to use now, float32, shape (C, K), on ``device``."""
        if n_channels in self._fixed:
            matrix = self._fixed[n_channels] = self._fixed[n_channels].to(device)
            return matrix
        generator = self.generator
        if generator is None:
            seed = _STREAM + self.seed * 1_000_003
            generator = torch.Generator().manual_seed(seed + (0 if self.resample else n_channels))
            if self.resample:
                self.generator = generator
        make = KINDS[self.kind]
        # a matrix that is kept must be a plain tensor, whatever mode the first call came from
        with torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
            matrix = make(n_channels, self.columns(n_channels), generator=generator, device=device)
        if not self.resample:
            self._fixed[n_channels] = matrix
        return matrix

    def __call__(self, like: Tensor) -> Tensor:
        """The matrix for the channels (last dimension) and the device of ``like``."""
        n_channels = like.shape[-1]
        if not n_channels:
            raise ValueError(f"z has no channels: shape {tuple(like.shape)}")
        if torch.compiler.is_compiling():
            place = torch.empty(0, device=like.device)  # not ``like``, which vmap would split
            columns = self.columns(n_channels)
            return _draw_matrix(self._calls, place, self.key, n_channels, columns)
        return self.draw(n_channels, like.device)


# A generator object cannot enter a compiled graph; an opaque operator can. Changing ``calls`` keeps
# the compiler from taking draws in another order; the tags keep it from merging two draws into one,
# repeating one in the backward pass, or recording one in a CUDA graph.
@torch.library.custom_op(
    "sigreg_lib::draw_matrix",
    mutates_args=("calls",),
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def _draw_matrix(calls: Tensor, like: Tensor, key: int, n_channels: int, n_columns: int) -> Tensor:
    calls.add_(1)
    matrix = _SOURCES[key].draw(n_channels, like.device)
    return matrix if _SOURCES[key].resample else matrix.clone()  # the graph may reuse its memory


@_draw_matrix.register_fake
def _(calls: Tensor, like: Tensor, key: int, n_channels: int, n_columns: int) -> Tensor:
    return like.new_empty((n_channels, n_columns), dtype=torch.float32)
