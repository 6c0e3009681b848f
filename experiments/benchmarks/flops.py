"""What torch does: FLOPs, the machine's best matrix products, and where the time goes by kind of operation.

FLOPs are counted where torch multiplies matrices, 2 for each multiply-add, so what is counted is what is run.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import profile

from manako.experiments.benchmarks.timing import Work, rate


class FlopCounter(TorchFunctionMode):
    """Counts the FLOPs of linear layers, convolutions and attention while it is entered; 2 for a multiply-add.

    Linear, x (M, K) times w (K, N): 2 M K N forward, as much again backward for x if it needs a gradient, and for w if
    it does. Attention: 4 x pairs x head width forward (Q K^T and A V), twice that backward; only pairs of a query and a
    key that the mask allows are counted. Recomputation, norms, activations and softmax are not counted. Backward is
    counted when a gradient arrives, so what a loss does not depend on is not.

    Attributes:
        forward: FLOPs by kind: "linear", "attention", "convolution".
        backward: FLOPs of the backward pass, by kind.
        shapes: how often each (M, K, N) of a linear layer was run forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self.shapes: Counter[tuple[int, int, int]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.linear:
            self._linear(result, *args[:2])
        elif func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            self._attention(result, query, key, value, kwargs.get("attn_mask"), kwargs.get("is_causal", False))
        elif func is F.conv2d:
            self._count("convolution", result, 2 * result.numel() * args[1][0].numel(), *args[:2])
        return result

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.forward.values()) + sum(self.backward.values())

    def _linear(self, result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        (n, k), m = weight.shape, x.numel() // x.shape[-1]
        self.shapes[m, k, n] += 1
        self._count("linear", result, 2 * m * k * n, x, weight)

    def _count(self, kind: str, result: torch.Tensor, flops: int, *factors: torch.Tensor) -> None:
        """Forward now; backward once for each factor that needs a gradient, when the result's arrives."""
        self.forward[kind] += flops
        if result.requires_grad:
            backward = Counter({kind: flops * sum(factor.requires_grad for factor in factors)})
            result.register_hook(lambda gradient: self.backward.update(backward))

    def _attention(
        self,
        result: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
    ) -> None:
        batch, heads, queries, width = query.shape
        allowed = torch.ones(queries, key.shape[2], dtype=torch.bool)
        if mask is not None:
            allowed = mask if mask.dtype == torch.bool else mask == 0
        elif is_causal:
            allowed = allowed.tril()
        pairs = int(allowed.expand(batch, heads, queries, key.shape[2]).sum())
        # its backward is one kernel that gives all three gradients: twice the forward
        self._count("attention", result, 2 * pairs * (width + value.shape[-1]), result, result)


def count_flops(work: Work) -> tuple[FlopCounter, float]:
    """Runs the work once; returns what was counted and the work's units."""
    with FlopCounter() as counter:
        units = work()
    return counter, units


def best_gemm_size(sizes: Sequence[int], seconds: float) -> tuple[int, dict[int, float]]:
    """Returns the side of the square float32 matrices that multiply fastest, and the FLOP/s of each side."""
    rates = {size: max(rate(gemm(size), seconds) for _ in range(2)) for size in sizes}
    return max(rates, key=lambda size: rates[size]), rates


def gemm(size: int) -> Work:
    """Returns work: one product of two square matrices, in FLOPs."""
    a, b = torch.randn(size, size), torch.randn(size, size)

    def work() -> float:
        torch.mm(a, b)
        return 2 * size**3

    return work


def gemms(shapes: Counter[tuple[int, int, int]]) -> Work:
    """Returns work: products of the given shapes and nothing else, in FLOPs."""
    operands = {(m, k, n): (torch.randn(m, k), torch.randn(n, k)) for m, k, n in shapes}

    def work() -> float:
        for shape, count in shapes.items():
            x, weight = operands[shape]
            for _ in range(count):
                torch.mm(x, weight.t())
        return sum(2 * m * k * n * count for (m, k, n), count in shapes.items())

    return work


def in_flops(work: Work, flops_per_unit: float) -> Work:
    """Returns the same work, in FLOPs."""
    return lambda: work() * flops_per_unit


# ---- where the time goes --------------------------------------------------------------------------------------------

MATMULS = "mm addmm bmm baddbmm convolution mkldnn_convolution convolution_backward mkldnn_convolution_backward"
COPIES = "copy_ cat clone _to_copy fill_ zero_ stack index index_put_ _index_put_impl_ gather index_select embedding "
COPIES += "embedding_dense_backward masked_scatter masked_scatter_"
VIEWS = "t transpose view reshape expand slice select unsqueeze squeeze permute detach as_strided _unsafe_view empty "
VIEWS += "empty_like empty_strided linear matmul conv2d flatten split narrow alias resize_ unbind result_type to"
MATMUL, COPY, BOOKKEEPING = ({f"aten::{name}" for name in names.split()} for names in (MATMULS, COPIES, VIEWS))
KINDS = ("matmul", "attention", "elementwise and norms", "copies", "optimizer", "python and bookkeeping")


def kind_of(operation: str) -> str:
    """Returns the kind of a profiler's operation, one of `KINDS`."""
    if operation in MATMUL:
        return "matmul"
    if "scaled_dot_product" in operation or "flash_attention" in operation:
        return "attention"
    if "_adam" in operation or "_foreach" in operation or operation.startswith("Optimizer."):
        return "optimizer"
    if operation in COPY:
        return "copies"
    if operation.startswith("aten::") and operation not in BOOKKEEPING:
        return "elementwise and norms"
    return "python and bookkeeping"


def breakdown(work: Work) -> dict[str, float]:
    """Returns shares of one run's time by kind of operation; they add up to 1.

    What no operation accounts for is Python and torch's bookkeeping (views, autograd's graph); the profiler's own cost
    is in there too, so that share is an upper bound.
    """
    work()
    with profile() as profiler:
        start = time.perf_counter()
        work()
        took = time.perf_counter() - start
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    seconds["python and bookkeeping"] = max(0.0, took - sum(seconds[kind] for kind in KINDS[:-1]))
    return {kind: value / sum(seconds.values()) for kind, value in seconds.items()}
