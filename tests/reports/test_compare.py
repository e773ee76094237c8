"""What simulated users are shown by the models that are compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prlhf_lightning.data import PreferenceDataModule, SimulatedSource
from prlhf_lightning.policies import CausalLMPolicy
from prlhf_lightning.reports.comparison import write


class Recorder(nn.Module):
    """Stands for a model, and keeps what it is asked."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.asked = []

    def generate(self, prompt, user_ids, user_text, sampling):
        self.asked += zip(user_ids, user_text or [""] * len(user_ids), strict=True)
        return ["ok"] * len(prompt)


@pytest.mark.parametrize("user_text", [True, False])
def test_models_are_told_what_users_say_about_themselves(tmp_path, user_text):
    source = SimulatedSource(num_users=4, pairs_per_user=2, num_unseen_users=0, user_text=user_text)
    model, users = Recorder(), source.seen_users
    data = PreferenceDataModule(source, CausalLMPolicy("builtin:style-lm").tokenizer, cache_dir=tmp_path)
    answers = write(model, data, [(user, "What helps to sleep better?") for user in users], source)
    assert answers == ["ok"] * 4
    assert model.asked == [(user.user_id, user.stated_preference() if user_text else "") for user in users]
