"""A whole training step as one CUDA graph: recorded once, replayed with a single launch.

What a step reads lies in buffers that stay in place: augmented images (uint8), labels, the mixing
of the batch (partner, weight of each pixel, share of the label: MixUp and CutMix are one code
path), sketches or directions, factors of drop path and dropout (the model's own buffers), and the
learning rate, a tensor of the optimizer. The graph holds everything from normalization to the
optimizer's update; a compiled forward and backward pass is recorded as any other. Outside of it,
launched before each replay and never waited for: the draws, and augmentation. RandAugment groups
the images of many steps by operation, so its shapes change from call to call; in groups of
thousands of images it costs few launches a step. A short last batch has other shapes and runs
without the graph.

Nothing here is specific to the loop: :class:`CapturedStep` takes any function of tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UP = 3  # steps before recording: kernels are chosen, optimizer state comes into being


class Graph(Protocol):
    """What records a function's work on the device and repeats it on the same memory."""

    def __init__(self, device: torch.device) -> None: ...

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Call the function where it will be recorded."""

    def record(self, function: Callable[[], Any]) -> None:
        """Record what the function launches; nothing is run."""

    def replay(self) -> Any:
        """Run what was recorded; the function's result, in memory that the next replay reuses."""


class CudaGraph:
    """:class:`torch.cuda.CUDAGraph`, warmed up and recorded on one stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Any]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.result = function()

    def replay(self) -> Any:
        self.graph.replay()
        return self.result


class CapturedStep:
    """A training step that is recorded after a few calls and replayed from then on.

    Every call is one real step: the first ``WARM_UP`` run as they are, the next is recorded and
    replayed. What it returns lies in memory that the next call overwrites.

    Args:
        function: the step, backward pass and update included. It may read tensors that stay in
            place (parameters, the learning rate) and its arguments: tensors, None, and tuples and
            dictionaries of them, of the same shapes and dtypes at each call. It must not wait for
            the device.
        optimizer: what the function steps: fused, with a tensor for the learning rate.
        graph: what records.
    """

    def __init__(
        self, function: Callable[..., Any], optimizer: torch.optim.Optimizer, graph: Graph
    ) -> None:
        self.function, self.optimizer, self.graph = function, optimizer, graph
        self.calls, self.inputs = 0, None

    def __call__(self, *inputs: Any) -> Any:
        if self.inputs is None:
            self.inputs = _map(torch.clone, inputs)
        else:
            _copy(self.inputs, inputs)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.graph.warm_up(self._run)
        if self.calls == WARM_UP + 1:
            with _capturable(self.optimizer):
                self.graph.record(self._run)
        return self.graph.replay()

    def _run(self) -> Any:
        return self.function(*self.inputs)

    def forget(self) -> None:
        """Record anew: tensors that the step reads or writes were replaced by others."""
        self.calls = 0


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Fused optimizers can be recorded as they are, but ask for this flag meanwhile (Adam).

    Outside of a recording it would change nothing and warn.
    """
    before = [group.get("capturable") for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(optimizer.param_groups, before, strict=True):
            if value is None:  # SGD has no such flag
                del group["capturable"]
            else:
                group["capturable"] = value


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(function, v) for key, v in value.items()}
    if isinstance(value, tuple):
        parts = [_map(function, v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value  # None


def _copy(to: Any, value: Any) -> None:
    if _alike(to, value):
        to.copy_(value, non_blocking=True)
    elif isinstance(to, dict) and isinstance(value, dict) and to.keys() == value.keys():
        for key, part in to.items():
            _copy(part, value[key])
    elif isinstance(to, tuple) and isinstance(value, tuple) and len(to) == len(value):
        for part, other in zip(to, value, strict=True):
            _copy(part, other)
    elif not (to is None and value is None):
        raise ValueError(
            "a captured step takes the same shapes and dtypes at each call: "
            f"{_describe(to)} before, {_describe(value)} now"
        )


def _alike(to: Any, value: Any) -> bool:
    """Two tensors of one shape and dtype: another dtype would be cast in silence."""
    both = isinstance(to, Tensor) and isinstance(value, Tensor)
    return both and (to.shape, to.dtype) == (value.shape, value.dtype)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, (dict, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)
