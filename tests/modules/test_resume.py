"""A checkpoint that was saved at the end of an epoch goes on with the next."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet_trainer import quiet_trainer

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.modules import Optim, PersonalizedLM
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.user_models import IndividualUserModel


class Watched(PersonalizedLM):
    """Notes what it is trained on."""

    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), (self.current_epoch, batch_idx, batch.records.tolist())]
        return super().training_step(batch, batch_idx)


def fit(model_path, votes, folder, ckpt_path=None, **kwargs) -> Watched:
    keeps_all = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = quiet_trainer(folder, max_epochs=3, callbacks=[keeps_all], **kwargs)
    torch.manual_seed(0)
    policy = CausalLMPolicy(model_path, lora=LoRA(rank=2))
    optim = Optim(lr=1e-2, user_lr=0.1, warmup_steps=0)
    module = Watched(IndividualUserModel(2), policy, DPOLoss(), optim=optim)
    data = PreferenceDataModule(FileSource(str(votes)), tokenizer=model_path, batch_size=8, validation_fraction=0.2)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("max_steps", [-1, 13])
@pytest.mark.parametrize(
    "kwargs",
    [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}, {}, {"accumulate_grad_batches": 2}],
    ids=["never validated", "every other epoch", "every epoch", "accumulated"],
)
def test_the_next_epoch_is_trained_in_full(model_path, votes, tmp_path, kwargs, max_steps):
    kwargs = {**kwargs, "max_steps": max_steps}
    straight = fit(model_path, votes, tmp_path / "straight", **kwargs)
    paths = sorted((tmp_path / "straight").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    for epoch, path in enumerate(paths[:-1], start=1):
        resumed = fit(model_path, votes, tmp_path / "resumed", path, **kwargs)
        assert resumed.seen == [step for step in straight.seen if step[0] >= epoch]
        assert resumed.trainer.global_step == straight.trainer.global_step
        for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b), name
