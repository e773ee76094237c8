"""A short training that callbacks interrupt."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback
from quiet_trainer import quiet_trainer

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import Optim, PersonalizedLM
from prlhf_lightning.training.callbacks.outputs import SaveOnInterrupt
from prlhf_lightning.user_models import IndividualUserModel


class Crash(Callback):
    """Ends a run with an error after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


def fit(
    model_path, votes, folder, *callbacks: Callback, checkpoint=None, schedule="cosine", **options
) -> PersonalizedLM:
    torch.manual_seed(0)
    module = PersonalizedLM(
        IndividualUserModel(2),
        CausalLMPolicy(model_path, lora=LoRA(rank=2)),
        DPOLoss(),
        optim=Optim(lr=1e-2, user_lr=1e-1, warmup_steps=0, schedule=schedule),
    )
    data = PreferenceDataModule(FileSource(str(votes)), tokenizer=model_path, batch_size=4, validation_fraction=0.2)
    trainer = quiet_trainer(folder, callbacks=[SaveOnInterrupt(), *callbacks], **{"max_epochs": 2, **options})
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return module
