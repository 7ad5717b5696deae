"""The repository on the import path, one thread for tiny tensors, the same random numbers."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # more threads would only wait for each other

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
