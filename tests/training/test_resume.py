"""A checkpoint that was saved at the end of an epoch goes on with the next."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet_trainer import quiet_trainer

from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import Optim, PersonalizedLM
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


# ---- another end, other settings, other data


def go(model_path, votes, folder, ckpt_path=None, data=None, **kwargs) -> Watched:
    keeps = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = quiet_trainer(folder, **{"max_epochs": 2, "callbacks": [keeps], **kwargs})
    torch.manual_seed(0)
    policy = CausalLMPolicy(model_path, lora=LoRA(rank=2))
    module = Watched(IndividualUserModel(2), policy, DPOLoss(), optim=Optim(lr=1e-2, user_lr=0.1, schedule="constant"))
    options = {"batch_size": 4, "validation_fraction": 0.2, **(data or {})}
    datamodule = PreferenceDataModule(FileSource(str(votes)), tokenizer=model_path, **options)
    trainer.fit(module, datamodule, ckpt_path=ckpt_path)
    return module


def rows_of(module: Watched, epoch: int = 0) -> list[int]:
    return sorted(row for number, _, rows in module.seen if number == epoch for row in rows)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_epoch_cut_short_by_max_steps_is_trained_to_its_end(model_path, votes, tmp_path, accumulate):
    how = {"accumulate_grad_batches": accumulate}
    straight = go(model_path, votes, tmp_path / "straight", **how)
    stopped = go(model_path, votes, tmp_path / "stopped", max_steps=2, **how)
    stopped.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = go(model_path, votes, tmp_path / "resumed", tmp_path / "stopped.ckpt", **how)
    assert stopped.seen + resumed.seen == straight.seen
    assert resumed.trainer.global_step == straight.trainer.global_step
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


CHANGES = {
    "batch size": ({"batch_size": 8}, {}, "data.batch_size was 4 and is 8"),
    "uneven batch size": ({"batch_size": 5}, {}, "data.batch_size was 4 and is 5"),
    "accumulation": ({}, {"accumulate_grad_batches": 4}, "trainer.accumulate_grad_batches was 1 and is 4"),
    "order by user": ({"pairs_per_user": 3}, {}, "data.pairs_per_user was 1 and is 3"),
    "bucketed": ({"bucket_by_length": True}, {}, "data.bucket_by_length was False and is True"),
    "budget": ({"max_tokens_per_batch": 120}, {}, "data.max_tokens_per_batch was None and is 120"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_under_other_settings_the_remaining_rows_train_once(model_path, votes, tmp_path, change):
    data, options, told = CHANGES[change]
    straight = go(model_path, votes, tmp_path, max_epochs=1)
    trained = [row for _, batch, rows in straight.seen if batch < 4 for row in rows]
    with pytest.warns(UserWarning, match=told):
        resumed = go(model_path, votes, tmp_path / "resumed", tmp_path / "step=4.ckpt", data, **options)
    assert sorted([*trained, *rows_of(resumed)]) == rows_of(straight)
    assert rows_of(resumed, epoch=1) == rows_of(straight)


def test_another_seed_of_the_data_leaves_out_what_was_trained(model_path, votes, tmp_path):
    straight = go(model_path, votes, tmp_path, max_epochs=1)
    trained = {row for _, batch, rows in straight.seen if batch < 4 for row in rows}
    with pytest.warns(UserWarning, match="data.seed was 0 and is 1"):
        resumed = go(model_path, votes, tmp_path / "resumed", tmp_path / "step=4.ckpt", {"seed": 1})
    assert not trained & set(rows_of(resumed))
    assert len(rows_of(resumed)) == len(set(rows_of(resumed)))
    assert set(rows_of(resumed, epoch=1)) == trained & set(rows_of(resumed, epoch=1)) | set(rows_of(resumed))


def test_settings_that_change_twice_in_an_epoch_lose_no_row(model_path, votes, tmp_path):
    straight = go(model_path, votes, tmp_path, max_epochs=1)
    trained = [row for _, batch, rows in straight.seen if batch < 2 for row in rows]
    second = go(model_path, votes, tmp_path / "second", tmp_path / "step=2.ckpt", {"batch_size": 3}, max_epochs=1)
    trained += [row for _, _, rows in second.seen[:2] for row in rows]
    third = go(model_path, votes, tmp_path / "third", tmp_path / "second/step=4.ckpt", {"batch_size": 5}, max_epochs=1)
    assert sorted([*trained, *rows_of(third)]) == rows_of(straight)
    rest = go(model_path, votes, tmp_path / "rest", tmp_path / "second/step=4.ckpt", {"batch_size": 3}, max_epochs=1)
    assert rest.seen == second.seen[2:]


def test_other_rows_are_told(model_path, votes, tmp_path):
    go(model_path, votes, tmp_path, max_epochs=1)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(votes.read_text().splitlines(keepends=True)[:40]))
    with pytest.warns(UserWarning, match=r"the training data changed \(\d+ rows then, \d+ now\).*--init_from"):
        go(model_path, fewer, tmp_path / "resumed", tmp_path / "step=4.ckpt")


def test_other_texts_of_the_same_lengths_are_told(model_path, votes, tmp_path):
    go(model_path, votes, tmp_path, max_epochs=1)
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (other := tmp_path / "turned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    with pytest.warns(UserWarning, match="have other texts.*--init_from"):
        go(model_path, other, tmp_path / "resumed", tmp_path / "step=4.ckpt", max_steps=5)


def test_other_settings_are_told_at_an_epochs_end_too(model_path, votes, tmp_path):
    stopped = go(model_path, votes, tmp_path, max_epochs=1)
    stopped.trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.warns(UserWarning, match="data.batch_size was 4 and is 8. The following epochs"):
        resumed = go(model_path, votes, tmp_path / "resumed", tmp_path / "end.ckpt", {"batch_size": 8})
    assert rows_of(resumed, epoch=1) == rows_of(stopped)
    assert not rows_of(resumed)
