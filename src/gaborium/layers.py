"""Convolution layers of Gabor kernels, and the layer that has free kernels too.

Image → layer → loss → gradient → parameter: ``forward`` convolves with ``weight``; ``weight``
samples the Gabor functions of the raw parameters at every call; autograd carries the gradient of
the loss through the sampling back to the raw parameters.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium.coordinates import Coordinates
from gaborium.functions.kernels import (
    combine,
    even_odd,
    quadrature_partner,
    suggest_kernel_size,
    warn_about_size,
    with_unit_amplitude,
)
from gaborium.functions.params import RECORDS, Gabor, Gabor1d, Gabor2d, Gabor3d, Waveform
from gaborium.starts import draw_start
from gaborium.support import as_sizes, one_of

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PLAIN_LAYERS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# A smaller norm at amplitude 1 is rounding error, or an envelope lost between pixels.
FAINTEST = 1e-6

Record = TypeVar("Record", bound=Gabor)


class _GaborConv(nn.Module, Generic[Record]):
    """The code of the three layers; ``GaborConv2d`` documents the arguments."""

    n_dims: ClassVar[int]
    log_sigma: Tensor
    bias: nn.Parameter | None
    # An optimiser's: called with input, kernels and bias, and returns the kernels and bias to use.
    gradient_hook: Callable[..., tuple[Tensor, Tensor | None]] | None = None

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
        self.dc = one_of("dc", dc, ("keep", "remove"))
        self.output = one_of("output", output, ("real", "quadrature", "energy"))
        self.geometry = one_of("geometry", geometry, ("filter", "pair"))
        self.unit_norm = unit_norm
        self.learn = _learned_fields(RECORDS[self.n_dims], learn)
        if kernel_size == "auto":
            if not isinstance(start, Gabor):
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
        self.seed, self.coordinates, self.min_wavelength = seed, coordinates, min_wavelength
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
        value = torch.empty(out_channels, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(value) if bias else None)
        self.reset_parameters()
        if isinstance(start, Gabor):
            warn_about_size(start, self.kernel_size, 3)

    # -- image → responses --------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(batch, in_channels, *size)``, or the same without batch."""
        responses = self.convolve(input, *self.weight_and_bias(input))
        return (
            responses if self.output != "energy" else pair_energy(responses, self.n_dims, self.bias)
        )

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
        warn_about_size(params, self.kernel_size, 4)  # nn.Module's __setattr__ is between

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
        for name, value in fields.items():
            if self.geometry == "pair" or name in ("phase", "amplitude"):
                continue
            fields[name] = value[:, :1]
            if not torch.equal(value, fields[name].expand_as(value)):
                raise ValueError(
                    f"This layer shares one geometry over input channels, but {name} differs "
                    "between them; use geometry='pair', or fit with geometry='filter'."
                )
        result = record(**fields)
        least, shortest = self.min_wavelength or 0.0, result.wavelength.min().item()
        if shortest < least:
            raise ValueError(
                f"wavelength must be at least min_wavelength = {least:g} px, got {shortest:g}."
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
        _draw_uniform(self.bias, fan_in, self._generator())

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
        if self.min_wavelength is not None:
            # At the limit itself a wavelength has no gradient.
            longer = params.wavelength.clamp_min(1.1 * self.min_wavelength)
            params = params.replace(wavelength=longer)
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

    def arguments(self) -> dict[str, Any]:
        """The arguments that make another layer like this one, by name."""
        names = inspect.signature(_GaborConv).parameters
        special = {
            "bias": self.bias is not None,
            "device": self.log_sigma.device,
            "dtype": self.log_sigma.dtype,
            "learn": [name for name in RECORDS[self.n_dims].field_names() if name in self.learn],
        }
        return {name: special[name] if name in special else getattr(self, name) for name in names}

    # -- leaving ------------------------------------------------------------------------------

    def to_conv(self) -> Any:
        """A plain ``nn.ConvNd`` with the present kernels, equal outputs and no Gabor inside.

        Returns:
            A new layer on the same device, of the same dtype and training mode; its kernels
            learn freely. With a quadrature output it has the even and odd kernels in turn. With an
            energy output it is a ``PairEnergy`` of such a convolution.

        Example:
            >>> layer = GaborConv2d(1, 4, 9, seed=0)
            >>> image = torch.rand(1, 1, 32, 32)
            >>> torch.equal(layer(image), layer.to_conv()(image))
            True
        """
        if self.output == "energy":
            pairs = plain_conv(self, self.weight, None)
            return PairEnergy(pairs, self.bias).train(self.training)
        return plain_conv(self, self.weight, self.bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Also read a checkpoint that was stored in the other coordinates."""
        stored = Coordinates(
            self.n_dims,
            joint_wave=f"{prefix}angular_wave_vector" in state_dict,
            joint_phase=f"{prefix}even" in state_dict,
            min_wavelength=self.min_wavelength,
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
        text = _empty_conv(self, self.out_channels, bias=self.bias is not None).extra_repr()
        defaults = inspect.signature(_GaborConv).parameters
        for name in ("coordinates", "geometry", "dc", "unit_norm", "output", "min_wavelength"):
            value = getattr(self, name)
            text += f", {name}={value!r}" if value != defaults[name].default else ""
        return f"{text}, learn={self.arguments()['learn']}"


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


class MixedConv(nn.Module):
    """A convolution in which some filters are Gabor functions and the others are free.

    First layers of trained networks are mixed: next to oriented edges they have colour contrasts
    and other kernels that no Gabor function fits. Both kinds go through one convolution.

    Convention:
        - output channel ``i`` belongs to filter ``order[i]``; filters are counted from the Gabor
          layer's channels to the free ones
        - arguments of the convolution (stride, padding, ...) are the Gabor layer's, for all
        - the layer is convolved with ``weight``: ``gabor.forward`` and its hooks are not called
        - ``gabor``, ``free`` and ``free_bias`` (or ``None``) are attributes that learn, ``order``
          is a buffer

    Args:
        gabor: a ``GaborConvNd`` with ``groups=1`` and an output of ``"real"`` or ``"quadrature"``.
            It becomes a part of this layer, under the name ``gabor``.
        free: how many free filters, drawn as ``nn.ConvNd`` draws its own; or their kernels,
            ``(filters, in_channels, *kernel_size)``, which are copied.
        free_bias: of the free filters ``(filters,)``; by default drawn as ``nn.ConvNd`` does, if
            the Gabor layer has a bias.
        order: the filter of each output channel, a permutation; by default Gabor first.
        seed: of the random draws; by default torch's global generator.

    Raises:
        TypeError: ``gabor`` is no Gabor layer.
        ValueError: its groups or its output are others, a shape does not fit, or ``order`` is no
            permutation.

    Example:
        >>> from gaborium import GaborConv2d
        >>> layer = MixedConv(GaborConv2d(3, 12, 7, padding=3), free=4)
        >>> layer(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 16, 32, 32])
        >>> layer.gabor.params.orientation.shape, layer.free.shape
        (torch.Size([12, 1]), torch.Size([4, 3, 7, 7]))
    """

    order: Tensor
    free_bias: nn.Parameter | None

    def __init__(
        self,
        gabor: GaborLayer,
        free: int | Tensor,
        *,
        free_bias: Tensor | None = None,
        order: Sequence[int] | Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(gabor, GABOR_LAYERS):
            raise TypeError(f"gabor must be a Gabor layer, got {type(gabor).__name__}.")
        if gabor.groups != 1 or gabor.output == "energy":
            raise ValueError(
                "gabor must have groups=1 and output='real' or 'quadrature', so that its kernels "
                f"fit with free ones; got groups={gabor.groups}, output={gabor.output!r}."
            )
        n_free = len(free) if isinstance(free, Tensor) else free
        if not isinstance(n_free, int) or n_free < 1:
            raise ValueError(f"free must be at least 1 filter, or their kernels, got {free!r:.60}.")

        self.gabor = gabor
        self.n_dims: int = gabor.n_dims
        self.in_channels, self.out_channels = gabor.in_channels, gabor.out_channels + n_free
        self.kernel_size, self.stride, self.padding = gabor.kernel_size, gabor.stride, gabor.padding
        self.dilation, self.groups, self.padding_mode = gabor.dilation, 1, gabor.padding_mode
        self.seed = seed
        like = gabor.log_sigma.detach()
        self.free = nn.Parameter(like.new_empty(n_free, gabor.in_channels, *gabor.kernel_size))
        bias = None if gabor.bias is None else nn.Parameter(like.new_empty(n_free))
        self.register_parameter("free_bias", bias)
        self.register_buffer("order", _permutation(order, self.out_channels).to(like.device))
        self._draw_free()
        if free_bias is not None and bias is None:
            raise ValueError("free_bias needs a Gabor layer with a bias; this one has bias=False.")
        for name, given in (("free", free), ("free_bias", free_bias)):
            own = getattr(self, name)
            if not isinstance(given, Tensor):
                continue
            if given.shape != own.shape:
                raise ValueError(
                    f"{name} must have shape {tuple(own.shape)}, got {tuple(given.shape)}."
                )
            own.data.copy_(given)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(batch, in_channels, *size)``, or the same without batch."""
        weight, bias = self.gabor.weight_and_bias(input)
        weight = torch.cat([weight, self.free])[self.order]
        if bias is not None:
            free = bias.new_zeros(len(self.free)) if self.free_bias is None else self.free_bias
            bias = torch.cat([bias, free])[self.order]
        return self.gabor.convolve(input, weight, bias)

    @property
    def weight(self) -> Tensor:
        """All kernels, ``(out_channels, in_channels, *kernel_size)``, sampled at this moment."""
        return torch.cat([self.gabor.weight, self.free])[self.order]

    @property
    def bias(self) -> Tensor | None:
        """The bias of each output channel, or ``None``."""
        if self.gabor.bias is None or self.free_bias is None:
            return None
        return torch.cat([self.gabor.bias, self.free_bias])[self.order]

    @property
    def is_gabor(self) -> Tensor:
        """Which output channels are Gabor filters, boolean ``(out_channels,)``."""
        return self.order < self.gabor.out_channels

    def reset_parameters(self) -> None:
        """Begin again: the Gabor layer from its start, the free filters as ``nn.ConvNd`` does."""
        self.gabor.reset_parameters()
        self._draw_free()

    def _draw_free(self) -> None:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        for value in (self.free, self.free_bias):
            _draw_uniform(value, math.prod(self.free.shape[1:]), generator)

    def to_conv(self) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        """A plain ``nn.ConvNd`` with the present kernels, equal outputs and no Gabor inside.

        Returns:
            A new layer on the same device, of the same dtype and training mode; all its kernels
            learn freely.

        Example:
            >>> from gaborium import GaborConv1d
            >>> layer = MixedConv(GaborConv1d(1, 3, 9), free=2)
            >>> sound = torch.rand(1, 1, 50)
            >>> torch.equal(layer(sound), layer.to_conv()(sound))
            True
        """
        return plain_conv(self, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Channels, and how many filters are free."""
        return f"{self.in_channels}, {self.out_channels}, free={len(self.free)}"


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

    def __init__(self, pairs: Any, bias: Tensor | None = None) -> None:
        super().__init__()
        self.pairs = pairs
        self.in_channels, self.out_channels = pairs.in_channels, pairs.out_channels // 2
        if pairs.out_channels % 2:
            raise ValueError(f"pairs must have an even number, got {pairs.out_channels}.")
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        """Energies ``(batch, out_channels, *size)``, or the same without batch."""
        return pair_energy(self.pairs(input), len(self.pairs.kernel_size), self.bias)


# -- shared -----------------------------------------------------------------------------------


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


def pair_energy(responses: Tensor, n_dims: int, bias: Tensor | None) -> Tensor:
    """Norms of consecutive pairs of channels, with a bias; of zeros the gradient is 0."""
    # Not vector_norm, which is many times slower along an axis of 2 than the convolution itself.
    even, odd = responses.unflatten(-n_dims - 1, (-1, 2)).unbind(-n_dims - 1)
    silent = (even == 0) & (odd == 0)
    norms = torch.hypot(even.masked_fill(silent, 1), odd).masked_fill(silent, 0)
    return norms if bias is None else norms + bias.reshape(-1, *[1] * n_dims)


def _widened(value: Tensor) -> Tensor:
    """A half-precision tensor in single precision; its gradient saturates where half ends."""
    wide = value.float()
    if wide.requires_grad:
        limit = torch.finfo(value.dtype).max
        wide.register_hook(lambda gradient: gradient.clamp(-limit, limit))
    return wide


@torch.no_grad()
def _draw_uniform(value: Tensor | None, fan_in: int, generator: torch.Generator | None) -> None:
    """Draw kernels or a bias as ``nn.ConvNd`` does."""
    if value is not None:
        bound = 1 / math.sqrt(fan_in)
        # Drawn on the CPU, so that a seed gives the same layer on every device.
        drawn = torch.empty_like(value, device="cpu")
        value.copy_(drawn.uniform_(-bound, bound, generator=generator))


def _learned_fields(record: type[Gabor], learn: Collection[str] | str | None) -> frozenset[str]:
    if learn is None:
        return frozenset(record.field_names()) - {"center"}
    chosen = {learn} if isinstance(learn, str) else set(learn)
    for name in sorted(chosen):
        one_of("Fields of learn", name, record.field_names())
    return frozenset(chosen)


def _permutation(order: Sequence[int] | Tensor | None, n: int) -> Tensor:
    places = torch.arange(n) if order is None else torch.as_tensor(order).flatten()
    if places.is_floating_point() or sorted(places.tolist()) != list(range(n)):
        raise ValueError(f"order must hold each of 0 to {n - 1} once, got {places.tolist()!s:.60}.")
    return places.to(torch.int64)
