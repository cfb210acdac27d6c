import numpy as np
import pytest
import torch
from torch import nn

from sigreg_lib import WeakSIGReg
from sigreg_lib._types import is_integer
from sigreg_lib.models import build_model


@pytest.mark.parametrize("value", [0, -3, np.int64(4), np.uint8(4)])
def test_integers_of_any_kind_are_integers(value):
    assert is_integer(value)


@pytest.mark.parametrize(
    "value", [True, False, np.True_, 2.0, np.float64(2), "2", None, [2], torch.tensor(2)]
)
def test_truth_values_and_numbers_that_only_equal_an_integer_are_none(value):
    assert not is_integer(value)


def test_what_takes_an_integer_takes_numpys():
    z = torch.randn(32, 16)
    assert WeakSIGReg(sketch_dim=np.int64(4))(z).isfinite()
    model = build_model("mlp", (1, 8, 8), 10, seed=0, width=np.int32(16), depth=np.int64(2))
    assert len([m for m in model.modules() if isinstance(m, nn.Linear)]) == 3
