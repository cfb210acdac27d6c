"""Tap layers of any model with a regularizer: ``attach(model, "blocks.*", WeakSIGReg())``."""

from __future__ import annotations

import fnmatch
import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sigreg_lib._dtype import at_least_float32
from sigreg_lib._names import suggest
from sigreg_lib.distributed import process_count
from sigreg_lib.pooling import POOLS, Layout, pool_features, refuse_batch_second

Matrices = dict[int | str, Tensor | None]
"""Random matrices of a step, by width, or by name of layer; None: no sketch."""


def attach(
    model: nn.Module,
    layers: str | nn.Module | Sequence[str | nn.Module],
    regularizer: nn.Module | Callable[[Tensor], Tensor] | None,
    *,
    on: str = "output",
    pool: str | Callable[[Tensor], Tensor] = "mean",
    channels: str = "auto",
    weights: Sequence[float] | None = None,
    columns: Sequence[int] | None = None,
    shared_sketch: bool = False,
) -> Handle:
    """Record what layers of a model compute and regularize it.

    Args:
        model: any module; nothing is left in it after :meth:`Handle.remove`.
        layers: which submodules: names with shell wildcards (``"blocks.*"`` matches
            ``blocks.0`` but not ``blocks.0.mlp``: a ``*`` stays within one level, ``**`` crosses
            levels: ``"**.attn"`` at any depth), modules of the model, or a list of both. Wildcards
            pass over what is never called, such as a ``ModuleList``.
        regularizer: :class:`~sigreg_lib.losses.WeakSIGReg`, :class:`~sigreg_lib.losses.SIGReg` or
            any callable from (N, C) to a scalar; None records features only.
        on: ``"output"`` of the layer or its first positional ``"input"``; of a tuple the first.
        pool: how a layer's value becomes (N, C): ``"mean"`` over all positions (tokens, pixels),
            ``"tokens"`` all of them as samples, (N * positions, C); of tokens (N, tokens, C) also
            ``"class_token"``, the first, and ``"patches"``, the mean over all others; or a callable
            that makes (N, C) of whatever the layer gives (a dict, say).
        channels: where they are in values of more than two dimensions: ``"last"`` (N, ..., C) or
            ``"first"`` (N, C, ...). PyTorch's own layers keep their place whatever is said here
            (last: Linear, LayerNorm, RMSNorm, Embedding; first: convolutions, BatchNorm, GroupNorm,
            InstanceNorm; not a subclass with a ``forward`` of its own). For all others ``"auto"``
            (default) takes (N, tokens, C) and (N, C, H, W) and raises where a layer is or holds one
            of the other kind (a Linear for (N, C, H, W), a Conv1d for (N, tokens, C)), or stands
            beside one and holds none: there it must be told.
        weights: weight of each layer in the average; default equal.
        columns: K of each layer, if they differ: a layer takes the first so many columns of the
            regularizer's random matrix, whose own K must be the largest of them and, for Weak, lie
            below the layers' number of channels.
        shared_sketch: layers of one width take one random matrix at each call, instead of one each
            (default, as in the released settings of Weak-SIGReg). The expected gradient is the
            same (and a fixed matrix, ``resample=False``, is one for each width in any case); where
            layers hold nearly the same features, along a residual stream, what one matrix does to
            their gradients adds up, to a variance several times as large. The recipes of `vit`
            and `expert` draw one each too, those of MLPs share.

    Returns:
        a handle; call :meth:`Handle.loss` after each forward pass in training mode.

    Copies of a model, pickled ones too, have no working taps: attach to them anew. Set taps before
    the first call of a compiled model of the same class: compiled code that is there already does
    not run them.

    Raises:
        TypeError: a regularizer that cannot be called, or a class instead of an instance.
        ValueError: a pattern or module that matches nothing or only what has no ``forward`` (a
            ``ModuleList``), an unknown option, wrong weights or columns, or, without a callable
            as pool, a layer in one of PyTorch's transformers, or a recurrent or attention layer of
            PyTorch, with ``batch_first=False``. (In modules of your own a batch in second place is
            not seen.)

    Example::

        handle = attach(model, "blocks.*", WeakSIGReg(sketch_dim=64))
        logits = model(x)
        loss = combine(cross_entropy(logits, y), handle.loss(), lam=0.1)
    """
    if on not in ("output", "input"):
        raise ValueError(f"on must be 'output' or 'input', not {on!r}")
    if not callable(pool) and pool not in POOLS:
        raise ValueError(f"unknown pool {pool!r}; {suggest(pool, POOLS)}")
    if channels not in ("auto", "first", "last"):
        raise ValueError(f"channels must be 'auto', 'first' or 'last', not {channels!r}")
    if regularizer is not None and (isinstance(regularizer, type) or not callable(regularizer)):
        raise TypeError(
            f"regularizer must be a module or function, WeakSIGReg() say, not {regularizer!r}"
        )
    taps = _find(model, layers)
    if not callable(pool):
        for name in taps:
            refuse_batch_second(model, name)
    if weights is not None:
        weights = _checked_weights(weights, taps)
    if columns is not None:
        columns = _checked_columns(columns, taps, regularizer)
    return Handle(model, taps, regularizer, on, pool, channels, weights, columns, shared_sketch)


class Handle:
    """Taps on a model; made by :func:`attach`.

    Off while the model is in eval mode, unless :attr:`always` is set (for diagnostics); off while
    it trains if :attr:`in_training` is taken back. A layer that runs several times in one forward
    pass counts with its last run. What was recorded stays until the layer runs again in training
    mode, or until :meth:`clear`.
    """

    def __init__(
        self, model, taps, regularizer, on, pool, channels, weights, columns, shared_sketch
    ) -> None:
        self.model, self.regularizer, self.on, self.pool = model, regularizer, on, pool
        self.channels, self.shared_sketch = channels, shared_sketch
        self.names: tuple[str, ...] = tuple(taps)
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.columns = (None,) * len(self.names) if columns is None else tuple(columns)
        self.always, self.in_training = False, True
        self.features: dict[str, Tensor] = {}
        """Pooled representations of the last forward pass by layer name, (N, C) each."""
        # the value, its version (None: it has none to watch), and whether gradients were on
        self._recorded: dict[str, tuple[Tensor, int | None, bool]] = {}
        # an input before its layer runs, which may write into it
        register = "register_forward_pre_hook" if on == "input" else "register_forward_hook"
        self._hooks = [
            getattr(module, register)(_Tap(self, name, module)) for name, module in taps.items()
        ]

    def __repr__(self) -> str:
        return (
            f"Handle({', '.join(self.names)}; on={self.on!r}, pool={self.pool!r}, "
            f"regularizer={self.regularizer!r})"
        )

    def _record(self, name: str, layout: Layout, value) -> None:
        if isinstance(value, tuple) and value:  # attention gives (values, weights)
            value = value[0]
        z, version = self._pooled(name, layout, value), None
        if torch.compiler.is_compiling():  # no versions there: a layer after this one may
            z = z.clone()  # write into its value. Fused away where none does
        elif not z.is_inference():
            version = z._version
        self._recorded[name] = z, version, torch.is_grad_enabled()
        self.features[name] = z

    def _pooled(self, name: str, layout: Layout, value) -> Tensor:
        if callable(self.pool):
            value = self.pool(value)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"layer {name!r} gives a {type(value).__name__}, not a tensor: pass a callable as "
                "pool that makes (N, C) of it"
            )
        if callable(self.pool):
            return at_least_float32(value)
        try:
            where = layout.channels(value, self.channels)
            return pool_features(value, self.pool, where)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None

    def losses(self, matrices: Matrices | None = None) -> Tensor:
        """R of each tapped layer, shape (layers,), in the order of :attr:`names`.

        Layers of one shape go through the regularizer in one call.

        Args:
            matrices: the random matrix (None: no sketch) for each number of channels, or with
                ``shared_sketch=False`` for each name of a layer, as the regularizer's ``matrix``
                gives it; default: it draws now. Handed in from outside, it keeps a compiled step
                free of generators.
        """
        if self.regularizer is None:
            raise RuntimeError("this handle records features only: it has no regularizer")
        missing = [name for name in self.names if name not in self.features]
        if missing:
            raise RuntimeError(
                f"no features of {', '.join(missing)}: run the model in training mode before "
                "loss(). If it ran, then without calling them (something else uses their "
                "parameters), or it was a copy or replica of it that ran"
            )
        taken = [self.features[name] for name in self.names]
        gathers = getattr(self.regularizer, "gather_distributed", False)
        for name, z in zip(self.names, taken, strict=True):
            self._check(name, z, gathers)
        if not hasattr(self.regularizer, "values"):
            return torch.stack([self.regularizer(z) for z in taken])
        keys = self.matrix_keys(taken)
        if matrices is None:
            likes = dict(zip(keys, taken, strict=True))
            matrices = {key: self.regularizer.matrix(z) for key, z in likes.items()}
        groups: dict[tuple[torch.Size, int | None], list[int]] = {}
        for i, z in enumerate(taken):
            groups.setdefault((z.shape, self.columns[i]), []).append(i)
        values: list[Tensor | None] = [None] * len(taken)
        for (shape, columns), members in groups.items():
            stacked = torch.stack([taken[i] for i in members])
            own = [matrices[keys[i]] for i in members[: 1 if self.shared_sketch else None]]
            if len({m is None for m in own}) > 1:
                raise ValueError("matrices: of layers of one shape either all or none have one")
            matrix = own[0] if self.shared_sketch or own[0] is None else torch.stack(own)
            matrix = _first_columns(matrix, columns, shape[-1])
            found = self.regularizer.values(stacked, matrix)
            for i, value in zip(members, found.unbind(), strict=True):
                values[i] = value
        return torch.stack(values)

    def matrix_keys(self, features: Sequence[Tensor]) -> list[int | str]:
        """Under which key :meth:`losses` looks for each layer's matrix: its width or its name."""
        return [z.shape[-1] for z in features] if self.shared_sketch else list(self.names)

    def _check(self, name: str, z: Tensor, gathers: bool) -> None:
        """RuntimeError or ValueError for a layer's value that has no R, or a wrong one."""
        if not torch.compiler.is_compiling():
            recorded, version, with_gradients = self._recorded.get(name, (None, None, True))
            if recorded is z and torch.is_grad_enabled() and not with_gradients:
                raise RuntimeError(
                    f"layer {name!r} ran without gradients, so that its R would have none: under "
                    "no_grad or inference_mode, or under activation checkpointing with "
                    "use_reentrant=True (use_reentrant=False works)"
                )
            if recorded is z and version is not None and z._version != version:
                raise RuntimeError(
                    f"layer {name!r}: its value was changed in place after it was recorded, by an "
                    "inplace activation, say: make that one not inplace, or tap behind it"
                )
        if z.ndim != 2:
            raise ValueError(f"pool must make (N, C) of layer {name!r}, not {tuple(z.shape)}")
        if len(z) < 2 and process_count(gathers) == 1:  # else the processes' sum counts
            raise ValueError(
                f"layer {name!r}: one sample has no covariance; leave out a last batch of one "
                "(drop_last=True of a DataLoader)"
            )

    def loss(self, matrices: Matrices | None = None) -> Tensor:
        """The weighted average of R over the tapped layers, scalar; 0 in eval mode.

        Raises:
            RuntimeError: no forward pass in training mode since the taps were set or cleared, one
                that did not call a tapped layer, or one without gradients where they are wanted
                now.
        """
        if not self.model.training and not self.always:
            tensors = itertools.chain(self.model.parameters(), self.model.buffers())
            return torch.zeros((), device=next((t.device for t in tensors), None))
        losses = self.losses(matrices)
        if self.weights is None:
            return losses.mean()
        weights = self.weights.to(losses)
        return (losses * weights).sum() / weights.sum()

    def clear(self) -> None:
        """Forget the recorded features, and the graph that they hold."""
        self.features.clear()
        self._recorded.clear()

    def remove(self) -> None:
        """Take the taps out of the model; nothing stays behind."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.clear()


class _Tap:
    """The hook of one layer. What copying or pickling makes of it does nothing and holds nothing.

    (A copy of a model, of averaged weights, say, has copies of its hooks.)
    """

    def __init__(
        self, handle: Handle | None = None, name: str = "", tapped: nn.Module | None = None
    ) -> None:
        self.handle, self.name, self.tapped = handle, name, tapped
        # found once, and outside of compiled code
        self.layout = None if handle is None else Layout.of(handle.model, name)

    def __reduce__(self) -> tuple:
        return _Tap, ()

    def __call__(self, module: nn.Module, inputs: tuple, output=None) -> None:
        handle = self.handle
        if handle is None or module is not self.tapped:  # replicas share the hooks themselves
            return
        if (handle.model.training and handle.in_training) or handle.always:
            if handle.on == "input" and not inputs:
                raise RuntimeError(f"layer {self.name!r} is called by keywords: no input to tap")
            value = output if handle.on == "output" else inputs[0]
            handle._record(self.name, self.layout, value)


def _checked_weights(weights: Sequence[float], taps: dict[str, nn.Module]) -> list[float]:
    numbers = _converted(weights, float)
    fine = len(numbers) == len(taps) and all(0 <= w < math.inf for w in numbers)
    if not fine or not sum(numbers):
        raise ValueError(
            f"weights must be {len(taps)} numbers >= 0 with a positive sum, one for each of "
            f"{', '.join(taps)}; got {weights}"
        )
    return numbers


def _checked_columns(columns: Sequence[int], taps: dict[str, nn.Module], regularizer) -> list[int]:
    numbers = _converted(columns, operator.index)
    if len(numbers) != len(taps) or min(numbers) < 1:
        raise ValueError(
            f"columns must be {len(taps)} integers >= 1, one for each of {', '.join(taps)}; got "
            f"{columns}"
        )
    if not hasattr(regularizer, "values"):
        raise ValueError("columns are of a regularizer with a random matrix, such as WeakSIGReg")
    return numbers


def _converted(values, convert: Callable) -> list:
    """Empty where one of them is no such number."""
    try:
        return [convert(value) for value in values]
    except (TypeError, ValueError):
        return []


def _first_columns(matrix: Tensor | None, columns: int | None, channels: int) -> Tensor | None:
    """A layer's share of the random matrix; None where it has no sketch."""
    if columns is None or (matrix is None and columns >= channels):
        return matrix
    held = 0 if matrix is None else matrix.shape[-1]
    if columns > held:
        raise ValueError(
            f"columns: a layer of {channels} channels asks for {columns} of a random matrix "
            f"{f'of {held} columns' if held else 'that is not drawn (C <= K)'}"
        )
    return matrix[..., :columns]


def _find(model: nn.Module, layers) -> dict[str, nn.Module]:
    named = {name: module for name, module in model.named_modules() if name}
    by_module = {module: name for name, module in named.items()}
    wanted = [layers] if isinstance(layers, (str, nn.Module)) else list(layers)
    if not wanted:
        raise ValueError("layers is empty: name at least one layer")
    found: dict[str, nn.Module] = {}
    for item in wanted:
        if isinstance(item, nn.Module):
            if item not in by_module:
                raise ValueError(f"{type(item).__name__} is not a submodule of the model")
            if not _has_forward(item):
                raise ValueError(_never_called(by_module[item], item))
            found[by_module[item]] = item
            continue
        matches = [name for name in named if _matches(name, item)]
        if not matches:
            patterns = dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in named)
            known = patterns if set(item) & set("*?[") else named
            raise ValueError(f"no layer matches {item!r}; {suggest(item, known, patterns)}")
        called = [name for name in matches if _has_forward(named[name])]
        if not called:
            raise ValueError(_never_called(matches[0], named[matches[0]]))
        found.update((name, named[name]) for name in called)
    return found


def _has_forward(module: nn.Module) -> bool:
    forward = getattr(module, "forward", None)  # None: in a scripted container
    return forward is not None and getattr(forward, "__func__", None) is not nn.Module.forward


def _never_called(name: str, module: nn.Module) -> str:
    return (
        f"{name!r} is a {type(module).__name__}, which has no forward to tap: name the layers in "
        f"it, '{name}.*' say"
    )


def _matches(name: str, pattern: str) -> bool:
    return _levels_match(name.split("."), pattern.split("."))


def _levels_match(levels: list[str], wanted: list[str]) -> bool:
    if not levels or not wanted:
        return not levels and not wanted
    if wanted[0] == "**":
        rest = wanted[1:]
        return not rest or any(_levels_match(levels[i:], rest) for i in range(len(levels)))
    return fnmatch.fnmatchcase(levels[0], wanted[0]) and _levels_match(levels[1:], wanted[1:])
