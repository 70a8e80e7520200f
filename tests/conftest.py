"""What all tests share."""

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("laws", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("laws")


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whichever tests run before it."""
    torch.manual_seed(0)
