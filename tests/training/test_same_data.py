"""Processes that found different data do not train together."""

from types import SimpleNamespace

import pytest

from prlhf_lightning.data import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.training import settings_checks
from prlhf_lightning.training.settings_checks import check_same_data


@pytest.mark.parametrize(("rows", "ids"), [(8, ["ann", "bob"]), (7, ["ann", "cy"])])
def test_rows_or_users_that_one_process_alone_has_are_an_error(monkeypatch, rows, ids):
    def here(count):
        return SimpleNamespace(world_size=2, datamodule=SimpleNamespace(num_training_rows=count))

    seen = []
    monkeypatch.setattr(settings_checks, "gather_objects", lambda _, value: seen.append(value) or seen)
    check_same_data(here(7), UserVocabulary(["ann", "bob"]))
    with pytest.raises(ConfigurationError, match=r"found different training data.*set data\.source\.until"):
        check_same_data(here(rows), UserVocabulary(ids))
