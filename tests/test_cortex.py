"""What is said of macaque V1 is what was published, and its population is what is said of it."""

import json
import math

import pytest
import torch

from gaborium import cortex


def test_half_and_most_of_the_population_lie_within_their_reach():
    sample = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    far = cortex.distance(*cortex.widths(*sample))
    for share in (0.5, 0.95):
        # Three standard errors of a share of so many.
        error = 3 * math.sqrt(share * (1 - share) / len(far))
        assert (far < cortex.reach(share)).double().mean().item() == pytest.approx(share, abs=error)


def test_a_width_of_none_is_infinitely_far():
    assert cortex.distance(torch.tensor(0.0), torch.tensor(1.0)).item() == math.inf


def test_the_numbers_are_those_of_the_published_histograms(shared):
    text = (shared / "v1" / "v1_population_statistics.json").read_text(encoding="utf-8")
    published = json.loads(text)
    counts = published["orientation_counts"]["counts"]
    assert (counts[0] + counts[2]) / sum(counts) == cortex.CARDINAL
    frequencies = published["peak_sf_counts"]
    edges = torch.tensor(frequencies["bin_edges_cpd"]).log2()
    weights = torch.tensor(frequencies["counts"]) / sum(frequencies["counts"])
    middle = (edges[1:] + edges[:-1]) / 2
    variance = (weights * middle**2).sum() - (weights * middle).sum() ** 2
    assert variance.sqrt().item() == pytest.approx(cortex.FREQUENCY_STD, abs=0.005)


def test_most_measured_cells_lie_in_the_region_of_most(shared):
    text = (shared / "v1" / "v1_population_statistics.json").read_text(encoding="utf-8")
    joint = json.loads(text)["nx_ny_joint_counts"]
    edges = torch.tensor(joint["bin_edges_log10"])
    middle = 10 ** ((edges[1:] + edges[:-1]) / 2)
    counts = torch.tensor(joint["counts"])
    inside = cortex.distance(middle[:, None], middle[None, :]) < cortex.reach(0.95)
    assert 0.85 < (counts * inside).sum() / counts.sum() <= 1.0
