"""The one way to run a copy of a caller's module, with fixed random numbers and no side effects."""

from __future__ import annotations

import contextlib
import copy
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map

Loss = Callable[[Any, Any], Tensor]  # of the module's output and the targets

HALF = (torch.float16, torch.bfloat16)
_NARROW = (torch.float32, *HALF)
_TORCH = str(Path(torch.__file__).resolve().parent)
# Arguments of F.conv1d, F.conv2d and F.conv3d in their order, and their defaults.
_CONVOLUTION: dict[str, Any] = {
    "input": None, "weight": None, "bias": None,
    "stride": 1, "padding": 0, "dilation": 1, "groups": 1,
}  # fmt: skip
# Functions that return a value outside of the graph.
_LEAVES_GRAPH = ("item", "tolist", "numpy", "__float__", "__array__")


# -- copies and random numbers ------------------------------------------------------------------


def copied(module: nn.Module) -> Any:
    """A deep copy of a module, without gradients."""
    return copied_together(module, None)[0]


def copied_together(
    module: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[nn.Module, Any]:
    """Deep copies of a module and of the optimizer that trains it."""
    # Tensors with a graph, such as a cached kernel, cannot be deep-copied; they become constants.
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in tensors_of(list(vars(part).values())):
            if value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    twin, other = copy.deepcopy((module, optimizer), memo)
    if optimizer is not None:
        # A copied optimizer lacks the attributes that torch does not know, as in L-BFGS.
        for key, value in vars(optimizer).items():
            if key not in vars(other) and not callable(value):
                setattr(other, key, copy.deepcopy(value, memo))
    for parameter, own in zip(twin.parameters(), module.parameters(), strict=True):
        parameter.grad = None
        for hook in (own._backward_hooks or {}).values():  # a deep copy has none
            parameter.register_hook(hook)
    return twin, other


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed``, also on the GPUs."""
    # torch.manual_seed would also change the GPUs that are not in use yet.
    generators = torch.default_generator, *torch.cuda.default_generators
    with torch.random.fork_rng(devices=range(len(generators) - 1)):
        for generator in generators:
            generator.manual_seed(seed)
        yield


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a tensor, list, tuple or dictionary, in order."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def equal(one: Any, other: Any) -> bool:
    """Whether two outputs are equal bit for bit."""
    left, right = tensors_of(one), tensors_of(other)
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.allclose(a, b.to(a), rtol=0.0, atol=0.0, equal_nan=True)
        for a, b in zip(left, right, strict=True)
    )


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _NARROW else value
    return torch.float64 if value in _NARROW else value


def _call(module: Callable[..., Any], inputs: Any) -> Any:
    """Call a module on clones of its inputs, so that work in place does not change these."""
    return module(*tree_map(_cloned, inputs if isinstance(inputs, tuple) else (inputs,)))


# -- a training set-up --------------------------------------------------------------------------


class Run(NamedTuple):
    """The results of one forward pass."""

    output: Any
    loss: Any


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """The parts of a training loop.

    Args:
        module: the module that learns.
        loss: ``loss(output, target) -> scalar``.
        inputs: a batch; several inputs are a tuple.
        targets: what ``loss`` compares the outputs with.
        optimizer: of the loop; by default plain gradient descent with a step of 0.01.
        seed: of random numbers in module and loss, which are the same in every run.
        widen: compute in double precision, whatever dtype the module's code names.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> inputs = torch.rand(8, 2)
        >>> targets = inputs.sum(1, keepdim=True)
        >>> setup = TrainingSetup(layer, nn.functional.mse_loss, inputs, targets)
        >>> losses = setup.copy().train(50)
        >>> losses[-1] < losses[0]
        True
    """

    module: nn.Module
    loss: Loss
    inputs: Any
    targets: Any
    optimizer: torch.optim.Optimizer | None = None
    seed: int = 0
    widen: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(self.module).__name__}.")

    def copy(self) -> TrainingSetup:
        """The same set-up with copies of the module and the optimizer."""
        module, optimizer = copied_together(self.module, self.optimizer)
        return replace(self, module=module, optimizer=optimizer)

    def double(self) -> TrainingSetup:
        """A copy in float64; whole numbers, such as classes, stay whole.

        Where the module's code names a narrower type, all that it computes is widened.
        """
        own = self.copy()
        own.module.double()
        inputs, targets = tree_map(_doubled, (self.inputs, self.targets))
        own = replace(own, inputs=inputs, targets=targets)
        with contextlib.suppress(Exception):  # somebody else's code may raise anything
            if own.run().loss.dtype == torch.float64:
                return own
        return replace(own, widen=True)

    def with_remedy(self, remedy: str) -> TrainingSetup:
        """A copy on which the code of a remedy has been run.

        Args:
            remedy: of a finding; code in terms of ``module``, ``loss``, ``inputs``, ``targets`` and
                ``optimizer``.
        """
        own = self.copy()
        names: dict[str, Any] = dict(vars(own))
        with seeded(0):
            exec(compile(remedy, "<remedy>", "exec"), names)
        return TrainingSetup(**{name: names[name] for name in vars(own)})

    def train(self, n_steps: int) -> list[float]:
        """Take steps in place, and return the loss before each of them and after the last.

        Training stops if the loss is not finite.
        """
        learned = [p for p in self.module.parameters() if p.requires_grad]
        optimizer = self.optimizer or torch.optim.SGD(learned or [torch.zeros(())], lr=0.01)
        losses: list[float] = []

        def closure() -> Any:
            optimizer.zero_grad()
            value = self.loss(_call(self.module, self.inputs), self.targets)
            if value.requires_grad:
                value.backward()
            return value

        with seeded(self.seed), torch.enable_grad():
            for _ in range(n_steps):
                value = closure()
                losses.append(value.item())
                if not math.isfinite(losses[-1]):
                    break
                if isinstance(optimizer, torch.optim.LBFGS):
                    optimizer.step(closure)
                else:
                    optimizer.step()
            else:
                with torch.no_grad():
                    losses.append(self.run(self.module).loss.item())
        return losses

    def run(self, module: Callable[..., Any] | None = None, *, trace: Trace | None = None) -> Run:
        """Run a fresh copy, or a given module, whose state may change."""
        module = copied(self.module) if module is None else module
        with contextlib.ExitStack() as modes:
            modes.enter_context(seeded(self.seed))
            if self.widen:
                modes.enter_context(_Widened())
            if trace is not None:
                modes.enter_context(trace)
            output = _call(module, self.inputs)
            return Run(output, self.loss(output, self.targets))

    def run_with(self, tensors: Mapping[str, Tensor]) -> Run:
        """Run the module itself with some parameters replaced, by name; its buffers stay."""
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        call = torch.func.functional_call
        return self.run(lambda *inputs: call(self.module, buffers | dict(tensors), inputs))

    def check(self, *, finite: bool = True) -> Tensor:
        """The present loss; an error if inputs or loss are not such that they can be examined."""
        if any(t.is_floating_point() and not t.isfinite().all() for t in tensors_of(self.inputs)):
            raise ValueError("inputs must be finite, got NaN or infinity.")
        value, again = self.run().loss, self.run().loss
        if not isinstance(value, Tensor):
            raise TypeError(
                f"loss must return a scalar tensor, got {type(value).__name__}; return it before "
                ".item()."
            )
        if value.numel() != 1:
            raise ValueError(
                f"loss must return a scalar, got shape {tuple(value.shape)}; use .mean() or .sum()."
            )
        first, second = value.item(), again.item()
        if finite and not (value.is_floating_point() and math.isfinite(first)):
            raise ValueError(
                f"The loss is {first} for the present parameters, not a finite number; check "
                "inputs, targets and the module's parameters for NaN."
            )
        # Sums by several threads differ in their last digits.
        rounding = 10 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        if math.isfinite(first) and abs(first - second) > max(1e-5, rounding) * abs(first):
            raise ValueError(
                "loss must be the same for the same parameters and seed, but two runs gave "
                f"{first:.6g} and {second:.6g}; draw its random numbers from torch's generator."
            )
        return value.detach()

    @torch.no_grad()
    def explained(self) -> float:
        """Share of the targets' variance that the outputs explain; NaN if they differ in shape.

        It does not depend on the loss, nor on the scale of images and targets, so it compares
        set-ups before and after a remedy.
        """
        output, targets = self.run(self.module).output, self.targets
        if not is_response(output, targets):
            return math.nan
        error = (output.double() - targets.double()).square().mean()
        variance = targets.double().var(correction=0)
        return (1 - error / variance).item() if variance > 0 else math.nan

    @torch.no_grad()
    def power(self) -> int:
        """2 if the loss is the mean squared error, 1 if it is its root, and 0 if it is another."""
        output, targets = self.run().output, self.targets
        if not is_response(output, targets):
            return 0
        outputs = (output, 0.5 * output + targets.std(correction=0))
        given = torch.stack([self.loss(one, targets).double() for one in outputs])
        squared = torch.stack([F.mse_loss(one, targets.to(one)).double() for one in outputs])
        fits = [
            torch.allclose(given, one, rtol=1e-5, atol=0.0) for one in (squared.sqrt(), squared)
        ]
        return 1 + fits.index(True) if any(fits) else 0


def is_response(output: Any, targets: Any) -> bool:
    """Whether the targets are of the output's kind, so that a squared error makes sense."""
    return (
        isinstance(output, Tensor)
        and isinstance(targets, Tensor)
        and output.shape == targets.shape
        and targets.is_floating_point()
    )


# -- one forward pass ---------------------------------------------------------------------------


class _Widened(TorchFunctionMode):
    """Computes in double precision, whatever dtype the code or its constants have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(func) or "").rpartition(".")[-1]
        if name in ("float", "half", "bfloat16") and args and isinstance(args[0], Tensor):
            return args[0].double()
        result = func(*tree_map(_doubled, tuple(args)), **tree_map(_doubled, kwargs or {}))
        return tree_map(_doubled, result)


class Trace(TorchFunctionMode):
    """Records convolutions, roots of 0, and where values leave the graph of autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks: list[str] = []  # such as "`.item()` (file.py, line 12: code)"
        self.convolutions: list[dict[str, Any]] = []  # arguments, and the output
        self.zero_roots: list[str] = []  # lines
        self.dead_units: list[str] = []  # lines of ReLUs that are zero everywhere
        self.probabilities = False  # given to a cross entropy, which takes a softmax itself
        self._detached: list[Any] = []  # results of .data and .detach(), which share storage

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch, and record its effects."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = resolve_name(func) or ""
        last = name.removesuffix(".__get__").rpartition(".")[-1]
        floats = [one for one in tensors_of(result) if one.is_floating_point()]
        if last in ("conv1d", "conv2d", "conv3d"):
            call = _CONVOLUTION | dict(zip(_CONVOLUTION, args, strict=False)) | kwargs
            fixed = {key: _cloned(call[key]) for key in ("weight", "bias")}
            self.convolutions.append(call | fixed | {"output": result})
        if last in ("sqrt", "pow", "__pow__", "std", "norm", "vector_norm") and any(
            one.requires_grad and bool((one == 0).any()) for one in floats
        ):
            self.zero_roots.append(_line())
        if last in ("relu", "relu_") and not any(bool(one.any()) for one in floats):
            self.dead_units.append(_line())
        if last == "cross_entropy" and args[0].ndim > 1:
            rows = args[0].detach()
            self.probabilities |= bool((rows >= 0).all() & ((rows.sum(1) - 1).abs() < 1e-3).all())
        is_write = name.endswith("data.__set__") or (
            last in ("__setitem__", "copy_") and any(args[0] is one for one in self._detached)
        )
        if name.endswith("data.__get__") or last == "detach":
            self._detached.append(result)
        how = ""
        if any(one.requires_grad for one in tensors_of([args, kwargs])):
            if last in _LEAVES_GRAPH:
                how = f"`.{last.strip('_')}()`"
            elif is_write or (name.endswith("data.__get__") and floats):
                how = "`.data`"
            elif any(not one.requires_grad for one in floats):
                how = f"`.{last}()`" if torch.is_grad_enabled() else "`torch.no_grad()`"
        if how:
            line = _line()
            self.breaks.append(f"{how} ({line})" if line else how)
        return result


def _line() -> str:
    """The innermost line of the caller's code that is running: ``"file.py, line 12: code"``."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((_TORCH, __file__, "<")):
            code = f": {frame.line}" if frame.line else ""
            return f"{Path(frame.filename).name}, line {frame.lineno}{code}"
    return ""
