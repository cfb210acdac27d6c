"""Losses of a batch spread over two processes are those of the whole batch, gradients too."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import seeded
from torch import Tensor, nn

from sigreg_lib.distributed import process_count, sample_count, sum_over_processes
from sigreg_lib.losses import SIGReg, WeakSIGReg, _kernels, strong_values, weak_values
from sigreg_lib.sketch import directions

WORLD = 2
SHARES = {"small": (7, 5), "large": (300, 180)}  # samples in each process
FEW = ((1, 1), (1, 4), (3, 0), (4, 0), (0, 1), (3, 3))
N_IN, WIDTH = 6, 9

REGULARIZERS: dict[str, Callable[..., nn.Module]] = {
    "weak": lambda **o: WeakSIGReg(4, **o),
    "weak, fixed sketch": lambda **o: WeakSIGReg(4, resample=False, **o),
    "weak squared, no sketch": lambda **o: WeakSIGReg(64, squared=True, **o),
    "corrected": lambda **o: WeakSIGReg.corrected(4, **o),
    "strong": lambda **o: SIGReg(64, **o),
    "strong unbiased on LeJEPA's grid": lambda **o: SIGReg.lejepa(64, unbiased=True, **o),
}
CASES = [(name, size, layers) for name in REGULARIZERS for size in SHARES for layers in (1, 2)]


def network() -> nn.Module:
    net = nn.Linear(N_IN, WIDTH).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=seeded(p.numel()))
    return net


def batch(size: str) -> Tensor:
    n = sum(SHARES[size])
    return torch.empty(n, N_IN, dtype=torch.float64).exponential_(generator=seeded(n)) - 0.7


def loss_and_gradients(regularizer: nn.Module, x: Tensor, layers: int) -> tuple[Tensor, ...]:
    """The second of two calls, so that the draws of the processes must stay in step."""
    net = network()
    z = net(x)
    z = z if layers == 1 else torch.stack([z, z.tanh()])  # a leading dimension
    regularizer(z.detach())
    loss = regularizer(z)
    loss.backward()
    return loss.detach(), *(p.grad for p in net.parameters())


def direction_gradients(z: Tensor, gather: bool) -> tuple[Tensor, ...]:
    """Strong's gradients of its directions, where the batch wants one too and where not."""
    slices = directions(N_IN, 5, generator=seeded(1)).double().requires_grad_()
    found = []
    for wanted in (True, False):
        values = strong_values(
            torch.stack([z, z.tanh()]).requires_grad_(wanted), slices, gather_distributed=gather
        )
        (gradient,) = torch.autograd.grad(values @ torch.tensor([1.0, 3.0]).to(z), slices)
        if gather:  # what data-parallel training does
            dist.all_reduce(gradient)
            gradient /= WORLD
        found.append(gradient)
    return tuple(found)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1 + rank)  # the sums must not depend on it
    _kernels._CHUNK = 1 << 11  # "large" takes several chunks
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=WORLD)
    found: dict[object, object] = {}
    for name, size, layers in CASES:
        regularizer = REGULARIZERS[name](gather_distributed=True)
        mine = batch(size).split(SHARES[size])[rank]
        loss, *gradients = loss_and_gradients(regularizer, mine, layers)
        for gradient in gradients:  # what data-parallel training does
            dist.all_reduce(gradient)
        found[name, size, layers] = loss, *(g / WORLD for g in gradients)
    found["local"] = loss_and_gradients(REGULARIZERS["weak"](), batch("small"), 1)

    mine = torch.arange(3.0) + rank
    total = sum_over_processes(mine, True)
    found["sum"] = total, mine, process_count(True), sample_count(5 + rank, mine.device, True)
    z = torch.ones(4, 3, requires_grad=True)
    slices = directions(3, 2, generator=seeded(0))
    refused = []
    for values in (
        weak_values(z, gather_distributed=True),
        strong_values(z, slices, gather_distributed=True),
    ):
        try:
            torch.autograd.grad(values, z, create_graph=True)
        except NotImplementedError as error:
            refused.append(str(error))
    found["refused"] = refused
    found["directions"] = direction_gradients(batch("small").split(SHARES["small"])[rank], True)
    for shares in FEW:
        mine = batch("small")[: sum(shares)].split(shares)[rank]
        for name in ("weak", "corrected", "strong"):
            try:
                loss, *gradients = loss_and_gradients(
                    REGULARIZERS[name](gather_distributed=True), mine, 2
                )
            except ValueError as error:
                found[name, shares] = str(error)
                continue
            for gradient in gradients:
                dist.all_reduce(gradient)
            found[name, shares] = loss, *(g / WORLD for g in gradients)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What each of two processes found, joined by gloo through a file."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        if os.path.exists("/sys/class/net/lo"):  # the name of the host need not resolve
            patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_loss_and_averaged_gradients_are_those_of_one_process_with_the_whole_batch(results):
    for case in CASES:
        name, size, layers = case
        expected = loss_and_gradients(REGULARIZERS[name](), batch(size), layers)
        for found in results:
            torch.testing.assert_close(
                found[case], expected, rtol=1e-10, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}"
            )


def test_a_process_alone_has_another_loss_so_the_test_above_can_fail():
    for name, make in REGULARIZERS.items():
        whole, *_ = loss_and_gradients(make(), batch("small"), 1)
        part, *_ = loss_and_gradients(make(), batch("small").split(SHARES["small"])[0], 1)
        assert abs(part / whole - 1) > 0.01, name


def test_without_gathering_a_process_group_changes_nothing(results):
    expected = loss_and_gradients(REGULARIZERS["weak"](), batch("small"), 1)
    for found in results:
        torch.testing.assert_close(found["local"], expected, rtol=0, atol=0)


def test_sums_run_over_processes_and_leave_their_argument_alone(results):
    for rank, found in enumerate(results):
        total, mine, processes, samples = found["sum"]
        assert total.tolist() == [1, 3, 5]
        assert mine.tolist() == [rank, rank + 1, rank + 2]
        assert (processes, samples) == (WORLD, 5 + 6)


def test_second_derivatives_of_a_gathered_loss_are_refused_and_not_wrong(results):
    for found in results:
        assert len(found["refused"]) == 2
        assert all("second derivatives" in message for message in found["refused"])


def test_gradients_of_directions_are_those_of_one_process_with_the_whole_batch(results):
    expected = direction_gradients(batch("small"), False)
    for found in results:
        torch.testing.assert_close(found["directions"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shares", FEW)
@pytest.mark.parametrize("name", ["weak", "corrected", "strong"])
def test_the_samples_of_all_processes_count_and_all_raise_where_they_are_too_few(
    name, shares, results
):
    n, needed = sum(shares), 4 if name == "corrected" else 2
    if n < needed:
        for found in results:
            assert f"all processes together have {n} samples; needs {needed}" in found[name, shares]
        return
    expected = loss_and_gradients(REGULARIZERS[name](), batch("small")[:n], 2)
    for found in results:
        torch.testing.assert_close(found[name, shares], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", REGULARIZERS.values(), ids=REGULARIZERS.keys())
def test_gathering_without_a_process_group_is_an_error(make):
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match=r"gather_distributed=True needs .*init_process_group"):
        make(gather_distributed=True)(torch.ones(8, WIDTH))


def test_without_gathering_nothing_is_summed_or_copied():
    mine = torch.ones(3)
    assert sum_over_processes(mine, False) is mine
    assert process_count(False) == 1
    assert sample_count(5, mine.device, False) == 5
