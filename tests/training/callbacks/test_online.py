"""Online RL says when answers degenerate."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from prlhf_lightning.training.callbacks.online import OnlineMonitor

GOOD = {"length": 10.0, "truncated": 0.0, "entropy": 1.0, "without_spread": 0.5, "unscorable": 0.0}


def watch(values: list[dict[str, float]], monitor: OnlineMonitor) -> tuple[list[str], bool]:
    """Return the warnings about a run with these logged values, and whether it was stopped."""
    trainer = SimpleNamespace(log_every_n_steps=1, global_step=0, should_stop=False, callback_metrics={})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, found in enumerate(values, start=1):
            trainer.global_step = step
            trainer.callback_metrics = {f"train/{name}": value for name, value in {**GOOD, **found}.items()}
            monitor.on_train_batch_end(trainer, None, None, None, step)
    return [str(one.message) for one in caught], trainer.should_stop


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"length": 31.0}, "much longer"),
        ({"truncated": 0.4}, "max_new_tokens"),
        ({"entropy": 0.04}, "nearly the same answer"),
        ({"unscorable": 0.3}, "no reward"),
        ({"without_spread": 1.0}, "equal reward"),
    ],
)
def test_a_lasting_sign_is_told_once(bad, words):
    told, stopped = watch([{}] * 3 + [bad] * 6, OnlineMonitor())
    assert len(told) == 1
    assert "At step 6 " in told[0]
    assert words in told[0]
    assert not stopped


def test_a_single_bad_batch_is_no_sign():
    assert watch([{}] * 3 + [{"length": 50.0}, {}] * 3, OnlineMonitor()) == ([], False)


def test_a_sign_can_stop_the_run():
    assert watch([{}] * 3 + [{"length": 50.0}] * 3, OnlineMonitor(action="stop"))[1]


def test_a_resumed_monitor_goes_on():
    first, second = OnlineMonitor(), OnlineMonitor()
    assert watch([{}] * 3 + [{"length": 50.0}] * 2, first) == ([], False)
    second.load_state_dict(first.state_dict())
    assert len(watch([{"length": 50.0}], second)[0]) == 1
