"""Faults outside the layer: each is named first, and its remedy makes the set-up learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import Gabor2d, GaborConv2d
from gaborium.diagnostics import TrainingSetup, diagnose
from gaborium.diagnostics.surroundings import check_surroundings, guesses
from trainings import causes, white

PLANTED = Gabor2d.of(orientation=0.7, wavelength=5.0, sigma=2.0, aspect_ratio=0.6)


def student(channels: int = 1, hook=None, **optimizer) -> TrainingSetup:
    """A layer that learns its orientation from the responses of a planted one."""
    inputs = white(3, channels, 24, 24).float()
    amplitude = torch.linspace(0.3, 1.0, channels)[None]
    planted = PLANTED.replace(amplitude=amplitude)
    targets = GaborConv2d(channels, 1, 11, bias=False, start=planted)(inputs).detach()
    start = planted.replace(orientation=torch.tensor(0.55))
    layer = GaborConv2d(
        channels, 1, 11, bias=False, start=start, learn="orientation", coordinates="textbook"
    )
    if hook is not None:
        layer.orientation.register_hook(hook)
    settings = {"lr": 0.004 / channels} | optimizer
    descent = torch.optim.SGD(layer.parameters(), **settings)
    return TrainingSetup(layer, F.mse_loss, inputs, targets, descent)


def diagnosed(setup: TrainingSetup):
    data = setup.inputs, setup.targets
    return diagnose(setup.module, setup.loss, data, optimizer=setup.optimizer, n_steps=128)


def shuffled() -> TrainingSetup:
    setup = student()
    return replace(setup, targets=setup.targets[[2, 0, 1]])


def moved(*shift: int) -> TrainingSetup:
    setup = student()
    return replace(setup, targets=setup.targets.roll(shift, (2, 3)))


def scaled(factor: float) -> TrainingSetup:
    setup = student()
    return replace(setup, targets=factor * setup.targets)


def other_channels() -> TrainingSetup:
    setup = student(channels=3)
    return replace(setup, inputs=setup.inputs.flip(1))


FAULTS = {
    "negated loss": lambda: replace(student(), loss=lambda a, b: -F.mse_loss(a, b)),
    "loss ignores the targets": lambda: replace(student(), loss=lambda a, _: a.square().mean()),
    "weight decay": lambda: student(weight_decay=20.0),
    "altered gradient": lambda: student(hook=lambda gradient: -gradient),
    "target scale": lambda: scaled(-1.0),
    "target scale, positive": lambda: scaled(3.0),
    "shifted targets": lambda: moved(1, 0),
    "shifted targets, both axes": lambda: moved(-1, 2),
    "shuffled targets": shuffled,
    "channel order": other_channels,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_outside_the_layer_is_named_first_and_mended(name):
    result = diagnosed(FAULTS[name]())
    assert not result.learns
    assert result.findings[0].cause == name.partition(",")[0]
    mended = result.with_remedy()
    mended.train(300)
    assert mended.explained() > 0.99
    assert "It does not learn here" in result.headline


@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_is_guessed_of_a_sound_set_up(channels):
    setup = student(channels, weight_decay=1e-4)
    assert not list(check_surroundings(setup))
    result = diagnosed(setup)
    assert result.learns
    trained = setup.copy()
    trained.train(20)
    guessed = {found.cause for found in guesses(setup, trained)}
    assert guessed <= {"weight decay", "channel order"}  # whose remedies a trial would refuse
    assert not guessed & causes(result).keys()


def test_constant_data_is_told():
    setup = student()
    for name in ("inputs", "targets"):
        broken = replace(setup, **{name: torch.full_like(getattr(setup, name), 0.5)})
        assert [f.location for f in check_surroundings(broken) if f.cause == "constant data"] == [
            (name,)
        ]


class Classifier(nn.Module):
    def __init__(self, offset: float = 0.0, *, softmax: bool = False) -> None:
        super().__init__()
        self.filters = nn.Conv2d(1, 4, 3)
        self.offset = nn.Parameter(torch.full((4, 1, 1), offset))
        self.head, self.softmax = nn.Linear(4, 2), softmax

    def forward(self, image: Tensor) -> Tensor:
        units = F.relu(self.filters(image) + self.offset)
        output = self.head(units.mean((2, 3)))
        return output.softmax(1) if self.softmax else output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, set()),
        ({"offset": -100.0}, {"dead units"}),
        ({"softmax": True}, {"double softmax"}),
    ],
)
def test_units_and_probabilities_are_seen(options, expected):
    torch.manual_seed(0)
    inputs, targets = white(8, 1, 9, 9).float(), torch.arange(8) % 2
    setup = TrainingSetup(Classifier(**options), F.cross_entropy, inputs, targets)
    assert {found.cause for found in check_surroundings(setup)} == expected
    negated = replace(setup, loss=lambda output, target: -F.cross_entropy(output, target))
    assert "negated loss" in {found.cause for found in check_surroundings(negated)}


@pytest.mark.parametrize("shape", [(), (6,), (6, 1), (6, 2)])
def test_responses_of_few_dimensions_are_examined_too(shape):
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(shape))

        def forward(self, image: Tensor) -> Tensor:
            return self.value + image.mean()

    targets = white(*shape).float() if shape else torch.tensor(0.5)
    result = diagnosed(TrainingSetup(Constant(), F.mse_loss, white(6, 1, 4, 4).float(), targets))
    assert result.learns is (shape == ())  # one number is reached; it has no variance to explain


def test_a_constant_mask_next_to_the_images_is_no_fault():
    setup = student()
    masked = replace(setup, inputs=(setup.inputs, torch.ones(24, 24)))
    masked = replace(masked, module=Masked(setup.module))
    assert not list(check_surroundings(masked))


class Masked(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.layer(image * mask)
