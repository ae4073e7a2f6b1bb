"""Do the compiled kernels compute what torch does? Asked once in every process that uses them."""
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from conas.darts.operations import AveragePool, DilConv, FactorizedReduce, ReLUConvBN, SepConv
from conas.engine.native.evaluation import evaluate_operation
from conas.engine.native.functions import run_operation
from conas.engine.native.library import Library, integers, pointers, reals
from conas.engine.native.parts import read

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}


def wrong_kernels(library: Library) -> list[str]:
    """The names of the kernels whose results differ from torch's on a small case, by type; none if all is right."""
    wrong = []
    for dtype, tolerance in TOLERANCES.items():
        for C in (5, 16) if dtype == torch.float32 else (5,):  # vectors of both widths
            found = {}
            with torch.inference_mode(False):  # in which somebody may be who asks
                for kernel, ours, expected in _results(library, dtype, C):
                    error = float((ours.double() - expected.double()).norm() / expected.double().norm())
                    found[kernel] = found.get(kernel, True) and error <= tolerance
            wrong += [f"{kernel} ({str(dtype).removeprefix('torch.')})" for kernel, right in found.items()
                      if not right]
    return list(dict.fromkeys(wrong))


def _results(library: Library, dtype: torch.dtype, C: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name of a kernel, a result of it, and torch's."""
    numbers = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype)

    yield from _sums(library, dtype, C, draw)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        modules = [SepConv(C, 3, 2, False), DilConv(C, 5, 1, False), FactorizedReduce(C, C, False),
                   ReLUConvBN(2 * C, C, 1, 1, 0, False),
                   nn.Sequential(AveragePool(1), nn.BatchNorm2d(C, affine=False)),
                   nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(C, affine=False))]
        for i, module in enumerate(modules):
            weights = [w.to(dtype).copy_(draw(*w.shape)).requires_grad_() for w in map(torch.detach, module.to(
                dtype).parameters())]
            x = draw(2, 2 * C if i == 3 else C, 9, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
            ours = run_operation(library, read(module), x, weights, True)
            expected = torch.func.functional_call(module, dict(zip(dict(module.named_parameters()), weights)), (x,))
            kernel = "pools" if i > 3 else "unit"
            yield f"{kernel}_forward", ours.detach(), expected.detach()
            grad = draw(*expected.shape)
            # of a scalar: for others torch imports a package, which takes half a second
            for one, other in zip(*(torch.autograd.grad((y * grad).sum(), [x, *weights]) for y in (ours, expected))):
                yield f"{kernel}_backward", one, other
            module.eval()
            with torch.no_grad():
                yield "evaluate", evaluate_operation(library, module, 0.5, x), 0.5 * module(x)


def _sums(library: Library, dtype: torch.dtype, C: int, draw) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of the kernels for sums of maps."""
    calls, P, p = library.of(dtype, C), 150, [0.3, 0.5, 0.2, 0.4, 0.1, 0.7]  # of both images
    maps, grad, record = [draw(P, C) for _ in range(3)], draw(P, C), draw(5, C).double().abs() + 0.5
    records = [record.data_ptr(), None, record.data_ptr()]
    before = [(y - record[0]) * record[2] if of else y for y, of in zip(maps, records)]
    after = [y * record[3] + record[4] if of else y for y, of in zip(before, records)]
    shares = torch.tensor(p, dtype=torch.float64).view(3, 2, 1, 1).expand(-1, -1, P // 2, C).reshape(3, P, C)
    out, dots = torch.empty(P, C, dtype=dtype), torch.empty(4, C, dtype=torch.float64)
    given = 2, P // 2, C, 3, pointers([y.data_ptr() for y in maps]), integers([C] * 3), pointers(records)
    calls.combine(*given, reals(p), out.data_ptr(), C, 1)
    yield "combine", out, (shares * torch.stack(after)).sum(0)
    calls.dots(*given, reals(p), grad.data_ptr(), C, dots.data_ptr(), 1)
    grad = shares[0] * grad
    yield "dots", dots, torch.stack([(grad * term).sum(0) for term in before] + [grad.sum(0)])
