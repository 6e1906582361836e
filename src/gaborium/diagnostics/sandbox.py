"""The one way to run a copy of a caller's module, with fixed random numbers and no side effects."""

from __future__ import annotations

import contextlib
import copy
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map

from gaborium.support import one_of

Loss = Callable[[Any, Any], Tensor]  # of the module's output and the targets
LayerLoss = Callable[[Any], Tensor]  # of the layer

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
    """Deep copies of a module and of the optimizer that trains it.

    Tensors that still have a graph, such as a cached kernel, cannot be deep-copied. They become
    constants.
    """
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
    for parameter in twin.parameters():
        parameter.grad = None
    return twin, other


@contextlib.contextmanager
def seeded(seed: int, module: nn.Module, inputs: Any = ()) -> Iterator[None]:
    """Random numbers from ``seed``, also on the GPUs of ``module`` and ``inputs``."""
    tensors = (*module.parameters(), *tensors_of(inputs))
    devices = sorted({one.device.index or 0 for one in tensors if one.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also change devices whose state is not kept.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
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


def _call(module: nn.Module, inputs: Any) -> Any:
    """Call a module on clones of its inputs, so that work in place does not change these."""
    return module(*tree_map(_cloned, inputs if isinstance(inputs, tuple) else (inputs,)))


# -- checks -------------------------------------------------------------------------------------


def check_inputs(module: nn.Module, inputs: Any, *, any_dtype: bool = False) -> None:
    """Raise ``ValueError`` if inputs and module differ in device or floating-point type."""
    first = next(module.parameters(), None)
    for value in tensors_of(inputs):
        if first is None or not value.is_floating_point():
            continue
        if value.device != first.device:
            raise ValueError(
                f"inputs are on {value.device} and the module on {first.device}; use "
                f"inputs.to('{first.device}')."
            )
        if value.dtype != first.dtype and not (any_dtype or torch.is_autocast_enabled()):
            raise ValueError(
                f"inputs are {value.dtype} and the module is {first.dtype}; use "
                f"inputs.to({first.dtype})."
            )


def check_loss(value: Any, again: Any) -> None:
    """Raise if a loss is not a scalar tensor, or differs between two runs with the same seed."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"loss must return a scalar tensor, got {type(value).__name__}; return it before "
            ".item()."
        )
    if value.numel() != 1:
        raise ValueError(
            f"loss must return a scalar, got shape {tuple(value.shape)}; use .mean() or .sum()."
        )
    # Sums by several threads differ in their last digits.
    rounding = 10 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    first, second = value.item(), again.item()
    if math.isfinite(first) and abs(first - second) > max(1e-5, rounding) * abs(first):
        raise ValueError(
            "loss must be the same for the same parameters and seed, but two runs gave "
            f"{first:.6g} and {second:.6g}; draw its random numbers from torch's generator."
        )


# -- a training set-up --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """The parts of a training loop.

    Args:
        module: the module that learns.
        loss: ``loss(output, target) -> scalar``.
        inputs: a batch; several inputs are a tuple.
        targets: what ``loss`` compares the outputs with.
        optimizer: of the loop; by default plain gradient descent with a step of 0.01.

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

    def copy(self) -> TrainingSetup:
        """The same set-up with copies of the module and the optimizer."""
        module, optimizer = copied_together(self.module, self.optimizer)
        return TrainingSetup(module, self.loss, self.inputs, self.targets, optimizer)

    def with_remedy(self, remedy: str) -> TrainingSetup:
        """A copy on which the code of a remedy has been run.

        Args:
            remedy: of a finding; code in terms of ``module``, ``loss``, ``inputs``, ``targets`` and
                ``optimizer``.
        """
        own = self.copy()
        names: dict[str, Any] = dict(vars(own))
        with seeded(0, own.module, own.inputs):
            exec(compile(remedy, "<remedy>", "exec"), names)
        return TrainingSetup(**{name: names[name] for name in vars(own)})

    def train(self, n_steps: int, *, seed: int = 0) -> list[float]:
        """Take steps in place, and return the loss before each of them and after the last.

        Training stops if the loss is not finite.
        """
        optimizer = self.optimizer
        learned = [p for p in self.module.parameters() if p.requires_grad]
        if optimizer is None and learned:
            optimizer = torch.optim.SGD(learned, lr=0.01)
        losses: list[float] = []

        def closure() -> Any:
            if optimizer is not None:
                optimizer.zero_grad()
            value = self.loss(self.output(), self.targets)
            if value.requires_grad:
                value.backward()
            return value

        with seeded(seed, self.module, self.inputs), torch.enable_grad():
            for _ in range(n_steps):
                value = closure()
                losses.append(value.item())
                if optimizer is None or not math.isfinite(losses[-1]):
                    break
                if isinstance(optimizer, torch.optim.LBFGS):
                    optimizer.step(closure)
                else:
                    optimizer.step()
            else:
                with seeded(0, self.module, self.inputs), torch.no_grad():
                    losses.append(self.loss(self.output(), self.targets).item())
        return losses

    def output(self) -> Any:
        """The module's output for the inputs."""
        return _call(self.module, self.inputs)

    @torch.no_grad()
    def explained(self) -> float:
        """Share of the targets' variance that the outputs explain; NaN if they differ in shape.

        It does not depend on the loss, nor on the scale of images and targets, so it compares
        set-ups before and after a remedy.
        """
        with seeded(0, self.module, self.inputs):
            output, targets = self.output(), self.targets
        if not is_response(output, targets):
            return math.nan
        error = (output.double() - targets.double()).square().mean()
        variance = targets.double().var(correction=0)
        return (1 - error / variance).item() if variance > 0 else math.nan


def is_response(output: Any, targets: Any) -> bool:
    """Whether the targets are of the output's kind, so that a squared error makes sense."""
    return (
        isinstance(output, Tensor)
        and isinstance(targets, Tensor)
        and output.shape == targets.shape
        and targets.is_floating_point()
    )


# -- one forward pass ---------------------------------------------------------------------------


class Run(NamedTuple):
    """The results of one forward pass."""

    output: Any
    loss: Any


@dataclass(frozen=True)
class Sandbox:
    """Runs copies of one module on the same inputs, each time with the same random numbers.

    With ``widen`` it computes in double precision, whatever dtype the module's code names.
    """

    module: nn.Module
    inputs: Any
    loss: Callable[[Any], Any] = lambda _: None
    seed: int = 0
    widen: bool = False

    def run(self, module: nn.Module | None = None, *, trace: Trace | None = None) -> Run:
        """Run a fresh copy, or a given one, whose state may change."""
        module = copied(self.module) if module is None else module
        with contextlib.ExitStack() as modes:
            modes.enter_context(seeded(self.seed, module, self.inputs))
            if self.widen:
                modes.enter_context(_Widened())
            if trace is not None:
                modes.enter_context(trace)
            output = _call(module, self.inputs)
            return Run(output, self.loss(output))

    def double(self, *, widen: bool) -> Sandbox:
        """The same in float64."""
        module, inputs = copied(self.module).double(), tree_map(_doubled, self.inputs)
        return Sandbox(module, inputs, self.loss, self.seed, widen)


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


# -- a loss as a function of the layer's parameters ---------------------------------------------


@dataclass(frozen=True, eq=False)
class OutputLoss:
    """How far a layer's outputs are from their targets: a callable ``loss(layer) -> scalar``.

    Args:
        inputs: of the layer.
        targets: for its outputs; for ``"mse"`` and ``"rmse"`` of the outputs' shape.
        measure: ``"mse"``; ``"rmse"``, its root; or a function of output and target.

    Raises:
        ValueError: ``measure`` is another word.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> inputs = torch.rand(5, 3)
        >>> OutputLoss(inputs, layer(inputs).detach(), "rmse")(layer).item()
        0.0
    """

    inputs: Tensor
    targets: Tensor
    measure: str | Callable[[Tensor, Tensor], Tensor] = "mse"

    def __post_init__(self) -> None:
        if isinstance(self.measure, str):
            one_of("measure", self.measure, ("mse", "rmse"))

    def __call__(self, layer: nn.Module) -> Tensor:
        """The measure between ``layer(inputs)`` and the targets.

        Raises:
            ValueError: inputs and layer differ in device or dtype, or outputs and targets in shape.
        """
        check_inputs(layer, self.inputs)
        output = layer(self.inputs)
        if not isinstance(self.measure, str):
            return self.measure(output, self.targets)
        if output.shape != self.targets.shape:
            raise ValueError(
                f"targets must have the outputs' shape {tuple(output.shape)}, got "
                f"{tuple(self.targets.shape)}; other shapes would broadcast."
            )
        squared = F.mse_loss(output, self.targets.to(output))
        return squared if self.measure == "mse" else squared.sqrt()

    @property
    def is_squared(self) -> bool:
        """Whether it is the squared error or its root, which have the same minima."""
        return isinstance(self.measure, str)

    def compares_responses(self, layer: nn.Module) -> bool:
        """Whether outputs and targets are of one kind, so that a squared error makes sense."""
        return is_response(Sandbox(layer, self.inputs).run().output, self.targets)

    def double(self) -> OutputLoss:
        """The same loss in double precision; whole numbers, such as classes, stay whole."""
        inputs, targets = (
            value.double() if value.is_floating_point() else value
            for value in (self.inputs, self.targets)
        )
        return OutputLoss(inputs, targets, self.measure)


class Probe:
    """A loss as a function of a layer's tensors.

    Every evaluation runs the same copy with the same buffers and random numbers, so the caller's
    layer, its gradients and torch's generators do not change.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> probe = Probe(OutputLoss(torch.ones(1, 1), torch.ones(1, 1)), layer)
        >>> probe({"weight": torch.tensor([[3.0]])}).item()
        4.0
    """

    def __init__(self, loss: LayerLoss, layer: nn.Module) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a function of the layer, got {type(loss).__name__}.")
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer must be an nn.Module, got {type(layer).__name__}.")
        self._wrapped = _Wrapped(loss, copied(layer))
        self.layer: nn.Module = self._wrapped.layer
        parameters = dict(self.layer.named_parameters())
        self.is_double = all(p.dtype == torch.float64 for p in parameters.values())
        for name, value in parameters.items():
            if value.dtype in HALF:
                raise ValueError(
                    f"{name} is {value.dtype}, too coarse for differences of a loss; use "
                    "copy.deepcopy(layer).float() with inputs.float()."
                )
        self.learned = {n: p.detach() for n, p in parameters.items() if p.requires_grad}
        with torch.no_grad():
            present = self()
            check_loss(present, self())
        if not present.is_floating_point() or not present.isfinite():
            raise ValueError(
                f"The loss is {present.item()} for the present parameters, not a finite number; "
                "check inputs, targets and the layer's parameters for NaN."
            )
        self.present: float = present.item()

    def __call__(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss with some of the layer's parameters and buffers replaced, by name."""
        buffers = {f"layer.{n}": b.clone() for n, b in self.layer.named_buffers()}
        given = {f"layer.{n}": t for n, t in (tensors or {}).items()}
        with seeded(0, self.layer):
            return torch.func.functional_call(self._wrapped, buffers | given, ())

    def at(self, point: Tensor) -> Tensor:
        """The loss with all learned parameters taken from one flat vector."""
        return self(self.named(point))

    def flat(self) -> Tensor:
        """The learned parameters as one flat vector."""
        return torch.cat([value.flatten() for value in self.learned.values()])

    def named(self, point: Tensor) -> dict[str, Tensor]:
        """The learned parameters, by name, from a flat vector."""
        parts = point.split([value.numel() for value in self.learned.values()])
        return {
            n: part.view_as(v) for part, (n, v) in zip(parts, self.learned.items(), strict=True)
        }

    def slope(self, point: Tensor) -> tuple[float, Tensor]:
        """The loss and its gradient at a flat vector of learned parameters.

        Raises:
            ValueError: the loss has no gradient.
        """
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            value = self.at(point)
            if not value.requires_grad:
                raise ValueError(
                    "The loss has no gradient with respect to the layer's learned parameters. "
                    "Compute it from the layer it is given, without .item(), .detach() or .data; "
                    "check_gradients shows where the graph breaks."
                )
            (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient


class _Wrapped(nn.Module):
    """Lets ``functional_call`` replace the layer's tensors under a function of the layer."""

    def __init__(self, loss: LayerLoss, layer: nn.Module) -> None:
        super().__init__()
        self.loss, self.layer = [loss], layer  # in a list, a loss that is a module is no child

    def forward(self) -> Tensor:
        return self.loss[0](self.layer)
