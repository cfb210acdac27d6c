"""How a layer's value becomes a batch of representations (N, C), and where its channels are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from sigreg_lib._dtype import at_least_float32

POOLS = ("mean", "class_token", "patches", "tokens")
_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)  # channels of their values
_FIRST_3D = (nn.Conv1d, nn.ConvTranspose1d)
_FIRST = (*_FIRST_3D, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.GroupNorm)
_FIRST += (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FIRST += (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_TRANSFORMERS = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)
_TRANSFORMERS += (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def pool_features(value: Tensor, pool: str, channels: str | None = None) -> Tensor:
    """A layer's value as a batch of representations (N, C), float32; float64 stays float64.

    Args:
        value: (N, C), or with its channels where ``channels`` says.
        pool: see :func:`~sigreg_lib.attach.attach`, here by name.
        channels: ``"first"`` or ``"last"``; None: last in (N, tokens, C), first in (N, C, H, W).

    Raises:
        ValueError: a value that has no such layout, or no tokens where the pool is of tokens.
    """
    value = at_least_float32(value)
    if value.ndim == 2:
        return value
    usual = {3: "last", 4: "first"}.get(value.ndim)
    if value.ndim < 2 or (channels or usual) is None:
        raise ValueError(
            f"cannot pool a value of shape {tuple(value.shape)}: expected (N, C), (N, tokens, C) "
            "or (N, C, H, W); say where the channels are, or pass a callable as pool"
        )
    are_tokens = value.ndim == 3 and (channels or usual) == "last"
    if pool in ("class_token", "patches") and not are_tokens:
        raise ValueError(
            f"pool {pool!r} is of (N, tokens, C), not of {channels or usual} channels in a value "
            f"of shape {tuple(value.shape)}"
        )
    if not are_tokens:
        value = value.flatten(2).mT if (channels or usual) == "first" else value.flatten(1, -2)
    if pool == "mean":
        return value.mean(1)
    if pool == "patches":
        if value.shape[1] < 2:
            raise ValueError("pool 'patches' leaves out the class token, and there is no other")
        return value[:, 1:].mean(1)
    return value[:, 0] if pool == "class_token" else value.flatten(0, 1)


class Layout(NamedTuple):
    """What the kinds of layers in and around a tapped one tell of its values.

    Attributes:
        fixed: where PyTorch fixes the channels of the layer's values, ``"first"`` or ``"last"``;
            None: it does not. (A subclass with a ``forward`` of its own, such as a LayerNorm for
            feature maps, may have them elsewhere.)
        doubtful: numbers of dimensions in which its channels may lie elsewhere than usual: a layer
            that has them elsewhere is part of it or, where it has no parts, stands beside it.
    """

    fixed: str | None
    doubtful: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Layout:
        """The layout of a submodule."""
        module = model.get_submodule(name)
        fixed = "last" if _runs(module, _LAST) else "first" if _runs(module, _FIRST) else None
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            fixed = None
        if not list(module.children()):  # an activation, say: what is around it tells
            module = model.get_submodule(name.rpartition(".")[0])
        inside = list(module.modules())
        unusual = ((3, _FIRST_3D), (4, _LAST))
        return cls(
            fixed, tuple(n for n, kinds in unusual if any(isinstance(m, kinds) for m in inside))
        )

    def channels(self, value: Tensor, told: str) -> str | None:
        """``"first"`` or ``"last"``; None: as usual. ``told``: these two, or ``"auto"``.

        Raises:
            ValueError: it is in doubt, and was not told.
        """
        if self.fixed or told != "auto":
            return self.fixed or told
        if value.ndim in self.doubtful:
            raise ValueError(
                f"where are the channels in a value of shape {tuple(value.shape)}? The kinds of "
                "layers in it, or beside it, leave that open: pass channels='first' or 'last'"
            )
        return None


def _runs(module: nn.Module, kinds: Iterable[type[nn.Module]]) -> bool:
    """Whether it computes what one of these does (parametrized, lazy and quantizable ones do)."""
    own = getattr(module, "cls_to_become", None) or type(module)  # the former of lazy modules
    return any(issubclass(own, kind) and own.forward is kind.forward for kind in kinds)


def refuse_batch_second(model: nn.Module, name: str) -> None:
    """ValueError where a layer of PyTorch lays its values out as (tokens, N, C)."""
    levels = name.split(".")
    path = [model.get_submodule(".".join(levels[:i])) for i in range(len(levels) + 1)]
    second = [m for m in path if isinstance(m, _TRANSFORMERS) and not _is_batch_first(m)]
    tapped = path[-1]
    if isinstance(tapped, (nn.RNNBase, nn.MultiheadAttention)) and not tapped.batch_first:
        second.append(tapped)
    if second:
        raise ValueError(
            f"layer {name!r} has its batch second ({type(second[0]).__name__} with "
            "batch_first=False): build it with batch_first=True, or pass a callable as pool"
        )


def _is_batch_first(module: nn.Module) -> bool:
    inside = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
    return all(attention.batch_first for attention in inside)
