"""What holds for every test, including the examples in docstrings."""

import os

import pytest

# Small tensors are slower with several threads than with one, and tests already run one process
# per core. The variable must be set before torch is imported; processes that tests start see it.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def reproducible() -> None:
    # Imported here, because the process that only hands out tests to others never needs it.
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
