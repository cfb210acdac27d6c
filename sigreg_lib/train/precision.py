"""bfloat16 on a processor whose PyTorch kernels have no bfloat16 products.

There a product falls back to scalar loops: with AVX2 a whole MLP step took sixteen times as long as
in float32. Short of over- and underflow two bfloat16 numbers multiply exactly in float32, and
matrix units add up in float32 too: a rounded float32 product of the same matrices differs from
theirs in the order of its sums.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sigreg_lib.recipes import Recipe

_aten = torch.ops.aten
PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}


class Float32Products(TorchDispatchMode):
    """Inside, products of bfloat16 matrices, forward and backward, are made in float32.

    They return bfloat16. ``torch.compile`` does nothing while a dispatch mode is active, so that
    compiled steps run outside and keep the processor's own products, however slow.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        wide = [a.float() if isinstance(a, Tensor) else a for a in args]
        return func(*wide, **kwargs).bfloat16()


def lacks_products(recipe: Recipe, device: torch.device) -> bool:
    """Whether the recipe is in bfloat16 and the device is a processor with scalar loops for it."""
    return device.type == "cpu" and recipe.precision == "bfloat16" and not _has_products()


def _has_products() -> bool:
    """Whether PyTorch hands the processor's bfloat16 products to oneDNN, as inductor asks it."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def worth_compiling(recipe: Recipe, device: torch.device) -> bool:
    """Whether ``torch.compile`` makes a step of the recipe faster than it is without."""
    return recipe.model == "vit" and not lacks_products(recipe, device)


def products(by_float32: bool) -> AbstractContextManager:
    """What a step runs in: :class:`Float32Products`, or nothing."""
    return Float32Products() if by_float32 else nullcontext()
