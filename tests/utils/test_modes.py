"""Evaluation mode and back."""

import pytest
from torch import nn

from prlhf_lightning.utils.modes import eval_mode


def modes(module):
    return [part.training for part in module.modules()]


def test_each_part_returns_to_its_own_mode_also_after_an_error():
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    module[1][0].eval()

    @eval_mode(module)
    def fail():
        assert not any(modes(module))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert modes(module) == [True, True, True, False, True]
