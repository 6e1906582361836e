"""Trial runs of a caller's module on copies of it: nothing of the caller's is ever changed."""

from __future__ import annotations

import contextlib
import copy
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

Loss = Callable[[Any], Tensor]

_TORCH = str(Path(torch.__file__).resolve().parent)
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
# Ways out of the graph by which a value, but not its gradient, goes on.
_OUT = ("item", "tolist", "numpy", "__float__", "__array__")


class Run(NamedTuple):
    """What one forward pass gave."""

    output: Any
    loss: Tensor


class Break(NamedTuple):
    """Where the way from a parameter to the loss ends, for gradients."""

    how: str  # such as ".data", ".detach()", "torch.no_grad()", ".item()"
    where: str  # "file.py, line 12: the line", or "" where it has no source


class Convolution(NamedTuple):
    """A convolution that a module computed, with the arguments of ``torch.nn.functional``."""

    n_dims: int
    weight: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    input: Tensor
    output: Tensor


@dataclass
class Trials:
    """Runs copies of one module on the same inputs, under the same random numbers.

    Args:
        module: the caller's; only copies of it are run.
        inputs: a tensor, or a tuple of what the module's call takes.
        loss: from the module's output to a scalar.
        seed: every run begins with it, so that dropout draws the same.
        widen: compute in double precision whatever dtype the code asks for.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    loss: Loss
    seed: int = 0
    widen: bool = False

    def fresh(self) -> nn.Module:
        """A copy of the module as it stands, its caches included."""
        return copied(self.module)

    def run(self, module: nn.Module, trace: Trace | None = None) -> Run:
        """One pass forward; the state of ``module`` may change, the global one does not."""
        with contextlib.ExitStack() as modes:
            modes.enter_context(seeded(self.seed, (*module.parameters(), *tensors_of(self.inputs))))
            if self.widen:
                modes.enter_context(_Widened())
            if trace is not None:
                modes.enter_context(trace)
            output = module(*_cloned(self.inputs))
            return Run(output, self.loss(output))

    def double(self, *, widen: bool) -> Trials:
        """The same trials in float64."""
        inputs = tuple(_doubled(value) for value in self.inputs)
        return Trials(self.fresh().double(), inputs, self.loss, self.seed, widen)


def copied(module: nn.Module, *more: Any) -> Any:
    """A deep copy, also of a module that keeps tensors with a graph, as caches do.

    Such a tensor becomes a constant in the copy. With ``more``, such as an optimiser, a list of
    copies that share their parameters.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in tensors_of(list(vars(part).values())):
            if value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    result = [copy.deepcopy(thing, memo) for thing in (module, *more)]
    for thing, other in zip(more, result[1:], strict=True):
        for key, value in vars(thing).items():
            # Optimisers leave out of a copy what torch does not know of, such as L-BFGS's list.
            if key not in vars(other) and not callable(value):
                setattr(other, key, copy.deepcopy(value, memo))
    for parameter in result[0].parameters():
        parameter.grad = None  # the copy starts without any
    return result if more else result[0]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a tensor, sequence, mapping or record, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def same(one: Any, other: Any) -> bool:
    """Whether two outputs are equal bit for bit."""
    left, right = list(tensors_of(one)), list(tensors_of(other))
    return len(left) == len(right) and all(
        a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124
        for a, b in zip(left, right, strict=True)
    )


@dataclass
class Trace(TorchFunctionMode):
    """Follows parameters through a forward pass, and sees where their gradient is lost.

    Args:
        names: the parameters to follow, by ``id``.
    """

    names: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.breaks: dict[str, list[Break]] = {}
        self.convolutions: list[Convolution] = []
        self.zero_roots: list[str] = []
        self._sources: dict[int, frozenset[str]] = {
            key: frozenset((name,)) for key, name in self.names.items()
        }
        self._aliases: set[int] = set()
        self._kept: list[Any] = []  # while it is alive, nothing else has its id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch, and note what it did."""
        result = func(*args, **(kwargs or {}))
        given = list(tensors_of([args, kwargs or {}]))
        name = resolve_name(func) or ""
        last = name.removesuffix(".__get__").rpartition(".")[-1]
        sources = frozenset().union(*(self._sources.get(id(one), frozenset()) for one in given))
        linked = any(one.requires_grad and id(one) in self._sources for one in given)
        if last in _CONVOLUTIONS:
            self._convolution(last, args, kwargs or {}, result)
        if last in ("sqrt", "pow", "__pow__", "std", "norm", "vector_norm"):
            self._root(result)
        if name.endswith("data.__get__") or last == "detach":
            self._aliases.add(id(result))
            self._kept.append(result)
        if not sources:
            return result
        if last in _OUT:
            self._break(sources, f"`.{last.strip('_')}()`")
        into_data = name.endswith("data.__set__") or (
            last in ("__setitem__", "copy_") and id(args[0]) in self._aliases
        )
        if into_data and linked:
            self._break(sources, "`.data`")
        for tensor in tensors_of(result):
            self._kept.append(tensor)
            self._sources[id(tensor)] = self._sources.get(id(tensor), frozenset()) | sources
            if linked and tensor.is_floating_point() and not tensor.requires_grad:
                self._break(sources, _way_out(name, last))
        if last in ("__setitem__", "copy_"):  # they return nothing, or what they were given
            self._kept.append(args[0])
            self._sources[id(args[0])] = self._sources.get(id(args[0]), frozenset()) | sources
        return result

    def _break(self, sources: frozenset[str], how: str) -> None:
        for name in sources:
            self.breaks.setdefault(name, []).append(Break(how, _line()))

    def _root(self, result: Any) -> None:
        for tensor in tensors_of(result):
            if tensor.is_floating_point() and tensor.requires_grad and bool((tensor == 0).any()):
                self.zero_roots.append(_line())

    def _convolution(
        self, kind: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
    ) -> None:
        order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(order, args, strict=False)) | dict(kwargs)
        self.convolutions.append(
            Convolution(
                _CONVOLUTIONS[kind],
                given["weight"].detach().clone(),
                None if given.get("bias") is None else given["bias"].detach().clone(),
                given.get("stride", 1),
                given.get("padding", 0),
                given.get("dilation", 1),
                given.get("groups", 1),
                given["input"],
                result,
            )
        )


class _Widened(TorchFunctionMode):
    """Computes in double precision, whatever dtype the code or its constants ask for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(func) or "").rpartition(".")[-1]
        if name in ("float", "half", "bfloat16") and args and isinstance(args[0], Tensor):
            return args[0].double()
        result = func(*_doubled(tuple(args)), **_doubled(kwargs or {}))
        return _doubled(result)


def _cloned(value: Any) -> Any:
    """The same with tensors of their own, so that work in place does not reach the caller's."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_cloned(item) for item in value)
    if type(value) is dict:
        return {key: _cloned(item) for key, item in value.items()}
    return value


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _NARROW else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _NARROW else value
    if type(value) in (list, tuple):
        return type(value)(_doubled(item) for item in value)
    if type(value) is dict:
        return {key: _doubled(item) for key, item in value.items()}
    return value


def _way_out(name: str, last: str) -> str:
    if name.endswith("data.__get__"):
        return "`.data`"
    if not torch.is_grad_enabled():
        return "`torch.no_grad()`"
    return f"`.{last}()`"


def _line() -> str:
    """The innermost line of the caller's code that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(_TORCH) and path != __file__ and not path.startswith("<"):
            text = linecache.getline(path, frame.f_lineno).strip()
            return f"{Path(path).name}, line {frame.f_lineno}" + (f": {text}" if text else "")
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@contextlib.contextmanager
def seeded(seed: int, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Random numbers that begin with ``seed``; afterwards they go on as if nothing had been."""
    devices = sorted({one.device.index or 0 for one in tensors if one.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would touch devices whose state is not kept.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield
