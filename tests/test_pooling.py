"""How a layer's value becomes (N, C): the sums, and where its channels and its batch are."""

from __future__ import annotations

import pytest
import torch
import torchvision
from helpers import seeded
from torch import Tensor, nn

from sigreg_lib.attach import attach
from sigreg_lib.losses import WeakSIGReg
from sigreg_lib.pooling import pool_features


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(1))


def test_pools_equal_their_sums_by_hand():
    tokens = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    assert pool_features(tokens, "mean").tolist() == [[4, 5, 6, 7], [16, 17, 18, 19]]
    assert pool_features(tokens, "class_token").tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]
    assert pool_features(tokens, "patches").tolist() == [[6, 7, 8, 9], [18, 19, 20, 21]]
    assert pool_features(tokens, "tokens").tolist() == torch.arange(24.0).view(6, 4).tolist()
    maps = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)  # channels first
    assert pool_features(maps, "mean").tolist() == [[1.5, 5.5, 9.5], [13.5, 17.5, 21.5]]
    rows = [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert pool_features(maps, "tokens")[:4].tolist() == rows
    assert pool_features(maps, "tokens").shape == (8, 3)
    last = maps.movedim(1, -1)
    assert torch.equal(pool_features(last, "mean", "last"), pool_features(maps, "mean"))
    assert torch.equal(pool_features(last, "tokens", "last"), pool_features(maps, "tokens"))
    line = torch.arange(6.0).view(1, 2, 3)  # of a Conv1d
    assert pool_features(line, "mean", "first").tolist() == [[1, 4]]
    assert pool_features(line, "tokens", "first").tolist() == [[0, 3], [1, 4], [2, 5]]
    volume = torch.arange(8.0).view(1, 2, 2, 2, 1)
    assert pool_features(volume, "mean", "first").tolist() == [[1.5, 5.5]]
    vectors = torch.arange(6.0).view(2, 3)
    for pool in ("mean", "class_token", "patches", "tokens"):
        assert torch.equal(pool_features(vectors, pool), vectors)


@pytest.mark.parametrize("pool", ["class_token", "patches"])
@pytest.mark.parametrize(("shape", "channels"), [((2, 3, 2, 2), None), ((2, 3, 4), "first")])
def test_only_tokens_have_a_class_token(pool, shape, channels):
    with pytest.raises(ValueError, match=rf"pool '{pool}' is of \(N, tokens, C\)"):
        pool_features(torch.ones(shape), pool, channels)


def test_a_class_token_alone_has_no_patches_beside_it():
    with pytest.raises(ValueError, match="pool 'patches' leaves out the class token"):
        pool_features(torch.ones(2, 1, 4), "patches")


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5, 6)])
def test_values_without_a_known_layout_need_a_callable(shape):
    with pytest.raises(ValueError, match=r"cannot pool .* pass a callable"):
        pool_features(torch.ones(shape), "mean")


def test_pooling_is_float32_for_low_precision_and_keeps_float64():
    # 2048 + 1 is not a bfloat16: a sum in low precision would lose the ones
    tokens = torch.tensor([2048.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16).view(1, 4, 1)
    assert pool_features(tokens, "mean").item() == 2051 / 4
    assert pool_features(tokens, "mean").dtype == torch.float32
    assert pool_features(tokens.double(), "mean").dtype == torch.float64


# ---------------------------------------------------------------- where the channels are


class Swapped(nn.Module):
    """A convolution whose feature maps leave with their channels last."""

    def __init__(self, *after: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 5, 1)
        self.after = nn.Sequential(*after)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(x).permute(0, 2, 3, 1))


class FirstNorm(nn.LayerNorm):
    """A LayerNorm for feature maps, as ConvNeXt has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CausalConv1d(nn.Conv1d):
    """A convolution that does not look ahead: its own forward, PyTorch's layout."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (self.kernel_size[0] - 1, 0)))


class Named(nn.LayerNorm):
    """A subclass that computes what its parent does."""


LAYERS = [
    (nn.Linear(4, 5), (6, 3, 2, 4), "last"),
    (nn.LayerNorm(4), (6, 3, 2, 4), "last"),
    (nn.RMSNorm(4), (6, 3, 2, 4), "last"),
    (nn.Linear(4, 5), (6, 3, 2, 2, 4), "last"),
    (nn.Conv1d(4, 5, 1), (6, 4, 3), "first"),
    (nn.ConvTranspose1d(4, 5, 1), (6, 4, 3), "first"),
    (nn.Conv2d(4, 5, 1), (6, 4, 3, 2), "first"),
    (nn.Conv3d(4, 5, 1), (6, 4, 3, 2, 2), "first"),
    (nn.BatchNorm1d(4), (6, 4, 3), "first"),
    (nn.BatchNorm2d(4), (6, 4, 3, 2), "first"),
    (nn.BatchNorm3d(4), (6, 4, 3, 2, 2), "first"),
    (nn.GroupNorm(2, 4), (6, 4, 3), "first"),
    (nn.InstanceNorm2d(4), (6, 4, 3, 2), "first"),
]


@pytest.mark.parametrize("told", ["auto", "first", "last"])
@pytest.mark.parametrize(("layer", "shape", "where"), LAYERS)
def test_layers_of_pytorch_keep_their_channels_whatever_is_told(layer, shape, where, told):
    net, x = nn.Sequential(layer), inputs(*shape)
    handle = attach(net, "0", None, channels=told)
    out = net(x)
    others = [d for d in range(1, out.ndim) if d != (out.ndim - 1 if where == "last" else 1)]
    torch.testing.assert_close(handle.features["0"], out.mean(others))


def test_an_embedding_has_its_channels_last():
    net = nn.Sequential(nn.Embedding(9, 5))
    handle = attach(net, "0", None)
    out = net(torch.arange(24).view(2, 3, 4) % 9)
    torch.testing.assert_close(handle.features["0"], out.mean((1, 2)))


ASKED = {
    "both kinds inside": (Swapped(nn.LayerNorm(5)), "0", (6, 2, 4, 3), "last"),
    "nothing but the other kind": (nn.Sequential(nn.Linear(3, 5), nn.GELU()), "0", (6, 2, 4, 3),
                                   "last"),
    "an activation beside it": (Swapped(nn.LayerNorm(5), nn.GELU()), "0.after.1", (6, 2, 4, 3),
                                "last"),
    "a norm of several axes": (nn.LayerNorm((2, 4, 3)), "0", (6, 2, 4, 3), "first"),
    "a norm with a forward of its own": (FirstNorm(2), "0", (6, 2, 4, 3), "first"),
    "a Conv1d with a forward of its own": (CausalConv1d(2, 5, 2), "0", (6, 2, 4), "first"),
    "a stage of Conv1d": (nn.Sequential(nn.Conv1d(2, 5, 1), nn.ReLU()), "0", (6, 2, 4), "first"),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_where_kinds_of_layers_leave_it_open_the_channels_are_asked_for(case):
    layer, name, shape, where = ASKED[case]
    net, x = nn.Sequential(layer), inputs(*shape)
    handle = attach(net, name, None)
    with pytest.raises(ValueError, match=rf"layer '{name}': where are the channels in"):
        net(x)
    handle.remove()
    told = attach(net, name, None, channels=where)
    value = net(x)
    others = [d for d in range(1, value.ndim) if d != (value.ndim - 1 if where == "last" else 1)]
    torch.testing.assert_close(told.features[name], value.mean(others))


ALIKE = {
    "parametrized": lambda: (
        nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 5, 1)), (6, 4, 3), "first"),
    "lazy": lambda: (nn.LazyConv1d(5, 1), (6, 4, 3), "first"),
    "lazy norm": lambda: (nn.LazyBatchNorm1d(), (6, 4, 3), "first"),
    "subclass": lambda: (Named(4), (6, 3, 2, 4), "last"),
    "out of attention": lambda: (nn.MultiheadAttention(4, 2).out_proj, (6, 3, 2, 4), "last"),
}  # fmt: skip


@pytest.mark.parametrize("told", ["auto", "first", "last"])
@pytest.mark.parametrize("case", ALIKE)
def test_layers_that_compute_as_those_of_pytorch_keep_their_channels_too(case, told):
    layer, shape, where = ALIKE[case]()
    test_layers_of_pytorch_keep_their_channels_whatever_is_told(layer, shape, where, told)


def test_the_input_of_a_head_is_asked_for_too():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    net = nn.Sequential(nn.Conv2d(2, 5, 1), head)
    handle = attach(net, "1", None, on="input")
    with pytest.raises(ValueError, match="layer '1': where are the channels in"):
        net(inputs(6, 2, 4, 3))
    handle.remove()
    told = attach(net, "1", None, on="input", channels="first")
    x = inputs(6, 2, 4, 3)
    net(x)
    torch.testing.assert_close(told.features["1"], net[0](x).mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "pattern", "told", "widths"),
    [
        ("resnet18", "layer?", "auto", [64, 128, 256, 512]),
        ("convnext_tiny", "features.*", "first", [96, 96, 192, 192, 384, 384, 768, 768]),
        ("swin_t", "features.*", "last", [96, 96, 192, 192, 384, 384, 768, 768]),
        ("vit_b_32", "encoder.layers.*", "auto", [768] * 12),
    ],
)
def test_stages_of_torchvision_have_the_channels_they_are_built_with(name, pattern, told, widths):
    model = torchvision.models.get_model(name, weights=None)
    handle = attach(model, pattern, None, channels=told)
    with torch.no_grad():
        model(inputs(2, 3, *(2 * [224 if "vit" in name else 32])))
    assert [z.shape for z in handle.features.values()] == [(2, width) for width in widths]


# ---------------------------------------------------------------- where the batch is


class Around(nn.Module):
    """Batch first outside, second within: PyTorch's default between two transpositions."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(4, 2)
        self.after = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.after(self.self_attn(x, x, x)[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.TransformerEncoderLayer(4, 2, 8), ["0", "0.linear1"]),
        (nn.TransformerDecoderLayer(4, 2, 8), ["0", "0.linear1"]),
        (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False
            ),
            ["0", "0.layers.1"],
        ),
        (nn.LSTM(4, 4), ["0"]),
        (nn.MultiheadAttention(4, 2), ["0"]),
        (Around(), ["0.self_attn"]),
    ],
    ids=["layer", "decoder layer", "encoder", "lstm", "attention", "within"],
)
def test_a_batch_in_second_place_is_refused(layer, names):
    net = nn.Sequential(layer)
    for name in names:
        with pytest.raises(ValueError, match=rf"layer '{name}' has its batch second"):
            attach(net, name, WeakSIGReg())
        attach(net, name, WeakSIGReg(), pool=lambda z: z.mean(0)).remove()


def test_the_model_itself_may_be_the_transformer_with_its_batch_second():
    with pytest.raises(ValueError, match="'linear1' has its batch second"):
        attach(nn.TransformerEncoderLayer(4, 2, 8), "linear1", None)


@pytest.mark.parametrize("name", ["0", "0.after"])
@pytest.mark.parametrize(
    "layer",
    [nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), Around()],
    ids=["own", "around"],
)
def test_a_batch_in_first_place_is_not(layer, name):
    net, x = nn.Sequential(layer), inputs(3, 5, 4)
    if isinstance(layer, nn.TransformerEncoderLayer):
        name = name.replace("after", "norm2")
    handle = attach(net, name, None)
    torch.testing.assert_close(net(x).mean(1), handle.features[name])
