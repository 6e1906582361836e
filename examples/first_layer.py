"""Is this patch of a photograph brick, grass or gravel? A Gabor layer beside an ordinary one.

    python examples/first_layer.py            # under half a minute on one core
    python examples/first_layer.py --quick    # a few seconds, one seed, too few steps

Patches to learn from are cut out of the left half of each photograph, patches to test on out of
the right half. Needs scikit-image, for the photographs.
"""

import sys

import torch
from skimage import data
from torch import Tensor, nn

from gaborium import GaborConv2d

QUICK = "--quick" in sys.argv
N_SEEDS, N_STEPS, N_TEST = (1, 5, 20) if QUICK else (5, 60, 200)


def patches(n: int, half: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut ``n`` patches per class, each of mean 0 and variance 1."""
    images = []
    for photograph in (data.brick(), data.grass(), data.gravel()):
        area = torch.from_numpy(photograph).float().tensor_split(2, dim=1)[half]
        corners = torch.rand(n, 2, generator=generator) * (torch.tensor(area.shape) - 32)
        for top, left in corners.long().tolist():
            patch = area[top : top + 32, left : left + 32]
            images.append((patch - patch.mean()) / patch.std())
    return torch.stack(images).unsqueeze(1), torch.arange(3).repeat_interleave(n)


def accuracy_with(first: nn.Module, learning: tuple, testing: tuple) -> float:
    """Train a small network that begins with this layer, and test it."""
    network = nn.Sequential(
        first, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(N_STEPS):
        loss = nn.functional.cross_entropy(network(learning[0]), learning[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (network(testing[0]).argmax(1) == testing[1]).float().mean().item()


scores: dict[str, list[float]] = {"GaborConv2d": [], "nn.Conv2d": []}
for seed in range(N_SEEDS):
    generator = torch.Generator().manual_seed(seed)
    sets = patches(10, 0, generator), patches(N_TEST, 1, generator)
    torch.manual_seed(seed)
    gabor = GaborConv2d(1, 16, kernel_size=11, stride=2)
    before = gabor.params.detach()
    scores["GaborConv2d"].append(accuracy_with(gabor, *sets))
    scores["nn.Conv2d"].append(accuracy_with(nn.Conv2d(1, 16, 11, stride=2), *sets))

print("How far each Gabor filter moved, with the last seed:\n")
after = gabor.params.detach()
# A difference of records knows that 179° lies beside 0°.
turns = after.difference(before)["orientation"].rad2deg().flatten().tolist()
angles = before.orientation.rad2deg().flatten().tolist()
wavelengths = torch.cat([before.wavelength, after.wavelength], 1).tolist()
for i, (angle, turn, (was, now)) in enumerate(zip(angles, turns, wavelengths, strict=True)):
    print(f"filter {i:2}: {angle:4.0f}° turned by {turn:+5.1f}°, {was:4.1f} -> {now:4.1f} px")

print("\nTest accuracy, learned from 10 patches per class, one number per seed:\n")
for name, values in scores.items():
    print(f"{name:12} mean {sum(values) / len(values):.2f}  ", *(f"{v:.2f}" for v in values))
print("\nBoth had the same steps and neither was tuned. A few photographs and seeds show how it is")
print("done, and not which layer is better.")
