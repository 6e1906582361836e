"""Questions about steps on a known quadratic: never uphill, never far, and leaps to the best."""

import math

import pytest
import torch
from torch import Tensor

from gaborium.functions.params import RECORDS
from gaborium.layers import LAYERS
from gaborium.optim.kernel_family import KernelFamily
from gaborium.optim.quadratic import Metric, Quadratic
from gaborium.optim.steps import descend, global_step, reinitialize_filters


def natural_covariance(sizes: tuple[int, ...], channels: int) -> Tensor:
    """Of pixels that are alike near by, and of channels that are alike, ``(n, n)``."""
    axes = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in sizes), indexing="ij")
    points = torch.stack([axis.flatten() for axis in axes], -1)
    space = (-torch.cdist(points, points) / 4).exp()
    colour = 0.7 + 0.3 * torch.eye(channels, dtype=torch.float64)
    return torch.kron(colour, space)


def family_of(
    n_dims: int = 2, *, channels: int = 1, n: int = 6, k: int = 9, seed: int = 0, **kwargs
):
    arguments = {"start": "random", "seed": seed, "dtype": torch.float64, "bias": False}
    return KernelFamily(LAYERS[n_dims](channels, n, k, **arguments | kwargs))


def loss_towards(family: KernelFamily, target: Tensor) -> Quadratic:
    """The loss whose best kernels are known, ``(filters, members, n)``."""
    layer = family.layer
    n_channels = layer.in_channels // layer.groups
    covariance = natural_covariance(layer.kernel_size, n_channels)
    metric = Metric.damped(covariance.expand(layer.groups, -1, -1), 1e-9)
    one = torch.ones(len(target), dtype=torch.float64)
    return Quadratic(metric, metric.times(target), one, 0 * one)


def kernels_of(family: KernelFamily) -> Tensor:
    return family.kernels(family.read())


def misfit(family: KernelFamily, loss: Quadratic, z: Tensor, target: Tensor) -> Tensor:
    """Share of the target's responses that is missed."""
    apart = loss.at(family.kernels(z) - target).length
    return apart / loss.at(target).length


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"coordinates": "textbook"},
        {"channels": 2, "geometry": "pair"},
        {"output": "energy"},
        {"unit_norm": True, "dc": "remove"},
        {"learn": RECORDS[2].field_names()},
        {"n_dims": 1, "k": 15},
        {"n_dims": 3, "k": 4},
    ],
    ids=str,
)
def test_descending_stays_within_its_radius_and_never_rises(kwargs):
    family, target = family_of(**kwargs), kernels_of(family_of(seed=7, **kwargs))
    loss = loss_towards(family, target)
    z = family.read()
    damping = torch.full((len(z),), 1e-3, dtype=torch.float64)
    value = loss.at(family.kernels(z)).value
    for share in (0.01, 0.3, 3.0):
        home = family.kernels(z)
        radius = share * loss.at(home).length
        end, there, damping = descend(family, loss, z, radius, damping, n_iterations=5)
        reached = there.value
        assert (reached <= value).all()
        assert (reached < value).any()
        torch.testing.assert_close(reached, loss.at(family.kernels(end)).value)
        moved = loss.at(family.kernels(end) - home).length
        assert (moved <= 1.5 * radius * (1 + 1e-9)).all()
        assert (family.excess(end) == 0).all()
        assert ((damping >= 1e-9) & (damping <= 1e9)).all()
        z, value = end, reached


def test_descending_arrives_from_near_by():
    family = family_of()
    target = kernels_of(family)
    loss = loss_towards(family, target)
    z = family.read()
    near = z + 0.03 * torch.randn_like(z)
    free = torch.full((len(z),), math.inf, dtype=torch.float64)
    end, _, _ = descend(family, loss, near, free, torch.full_like(free, 1e-3), n_iterations=30)
    assert misfit(family, loss, end, target).max() < 1e-6


def test_at_the_minimum_nothing_moves():
    family = family_of()
    loss = loss_towards(family, kernels_of(family))
    z, free = family.read(), torch.full((6,), math.inf, dtype=torch.float64)
    end, there, _ = descend(family, loss, z, free, torch.full_like(free, 1e-3), n_iterations=5)
    torch.testing.assert_close(end, z, rtol=0, atol=1e-7)
    torch.testing.assert_close(there.value, loss.at(kernels_of(family)).value)


def test_a_silent_world_moves_nothing():
    family = family_of()
    z, one = family.read(), torch.ones(6, dtype=torch.float64)
    flat = Metric.damped(torch.zeros(1, 81, 81, dtype=torch.float64), 1e-6)
    loss = Quadratic(flat, torch.zeros(6, 1, 81, dtype=torch.float64), one, one)
    end, near, _ = descend(family, loss, z, one, 1e-3 * one, n_iterations=3)
    far, beyond = global_step(family, loss, z)
    for rows in (end, far, near.value, beyond.value):
        assert rows.isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "share"),
    [
        ({}, 1.0),
        ({"coordinates": "textbook"}, 1.0),
        ({"channels": 3}, 1.0),
        ({"groups": 2, "channels": 2}, 1.0),
        ({"output": "quadrature"}, 1.0),
        ({"output": "energy"}, 1.0),
        ({"dc": "remove"}, 1.0),
        ({"unit_norm": True}, 1.0),
        ({"min_wavelength": 2.2}, 1.0),
        ({"n_dims": 1, "k": 15}, 1.0),
        ({"n_dims": 3, "k": 5}, 0.8),
        ({"learn": RECORDS[2].field_names()}, 0.8),
    ],
    ids=str,
)
def test_leaps_find_the_planted_kernel_from_anywhere(kwargs, share):
    planted = family_of(seed=7, **kwargs)
    target = kernels_of(planted)
    found = []
    for seed in range(2):
        family = family_of(seed=seed, **kwargs)
        loss = loss_towards(family, target)
        z = family.read()
        end, there = global_step(family, loss, z, n_iterations=25)
        value = there.value
        torch.testing.assert_close(value, loss.at(family.kernels(end)).value)
        assert (value <= loss.at(family.kernels(z)).value).all()
        found.append(misfit(family, loss, end, target) < 0.01)
    assert torch.cat(found).double().mean() >= share, found


SUBSETS = [
    ("orientation",),
    ("wavelength",),
    ("sigma",),
    ("aspect_ratio",),
    ("phase",),
    ("amplitude",),
    ("center",),
    ("phase", "amplitude"),
    ("orientation", "phase"),
    ("orientation", "wavelength"),
    ("orientation", "wavelength", "sigma", "aspect_ratio"),
    ("wavelength", "sigma", "phase", "amplitude"),
    ("orientation", "amplitude"),
]


@pytest.mark.parametrize(("coordinates", "sign"), [("textbook", 1), ("wavevector", -1)])
@pytest.mark.parametrize("learn", SUBSETS, ids=",".join)
def test_leaps_find_what_is_learned_and_leave_the_rest(learn, coordinates, sign):
    family = family_of(learn=learn, coordinates=coordinates)
    other = family_of(learn=RECORDS[2].field_names(), start="random", seed=7).layer.params
    fields = {name: getattr(other, name).detach() for name in learn}
    if "center" in learn:
        fields["center"] = torch.randn(6, 1, 2, dtype=torch.float64)
    if "amplitude" in learn:
        fields["amplitude"] = sign * family.layer.params.amplitude.detach().abs() * 1.3
    else:
        family.layer.params = family.layer.params.replace(
            amplitude=sign * family.layer.params.amplitude.detach().abs()
        )
    planted = family.layer.params.detach().replace(**fields)
    target = family.kernels(family.rows(planted))
    loss = loss_towards(family, target)
    end, _ = global_step(family, loss, family.read(), n_iterations=25)
    assert misfit(family, loss, end, target).max() < 0.01, misfit(family, loss, end, target)


def test_leaps_of_pairs_go_channel_by_channel():
    kwargs = {"channels": 2, "geometry": "pair"}
    target = kernels_of(family_of(seed=7, **kwargs))
    family = family_of(**kwargs)
    loss = loss_towards(family, target)
    z = family.read()
    # The first look at a channel is spoilt by the others, which are wrong at that time.
    for _ in range(4):
        z, _ = global_step(family, loss, z, n_iterations=25)
    errors = misfit(family, loss, z, target)
    assert (errors < 0.05).double().mean() >= 0.8, errors


# -- filters of no use --------------------------------------------------------------------------


def all_alike(**kwargs) -> tuple[KernelFamily, Tensor]:
    """A layer of which all filters are the first one, and the kernels of one that is random."""
    family = family_of(**kwargs)
    target = kernels_of(family_of(**{**kwargs, "seed": 7}))
    first = family.layer.params.detach()[:1]
    family.layer.params = type(first)(
        **{name: v.expand(6, *v.shape[1:]) for name, v in first.as_dict().items()}
    )
    return family, target


def correlations(family: KernelFamily, loss: Quadratic, z: Tensor) -> Tensor:
    """Of the responses of real filters to one another."""
    flat = family.kernels(z).flatten(1)
    common = flat @ loss.metric.times(family.kernels(z)).flatten(1).T
    size = common.diagonal().sqrt()
    return (common / size / size[:, None]).abs().fill_diagonal_(0)


ALL, SURE = torch.ones(6, dtype=torch.bool), torch.full((6,), 6.0, dtype=torch.float64)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"coordinates": "textbook"},
        {"channels": 2, "geometry": "pair"},
        {"output": "energy"},
        {"output": "quadrature", "n": 12},
        {"unit_norm": True, "dc": "remove"},
        {"learn": ("orientation", "wavelength", "amplitude", "phase")},
        {"n_dims": 1, "k": 15},
        {"n_dims": 3, "k": 4},
    ],
    ids=str,
)
def test_filters_that_are_alike_begin_again_where_the_loss_asks_for_it(kwargs):
    family, target = all_alike(**kwargs)
    loss, z = loss_towards(family, target), family.read()
    rows, new = reinitialize_filters(family, loss, z, ALL, n_errors=SURE, max_correlation=0.95)
    assert not new[0], "the first one stays"
    assert new.sum() >= 3  # targets may have a wave in common
    assert torch.equal(rows[~new], z[~new])
    before, after = loss.at(family.kernels(z)), loss.at(family.kernels(rows))
    torch.testing.assert_close(after.length, before.length)
    # A step towards the new kernels goes downhill.
    assert ((before.descent * after.kernels).sum((1, 2)) > 0)[new].all()
    if family.n_members == 1:
        # Those that are not new are still like the first one.
        assert (correlations(family, loss, rows)[new] <= 0.95 + 1e-9).all()


@pytest.mark.parametrize(("output", "alike"), [("real", False), ("energy", True)])
def test_phase_alone_makes_no_filter_another_where_responses_come_in_pairs(output, alike):
    family, target = all_alike(output=output, dc="remove")
    turned = torch.tensor([0, 1, 0, 1, 0, 1]).double()[:, None] * math.pi / 2
    params = family.layer.params
    family.layer.params = params.replace(phase=params.phase + turned)
    loss = loss_towards(family, target)
    new = reinitialize_filters(
        family, loss, family.read(), ALL, n_errors=SURE, max_correlation=0.95
    )[1]
    assert bool(new[1]) == alike
    assert not new[0]


def test_filters_that_see_other_channels_are_not_alike():
    family, target = all_alike(channels=6, groups=6)
    loss = loss_towards(family, target)
    assert not reinitialize_filters(
        family, loss, family.read(), ALL, n_errors=SURE, max_correlation=0.95
    )[1].any()
    family, target = all_alike(channels=2, groups=2)
    new = reinitialize_filters(
        family,
        loss_towards(family, target),
        family.read(),
        ALL,
        n_errors=SURE,
        max_correlation=0.95,
    )[1]
    assert not new[0]
    assert not new[3]
    assert new.any()


def test_filters_begin_again_in_the_metric_of_their_group():
    family, target = all_alike(channels=2, groups=2)
    others = family_of(channels=2, groups=2, seed=3).layer.params.as_dict()
    family.layer.params = type(family.layer.params)(
        **{
            name: torch.cat([value[:3], others[name][3:]])
            for name, value in family.layer.params.as_dict().items()
        }
    )
    same = loss_towards(family, target)
    metric = Metric(same.metric.covariance * torch.tensor([1.0, 9.0]).double()[:, None, None])
    loss = Quadratic(metric, metric.times(target), same.scale, same.error)
    rows, new = reinitialize_filters(
        family, loss, family.read(), ALL, n_errors=SURE, max_correlation=0.95
    )
    assert new.tolist() == [False, True, True, False, False, False]
    length = loss.at(family.kernels(rows)).length
    torch.testing.assert_close(length, loss.at(kernels_of(family)).length)


def test_a_dead_filter_begins_again_as_strong_as_the_others():
    family = family_of()
    params = family.layer.params.detach()
    amplitude = params.amplitude.clone()
    amplitude[2] = 1e-9
    family.layer.params = params.replace(amplitude=amplitude)
    target = kernels_of(family_of(seed=7))
    loss, z = loss_towards(family, target), family.read()
    rows, new = reinitialize_filters(family, loss, z, ALL, n_errors=SURE, max_correlation=0.95)
    assert new.nonzero().flatten().tolist() == [2]
    length = loss.at(family.kernels(z)).length
    others = length[torch.arange(6) != 2].median()
    torch.testing.assert_close(loss.at(family.kernels(rows)).length[2], others)


@pytest.mark.parametrize(
    "case", ["at their targets", "nearly at their targets", "not sure", "not free", "all dead"]
)
def test_filters_stay_where_nothing_else_is_asked_of_them(case):
    family, target = all_alike()
    free, n_errors, z = ALL, SURE, family.read()
    if case == "at their targets":
        target = kernels_of(family)
    elif case == "nearly at their targets":
        target = kernels_of(family) + 0.005 * target
    loss = loss_towards(family, target)
    if case == "not sure":
        loss = Quadratic(loss.metric, loss.linear, loss.scale, 10 * loss.at(target).length)
    elif case == "not free":
        free = ~ALL
    elif case == "all dead":
        family.layer.params = family.layer.params.replace(amplitude=torch.zeros(6, 1).double())
        z = family.read()
    rows, new = reinitialize_filters(family, loss, z, free, n_errors=n_errors, max_correlation=0.95)
    assert not new.any()
    assert torch.equal(rows, z)
