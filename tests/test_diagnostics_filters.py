"""Questions about health: each kind of sick filter is found, named and can be mended."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from gaborium import Gabor1d, Gabor2d, Gabor3d, GaborConv1d, GaborConv2d, GaborConv3d
from gaborium.diagnostics import Severity, health, reinitialize_filters
from gaborium.functions.kernels import dc_response
from trainings import finding, mended

LAYERS = {1: GaborConv1d, 2: GaborConv2d, 3: GaborConv3d}


def layer_of(n: int = 4, size: int = 15, **fields) -> GaborConv2d:
    """Filters of all directions that are well, but for the fields given."""
    values = {
        "orientation": torch.arange(n) * (math.pi / n),
        "wavelength": torch.full((n,), 5.0),
        "sigma": torch.full((n,), 2.2),
        "phase": torch.full((n,), 0.5),
    } | {name: torch.as_tensor(value) for name, value in fields.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the layer itself says of sick filters
        return GaborConv2d(1, n, size, start=Gabor2d.of(**values))


def causes(found) -> list[str]:
    return [finding.cause for finding in found.findings]


def test_well_filters_have_no_findings():
    assert health(layer_of()).findings == []


@pytest.mark.parametrize("start", ["bank", "random", "v1"])
@pytest.mark.parametrize("output", ["real", "quadrature", "energy"])
@pytest.mark.parametrize("n_dims", LAYERS)
def test_new_layers_are_not_sick(n_dims, output, start):
    layer = LAYERS[n_dims](3, 8, 11, start=start, output=output, seed=0)
    found = health(layer)
    # Random filters may happen to be alike, above all in 1-D.
    others = [one for one in found.findings if one.cause != "duplicate filters"]
    assert all(one.severity is Severity.NOTE for one in others)
    assert len(found) == layer.n_filters


def test_dead_filters():
    layer = layer_of(amplitude=[1.0, 0.0, 1.0, 1e-5])
    found = health(layer)
    assert found.dead.tolist() == [False, True, False, True]
    assert finding(found, "dead filters").location == ("1", "3")
    assert finding(found, "dead filters").severity is Severity.WARNING
    kept = layer.params.orientation[0].item()
    new = mended(layer, finding(found, "dead filters").remedy)
    assert not health(new).dead.any()
    assert new.params.orientation[0].item() == pytest.approx(kept, abs=1e-6)
    nothing = health(layer_of(amplitude=[0.0] * 4))
    assert finding(nothing, "dead filters").severity is Severity.SEVERE
    assert nothing.duplicates == ()
    faint = health(layer_of(3, orientation=[0.3, 1.0, 0.3], amplitude=[1.0, 1.0, 1e-5]))
    assert faint.duplicates == ()  # one of the two is dead, which is enough said


def test_aliased_wavelengths():
    layer = layer_of(wavelength=[1.7, 5.0, 2.01, 1.99])
    found = health(layer)
    assert found.aliased.tolist() == [True, False, False, True]
    new = mended(layer, finding(found, "aliased wavelength").remedy)
    assert not health(new).aliased.any()
    assert new(torch.zeros(1, 1, 20, 20)).shape == layer(torch.zeros(1, 1, 20, 20)).shape


def test_truncated_envelopes():
    # The layer asks for 1.5 standard deviations to each side: 15 px hold a sigma of 5.
    layer = layer_of(sigma=[2.0, 4.9, 5.1, 2.0], aspect_ratio=[1.0, 1.0, 1.0, 0.25])
    found = health(layer)
    # The last one is too long along its stripes, which lie across (3 pi / 4).
    assert found.truncated.tolist() == [False, False, True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the new layer is content, too
        new = mended(layer, finding(found, "truncated envelope").remedy)
    assert not health(new).truncated.any()
    image = torch.rand(1, 1, 40, 40)
    assert new(image).shape == layer(image).shape
    moved = layer_of(center=[[0.0, 0.0]] * 3 + [[5.0, 0.0]])
    assert health(moved).truncated.tolist() == [False, False, False, True]


def test_duplicates_and_negatives():
    layer = layer_of(
        5,
        orientation=[0.3, 0.3 + math.pi, 1.2, 0.3, 2.0],
        phase=[0.5, -0.5, 0.0, 0.5, 0.5],
        amplitude=[1.0, 3.0, 1.0, -1.0, 1.0],
    )
    found = health(layer)
    pairs = {(pair.first, pair.second): pair.negative for pair in found.duplicates}
    assert pairs == {(0, 1): False, (0, 3): True, (1, 3): True}
    assert all(abs(pair.cosine) == pytest.approx(1, abs=1e-5) for pair in found.duplicates)
    assert found.redundant == [1]
    said = finding(found, "duplicate filters")
    assert said.location == ("0", "1", "3")
    assert "3 of 5, in 3 pairs, 2 of them negatives" in said.sentence
    assert said.severity is Severity.WARNING
    assert health(mended(layer, said.remedy)).redundant == []


def test_the_phase_of_an_energy_filter_makes_no_difference():
    params = Gabor2d.of(wavelength=[5.0, 5.0], sigma=2.0, phase=[0.0, 1.2])
    with_phase = {
        output: health(GaborConv2d(1, n, 11, start=params, output=output)).duplicates
        for output, n in (("real", 2), ("quadrature", 4), ("energy", 2))
    }
    assert [len(pairs) for pairs in with_phase.values()] == [0, 0, 1]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"sigma": 0.1}, "point"),
        ({"sigma": 1e4}, "plane wave"),
        ({"aspect_ratio": 0.1, "sigma": 1.0}, "stretched"),
        ({"wavelength": 50.0, "phase": 0.0}, "blob"),
        ({"wavelength": math.inf, "phase": 0.0}, "blob"),
        ({"wavelength": 50.0, "phase": math.pi / 2}, ""),  # an edge: its direction is plain
        ({"sigma": 0.1, "aspect_ratio": 0.05}, "stretched"),
    ],
)
def test_degenerate_filters(fields, kind):
    base = {"orientation": 0.4, "wavelength": 5.0, "sigma": 2.2, "phase": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = GaborConv2d(1, 1, 15, start=Gabor2d.of(**(base | fields)))
    found = health(layer)
    assert found.degenerate == (kind,)
    said = [one for one in found.findings if one.cause == "degenerate filters"]
    assert len(said) == bool(kind)
    if kind:
        assert said[0].severity is (Severity.NOTE if kind == "blob" else Severity.WARNING)
        assert health(mended(layer, said[0].remedy)).degenerate == ("",)


def test_the_response_to_a_constant_is_that_of_the_spectrum():
    layer = layer_of(wavelength=[10.0, 5.0, 5.0, 5.0], sigma=3.0, phase=0.0).double()
    found = health(layer)
    wanted = dc_response(layer.params, 15).abs().squeeze(1)
    torch.testing.assert_close(found.dc_leak, wanted.detach())
    said = finding(found, "DC leak")
    assert (said.location, said.severity) == (("0",), Severity.NOTE)
    assert health(mended(layer, said.remedy)).dc_leak.max() < 1e-6


@pytest.mark.parametrize("geometry", ["filter", "pair"])
def test_channels_that_are_not_heard_do_not_count(geometry):
    start = Gabor2d.of(wavelength=[[5.0, 1.5]], sigma=2.0, amplitude=[[1.0, 1e-3]])
    if geometry == "filter":
        start = start.replace(wavelength=torch.full((1, 2), 5.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = GaborConv2d(2, 1, 11, start=start, geometry=geometry)
    assert not health(layer).aliased.any()


@pytest.mark.parametrize("n_dims", LAYERS)
def test_other_layers_are_fitted_first(n_dims):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n_dims]
    record = {1: Gabor1d, 2: Gabor2d, 3: Gabor3d}[n_dims]
    params = record.of(wavelength=[4.0, 4.0, 5.0], sigma=1.4, amplitude=[1.0, 2.0, 0.0])
    size = 7 if n_dims == 3 else 9
    plain = LAYERS[n_dims](1, 3, size, start=params).to_conv()
    assert isinstance(plain, kind)
    found = health(plain)
    assert found.dead.tolist() == [False, False, True]
    assert found.redundant == [1]
    assert found.params.wavelength[0].item() == pytest.approx(4.0, abs=1e-3)
    assert all(one.remedy == "" for one in found.findings)
    noise = kind(1, 3, size)
    assert causes(health(noise)) in ([], ["DC leak"])


def test_the_layer_stays_as_it_was():
    layer = layer_of().train(False)
    before = copy.deepcopy(layer.state_dict())
    numbers = torch.get_rng_state()
    health(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_nested_layer_is_mended_by_its_name():
    network = nn.Sequential(nn.Identity(), layer_of(wavelength=[1.5, 5.0, 5.0, 5.0]))
    new = mended(network, finding(health(network[1], name="1"), "aliased wavelength").remedy)
    assert not health(new[1]).aliased.any()


def test_what_is_no_layer_is_refused():
    with pytest.raises(TypeError, match="needs a layer with a weight"):
        health(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="needs a Gabor layer, got Conv2d"):
        reinitialize_filters(nn.Conv2d(1, 1, 3), [0])
