"""The layers whose kernels are Gabor functions with learned parameters.

Image → layer → loss → gradient → parameter: ``forward`` convolves with ``weight``; ``weight``
samples the Gabor functions of the raw parameters at every call; autograd carries the gradient of
the loss through the sampling back to the raw parameters.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium.coordinates import Coordinates
from gaborium.functions.kernels import (
    ENOUGH_STDS,
    combine,
    envelope_widths,
    even_odd,
    quadrature_partner,
    suggest_kernel_size,
    with_unit_amplitude,
)
from gaborium.functions.params import RECORDS, Gabor, Gabor1d, Gabor2d, Gabor3d, Waveform
from gaborium.starts import STARTS
from gaborium.starts import start as draw_start
from gaborium.support import as_sizes, one_of

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PLAIN_LAYERS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MAX_INPUTS = 32  # inputs that a gradient hook keeps, if no optimiser takes them
# A smaller norm at amplitude 1 is rounding error, or an envelope lost between pixels.
FAINTEST = 1e-6

Record = TypeVar("Record", bound=Gabor)


class KernelGradientHook:
    """Gives an optimiser the gradient of the loss with respect to a layer's kernels.

    ``kernel`` and ``offset`` are zeros, at least in single precision, that the layer adds to its
    kernels and its bias. They never change. After ``loss.backward()`` their gradients are the
    gradients of the loss with respect to the kernels and to the mean of each channel's responses;
    like all gradients they add up, and are scaled and reduced with the others. Without
    ``needs_output_mean`` a layer without bias is spared ``offset``, a sum over all responses.
    """

    def __init__(self, weight: Tensor) -> None:
        zeros = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        self.kernel = nn.Parameter(zeros)
        self.offset = nn.Parameter(zeros.flatten(1)[:, 0].clone())
        self.inputs: deque[Tensor] = deque(maxlen=_MAX_INPUTS)
        self.needs_output_mean = True

    def __call__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Kernels and bias with the zeros added."""
        self.inputs.append(input.detach())
        if bias is None and not self.needs_output_mean:
            return weight + self.kernel.to(weight), None
        offset = self.offset.to(weight)
        return weight + self.kernel.to(weight), offset if bias is None else bias + offset


class _GaborConv(nn.Module, Generic[Record]):
    """The code of the three layers; ``GaborConv2d`` documents the arguments."""

    n_dims: ClassVar[int]
    log_sigma: Tensor
    bias: nn.Parameter | None
    gradient_hook: KernelGradientHook | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...] | str,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        learn: Collection[str] | str | None = None,
        coordinates: str = "wavevector",
        geometry: str = "filter",
        start: str | Gabor = "bank",
        seed: int | None = None,
        dc: str = "keep",
        unit_norm: bool = False,
        output: str = "real",
        min_wavelength: float | None = None,
    ) -> None:
        super().__init__()
        record = RECORDS[self.n_dims]
        self.dc = one_of("dc", dc, ("keep", "remove"))
        self.output = one_of("output", output, ("real", "quadrature", "energy"))
        self.geometry = one_of("geometry", geometry, ("filter", "pair"))
        self.unit_norm = unit_norm
        self.learn = _learned_fields(record, learn)
        if isinstance(start, str):
            one_of("start", start, STARTS)
        elif not isinstance(start, record):
            raise TypeError(
                f"start must be a {record.__name__} or one of {', '.join(STARTS)}, "
                f"got {type(start).__name__}."
            )
        if isinstance(kernel_size, str):
            one_of("kernel_size", kernel_size, ("auto",))
            if isinstance(start, str):
                raise ValueError(
                    "kernel_size='auto' needs a record as start, to take the size from its sigma; "
                    f"got start={start!r}."
                )
            kernel_size = suggest_kernel_size(start)

        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size: Any = as_sizes("kernel_size", kernel_size, self.n_dims)
        self.stride: Any = stride
        self.padding: Any = padding
        self.dilation: Any = dilation
        self.padding_mode = padding_mode
        # nn.ConvNd checks its arguments and brings them to their normal form.
        plain = _empty_conv(self, out_channels, bias=bias)
        self.stride, self.padding, self.dilation = plain.stride, plain.padding, plain.dilation
        if output == "quadrature" and (out_channels % 2 or (out_channels // 2) % groups):
            raise ValueError(
                "output='quadrature' gives two channels per filter: out_channels must be a "
                f"multiple of 2 x groups = {2 * groups}, got {out_channels}."
            )

        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real floating type, got {dtype}.")
        self.start = start.detach() if isinstance(start, Gabor) else start
        self.seed, self.coordinates = seed, coordinates
        self.raw_coordinates = Coordinates.named(
            coordinates, n_dims=self.n_dims, learn=self.learn, min_wavelength=min_wavelength
        )
        raw = self.raw_coordinates.to_raw(self._starting_params())
        for name, fields in self.raw_coordinates.raw_fields().items():
            value = torch.empty(raw[name].shape, device=device, dtype=dtype)
            if self.learn >= set(fields):
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()
        if isinstance(start, Gabor):
            self._warn(start, stacklevel=3)

    # -- image → responses --------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(batch, in_channels, *size)``, or the same without batch."""
        responses = self.convolve(input, *self.weight_and_bias(input))
        if self.output != "energy":
            return responses
        return biased(pair_norms(responses, dim=-self.n_dims - 1), self.bias, self.n_dims)

    def weight_and_bias(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernels and bias to convolve with, through the gradient hook if there is one."""
        bias = None if self.output == "energy" else self.bias
        if self.gradient_hook is None or not torch.is_grad_enabled():
            return self.weight, bias
        return self.gradient_hook(input, self.weight, bias)

    def convolve(self, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with other kernels, with this layer's stride, padding, dilation and groups."""
        padding = self.padding
        if self.padding_mode != "zeros":
            image, padding = self.padded(image), 0
        convolve = _CONVOLUTIONS[self.n_dims]
        return convolve(image, weight, bias, self.stride, padding, self.dilation, self.groups)

    def padded(self, image: Tensor) -> Tensor:
        """An image with the border that the layer convolves it with."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(image, self.border(), mode=mode)

    def border(self) -> list[int]:
        """Pixels added before and after each axis, last axis first, as ``F.pad`` takes them."""
        border: list[int] = []
        for axis in reversed(range(self.n_dims)):
            if self.padding == "same":
                total = self.dilation[axis] * (self.kernel_size[axis] - 1)
                border += [total // 2, total - total // 2]
            else:
                border += [0 if self.padding == "valid" else int(self.padding[axis])] * 2
        return border

    # -- parameters → kernels -----------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The kernels, sampled from the parameters at this moment; never cached.

        Shape ``(out_channels, in_channels / groups, *kernel_size)``. With a quadrature or an
        energy output the even and the odd kernel of a filter follow each other, and for energy
        there are ``2 * out_channels`` of them.
        """
        kernels, dtype = self.kernels_at(self._raw()), self.log_sigma.dtype
        if kernels.dtype == dtype:
            return kernels
        limit = torch.finfo(dtype).max
        return kernels.clamp(-limit, limit).to(dtype)

    def kernels_at(self, raw: Mapping[str, Tensor]) -> Tensor:
        """The kernels that the layer would have with other raw parameters, as ``weight``."""
        wave = self.raw_coordinates.waveform(raw)
        even, odd = self.even_odd(wave)
        kernels = self._members(even, odd, wave)
        if self.unit_norm:
            unit = self._members(even, odd, with_unit_amplitude(wave))
            axes = (1, *range(3, unit.ndim))
            norm = torch.linalg.vector_norm(unit, dim=axes, keepdim=True) / math.sqrt(unit.shape[1])
            kernels = kernels / norm.clamp_min(FAINTEST)
        return kernels.flatten(0, 1)

    def even_odd(self, wave: Waveform) -> tuple[Tensor, Tensor]:
        """The even and odd kernel of a geometry; with ``dc="remove"`` their sums are 0."""
        even, odd = even_odd(wave, self.kernel_size)
        if self.dc == "keep":
            return even, odd
        return self._without_dc(even, wave), self._without_dc(odd, wave)

    def _members(self, even: Tensor, odd: Tensor, wave: Waveform) -> Tensor:
        """Each filter's kernel, or its quadrature pair: ``(filters, 1 or 2, channels, *size)``."""
        waves = [wave] if self.output == "real" else [wave, quadrature_partner(wave)]
        return torch.stack([combine(even, odd, member) for member in waves], dim=1)

    def _without_dc(self, part: Tensor, wave: Waveform) -> Tensor:
        """Subtract the multiple of the envelope that makes the sum 0, as in a Morlet wavelet."""
        still = wave._replace(wave_vector=torch.zeros_like(wave.wave_vector))
        envelope, _ = even_odd(still, self.kernel_size)
        axes = tuple(range(-self.n_dims, 0))
        share = part.sum(axes, keepdim=True) / envelope.sum(axes, keepdim=True).clamp_min(1e-30)
        return part - share * envelope

    def _raw(self) -> dict[str, Tensor]:
        """Raw tensors by name, at least in single precision: half precision has no 1/σ²."""
        raw = {name: getattr(self, name) for name in self.raw_coordinates.raw_fields()}
        if self.log_sigma.dtype in (torch.float16, torch.bfloat16):
            return {name: _widened(value) for name, value in raw.items()}
        return raw

    # -- the record ---------------------------------------------------------------------------

    @property
    def n_filters(self) -> int:
        """Gabor filters in the layer: half of ``out_channels`` with a quadrature output."""
        return self.out_channels // 2 if self.output == "quadrature" else self.out_channels

    @property
    def params(self) -> Record:
        """The parameters as a record, with their graph; assign a record to set them.

        Geometry has shape ``(filters, 1)``, or ``(filters, in_channels / groups)`` with
        ``geometry="pair"``; phase and amplitude ``(filters, in_channels / groups)``. A single
        Gabor function, or one per filter, may be assigned too.
        """
        return cast(Record, self.raw_coordinates.from_raw(self._raw()))

    @params.setter
    def params(self, params: Gabor) -> None:
        self._store(self._fitting(params))
        self._warn(params, stacklevel=4)  # nn.Module's __setattr__ is between

    @torch.no_grad()
    def _store(self, params: Gabor) -> None:
        for name, value in self.raw_coordinates.to_raw(params).items():
            getattr(self, name).copy_(value)

    def _fitting(self, params: Gabor) -> Gabor:
        """``params`` in float64 in the layer's shapes, or an error that says why it cannot be."""
        record = RECORDS[self.n_dims]
        if not isinstance(params, record):
            raise TypeError(f"params must be a {record.__name__}, got {type(params).__name__}.")
        whole = params.detach().to(torch.float64).expand()
        whole.check()
        shape = (self.n_filters, self.in_channels // self.groups)
        try:
            given = whole[:, None] if whole.batch_shape == shape[:1] else whole
            fields = given.expand(*shape).as_dict()
        except RuntimeError:
            raise ValueError(
                f"params must have batch shape {shape} (filters, input channels per group) or "
                f"broadcast to it, got {tuple(params.batch_shape)}."
            ) from None
        for name in fields if self.geometry == "filter" else ():
            if name in ("phase", "amplitude"):
                continue
            value = fields[name]
            if not torch.equal(value, value[:, :1].expand_as(value)):
                raise ValueError(
                    f"This layer shares one geometry over input channels, but {name} differs "
                    "between them; use geometry='pair', or fit with geometry='filter'."
                )
            fields[name] = value[:, :1]
        result = record(**fields)
        illegal = ~self.raw_coordinates.contains(result)
        if illegal.any():
            shortest = result.expand().wavelength[illegal].min().item()
            raise ValueError(
                f"wavelength must be at least min_wavelength = "
                f"{self.raw_coordinates.min_wavelength:g} px, got {shortest:g}."
            )
        return result

    # -- starting -----------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Begin again: the layer's start, and a bias drawn as ``nn.ConvNd`` draws it.

        A named start is scaled so that white input of unit variance gives responses with the
        variance that ``nn.ConvNd``'s own start gives, 1/3; a record is taken unchanged. A layer
        without a seed draws from torch's global generator, as ``nn.ConvNd`` does.
        """
        self._store(self._starting_params())
        fan_in = self.in_channels // self.groups * math.prod(self.kernel_size)
        draw_uniform(self.bias, fan_in, self._generator())

    def _starting_params(self) -> Gabor:
        if isinstance(self.start, Gabor):
            return self._fitting(self.start)
        params = draw_start(
            self.start,
            n_filters=self.n_filters,
            n_channels=self.in_channels // self.groups,
            kernel_size=self.kernel_size,
            n_phases=2 if self.output == "real" else 1,
            generator=self._generator(),
        )
        if self.raw_coordinates.min_wavelength is not None:
            # At the limit itself a wavelength has no gradient.
            shortest = 1.1 * self.raw_coordinates.min_wavelength
            params = params.replace(wavelength=params.wavelength.clamp_min(shortest))
        params = self._fitting(params)
        kernels = self.kernels_at(self.raw_coordinates.to_raw(params))
        power = kernels.square().flatten(1).sum(1).unflatten(0, (self.n_filters, -1)).mean(1)
        # nn.ConvNd draws weights of variance 1 / (3 fan_in). The norm of a pair of independent
        # normal responses has 2 - π/2 of the variance of one of them.
        wanted = 1 / 3 if self.output != "energy" else 1 / 3 / (2 - math.pi / 2)
        # A single pixel less its mean is zero at any amplitude.
        power = torch.where(power > 1e-12, power, wanted)
        scale = (wanted / power).sqrt().unsqueeze(-1)
        return params.replace(amplitude=params.amplitude * scale)

    def _generator(self) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def _warn(self, params: Gabor, stacklevel: int) -> None:
        """Warn once when kernels cut their envelopes or alias their waves."""
        # A kernel of one pixel along an axis is a slice, not a cut.
        room = [size / 2 if size > 1 else math.inf for size in reversed(self.kernel_size)]
        width = envelope_widths(params)
        cut = (width * (ENOUGH_STDS - 1e-6) > width.new_tensor(room)).any(-1)
        aliased = params.wavelength < 2
        advice = []
        if cut.any():
            advice.append(
                f"{int(cut.sum())} of {cut.numel()} Gabor functions do not fit kernel_size="
                f"{self.kernel_size}: their envelopes are cut above a third of their height. "
                f"Use kernel_size={suggest_kernel_size(params)} or smaller sigma, or expect "
                "biased parameters."
            )
        if aliased.any():
            advice.append(
                f"{int(aliased.sum())} of {aliased.numel()} wavelengths are below 2 px, where a "
                "wave looks like a longer one; use min_wavelength=2.0 to keep them above."
            )
        if advice:
            warnings.warn(" ".join(advice), stacklevel=stacklevel)

    # -- leaving ------------------------------------------------------------------------------

    def to_conv(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        """A plain ``nn.ConvNd`` with the present kernels, equal outputs and no Gabor inside.

        Returns:
            A new layer on the same device, of the same dtype and training mode; its kernels
            learn freely. With a quadrature output it has the even and odd kernels in turn.

        Raises:
            ValueError: the output is an energy, which no convolution gives.

        Example:
            >>> layer = GaborConv2d(1, 4, 9, seed=0)
            >>> image = torch.rand(1, 1, 32, 32)
            >>> torch.equal(layer(image), layer.to_conv()(image))
            True
        """
        if self.output == "energy":
            raise ValueError(
                "An energy output is not a convolution; use gaborium.storage.to_plain, which puts "
                "the norm of each pair behind one."
            )
        return plain_conv(self, self.weight, self.bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Also read a checkpoint that was stored in the other coordinates."""
        stored = Coordinates(
            self.n_dims,
            joint_wave=f"{prefix}angular_wave_vector" in state_dict,
            joint_phase=f"{prefix}even" in state_dict,
            min_wavelength=self.raw_coordinates.min_wavelength,
        )
        names = stored.raw_fields()
        if stored != self.raw_coordinates and all(prefix + name in state_dict for name in names):
            raw = {name: state_dict.pop(prefix + name) for name in names}
            dtype = raw["log_sigma"].dtype
            wide = {name: value.double() for name, value in raw.items()}
            for name, value in self.raw_coordinates.to_raw(stored.from_raw(wide)).items():
                state_dict[prefix + name] = value.to(dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, as ``nn.ConvNd`` shows them."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}"
        options = {
            "padding": (self.padding, (0,) * self.n_dims),
            "dilation": (self.dilation, (1,) * self.n_dims),
            "groups": (self.groups, 1),
            "bias": (self.bias is not None, True),
            "padding_mode": (self.padding_mode, "zeros"),
            "coordinates": (self.coordinates, "wavevector"),
            "geometry": (self.geometry, "filter"),
            "dc": (self.dc, "keep"),
            "unit_norm": (self.unit_norm, False),
            "output": (self.output, "real"),
            "min_wavelength": (self.raw_coordinates.min_wavelength, None),
        }
        for name, (value, default) in options.items():
            if value != default:
                text += f", {name}={value!r}"
        order = RECORDS[self.n_dims].field_names()
        return f"{text}, learn={[name for name in order if name in self.learn]}"


class GaborConv1d(_GaborConv[Gabor1d]):
    """A 1-D convolution of Gabor kernels; see ``GaborConv2d`` for the arguments."""

    n_dims: ClassVar[int] = 1


class GaborConv2d(_GaborConv[Gabor2d]):
    """A 2-D convolution whose kernels are Gabor functions with learned parameters.

    The arguments up to ``dtype`` are those of ``nn.Conv2d``, in its order and with its meaning;
    like it, the layer correlates: the kernel is not flipped.

    Convention:
        - geometry (orientation, wavelength, sigma, aspect ratio, centre) belongs to a filter and
          is shared by its input channels; amplitude and phase belong to each pair of output and
          input channel
        - the kernels are ``gabor(layer.params, layer.kernel_size)``, unless ``dc`` or
          ``unit_norm`` say otherwise
        - parameters are stored unconstrained, so any optimiser step leaves them legal

    At the edges: values are finite for every finite raw parameter. A sigma far below a pixel
    leaves the middle pixel only (an even-sized kernel becomes 0), and no gradient; a sigma far
    above the kernel's size leaves a plane wave. Below a wavelength of 2 px the wave is aliased.
    Where the amplitude is 0 the geometry has no gradient, but the amplitude has one. Kernels are
    computed in single precision where the layer's dtype has less.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: pixels along each axis, or ``"auto"``: from the sigma of a record ``start``.
        stride: as of ``nn.Conv2d``.
        padding: as of ``nn.Conv2d``, ``"same"`` and ``"valid"`` included.
        dilation: as of ``nn.Conv2d``; wavelengths and widths then count kernel pixels.
        groups: as of ``nn.Conv2d``.
        bias: as of ``nn.Conv2d``.
        padding_mode: as of ``nn.Conv2d``.
        device: as of ``nn.Conv2d``.
        dtype: as of ``nn.Conv2d``.
        learn: the fields of the record that train, e.g. ``("orientation",)``; the others are
            buffers. By default all but ``center``.
        coordinates: how the parameters are stored: ``"wavevector"`` or ``"textbook"``; see
            ``gaborium.coordinates``.
        geometry: ``"filter"``, or ``"pair"``: a separate geometry per (output, input) pair.
        start: ``"bank"``, ``"random"``, ``"v1"``, or a record.
        seed: of a random start and of the bias; by default torch's global generator.
        dc: ``"keep"``, or ``"remove"``: subtract the part of the envelope that responds to a
            constant image.
        unit_norm: the amplitude is the kernel's L2 norm and not the height of its envelope.
        output: ``"real"``; ``"quadrature"``: each filter gives two channels, the kernel's and
            its partner's (ψ - π/2), and ``out_channels`` counts both; ``"energy"``: the root of
            the sum of squares of the two (the bias is added after it).
        min_wavelength: px; no step takes a wavelength below it. By default there is no bound.

    Raises:
        ValueError: an argument is out of range, or names no field.

    Example:
        >>> layer = GaborConv2d(3, 16, kernel_size=11, stride=2, padding=5)
        >>> layer(torch.rand(8, 3, 64, 64)).shape
        torch.Size([8, 16, 32, 32])
        >>> layer.params.orientation.shape, layer.params.phase.shape
        (torch.Size([16, 1]), torch.Size([16, 3]))
    """

    n_dims: ClassVar[int] = 2


class GaborConv3d(_GaborConv[Gabor3d]):
    """A 3-D convolution of Gabor kernels; see ``GaborConv2d`` for the arguments."""

    n_dims: ClassVar[int] = 3


LAYERS: dict[int, Any] = {1: GaborConv1d, 2: GaborConv2d, 3: GaborConv3d}
GABOR_LAYERS = tuple(LAYERS.values())
GaborLayer = GaborConv1d | GaborConv2d | GaborConv3d


class PairEnergy(nn.Module):
    """The norms of pairs of channels, as in a Gabor layer with an energy output.

    Args:
        pairs: a convolution whose channels are pairs, one after another.
        bias: ``(out_channels,)``, added to the norms; a parameter, which is copied.

    Raises:
        ValueError: its number of channels is odd.

    Example:
        >>> layer = PairEnergy(nn.Conv2d(1, 8, 5))
        >>> layer(torch.rand(1, 1, 9, 9)).shape, layer.out_channels
        (torch.Size([1, 4, 5, 5]), 4)
    """

    output = "energy"
    bias: nn.Parameter | None

    def __init__(self, pairs: nn.Module, bias: Tensor | None = None) -> None:
        super().__init__()
        n_channels: Any = getattr(pairs, "out_channels", None)
        if not isinstance(n_channels, int) or n_channels % 2:
            raise ValueError(f"pairs must give an even number of channels, got {n_channels}.")
        self.pairs = pairs
        self.in_channels: Any = getattr(pairs, "in_channels", None)
        self.out_channels = n_channels // 2
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        """Energies ``(batch, out_channels, *size)``, or the same without batch."""
        n_dims = len(cast(Any, self.pairs).kernel_size)
        return biased(pair_norms(self.pairs(input), dim=-n_dims - 1), self.bias, n_dims)


# -- shared -----------------------------------------------------------------------------------


def n_learned(module: nn.Module) -> int:
    """How many numbers of a module train."""
    return sum(value.numel() for value in module.parameters() if value.requires_grad)


def plain_conv(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """A new ``nn.ConvNd`` with copies of these kernels and bias and a layer's other arguments."""
    conv = _empty_conv(layer, len(weight), bias=bias is not None)
    conv.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone())
    return conv.train(layer.training)


def _empty_conv(layer: Any, out_channels: int, *, bias: bool) -> Any:
    """An ``nn.ConvNd`` of a layer's arguments without memory: on the meta device."""
    return PLAIN_LAYERS[layer.n_dims](
        *(layer.in_channels, out_channels, layer.kernel_size, layer.stride, layer.padding),
        *(layer.dilation, layer.groups, bias, layer.padding_mode),
        device="meta",
    )


def pair_norms(responses: Tensor, dim: int) -> Tensor:
    """Norms of consecutive pairs along an axis, with gradient 0 where both are 0."""
    # Not vector_norm, which is many times slower along an axis of 2 than the convolution itself.
    even, odd = responses.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1)
    silent = (even == 0) & (odd == 0)
    return torch.hypot(even.masked_fill(silent, 1), odd).masked_fill(silent, 0)


def biased(responses: Tensor, bias: Tensor | None, n_dims: int) -> Tensor:
    """Responses ``(..., channels, *size)`` with each channel's bias ``(channels,)`` added."""
    return responses if bias is None else responses + bias.reshape(-1, *[1] * n_dims)


def _widened(value: Tensor) -> Tensor:
    """A half-precision tensor in single precision; its gradient saturates where half ends."""
    wide = value.float()
    if wide.requires_grad:
        limit = torch.finfo(value.dtype).max
        wide.register_hook(lambda gradient: gradient.clamp(-limit, limit))
    return wide


@torch.no_grad()
def draw_uniform(value: Tensor | None, fan_in: int, generator: torch.Generator | None) -> None:
    """Draw kernels or a bias as ``nn.ConvNd`` does."""
    if value is not None:
        bound = 1 / math.sqrt(fan_in)
        # Drawn on the CPU, so that a seed gives the same layer on every device.
        drawn = torch.empty_like(value, device="cpu")
        value.copy_(drawn.uniform_(-bound, bound, generator=generator))


def _learned_fields(record: type[Gabor], learn: Collection[str] | str | None) -> frozenset[str]:
    names = record.field_names()
    if learn is None:
        return frozenset(names) - {"center"}
    chosen = {learn} if isinstance(learn, str) else set(learn)
    for name in sorted(chosen):
        if name not in names:
            raise ValueError(
                f"learn must name fields of {record.__name__} ({', '.join(names)}), got {name!r}."
            )
    return frozenset(chosen)
