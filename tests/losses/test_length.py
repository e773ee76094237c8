"""Length control in online RL."""

import pytest
import torch

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import overlong_penalty


def test_the_penalty_grows_linearly_over_the_buffer():
    found = overlong_penalty(torch.tensor([0, 6, 7, 9, 10, 12]), max_length=10, buffer=4)
    assert found.tolist() == [0, 0, -0.25, -0.75, -1, -1]


@pytest.mark.parametrize("buffer", [0, 11])
def test_an_impossible_buffer_is_refused(buffer):
    with pytest.raises(ConfigurationError, match="buffer"):
        overlong_penalty(torch.tensor([1]), max_length=10, buffer=buffer)
