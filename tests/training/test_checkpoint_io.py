"""Checkpoints as a Trainer writes and loads them."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import zipfile
from itertools import pairwise

import pytest
import torch
from interrupted_runs import Crash
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet_trainer import quiet_trainer

from prlhf_lightning.cli.main import main
from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.errors import CheckpointWriteError, ConfigurationError, DamagedCheckpointError
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import ChecksummedCheckpointIO, Optim, PersonalizedLM, checkpoint_files
from prlhf_lightning.training.callbacks.outputs import SaveOnInterrupt
from prlhf_lightning.user_models import IndividualUserModel


def parts(model_path, **lora):
    policy = CausalLMPolicy(model_path, lora=LoRA(rank=2, **lora))
    return {"user_model": IndividualUserModel(2), "policy": policy, "loss": DPOLoss()}


def fit(model_path, votes, folder, *callbacks, ckpt_path=None, max_steps=2, lora=None, **kwargs) -> PersonalizedLM:
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, max_steps=max_steps, limit_val_batches=0, callbacks=list(callbacks), **kwargs)
    module = PersonalizedLM(**parts(model_path, **(lora or {})), optim=Optim(lr=1e-2, user_lr=0.1, warmup_steps=0))
    data = PreferenceDataModule(FileSource(str(votes)), tokenizer=model_path, batch_size=4)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.fixture
def checkpoint(model_path, votes, tmp_path):
    module = fit(model_path, votes, tmp_path, enable_checkpointing=False)
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def damage(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_a_trainer_without_a_way_of_its_own_writes_sealed_files(checkpoint, model_path, votes, tmp_path):
    assert zipfile.ZipFile(checkpoint).comment

    class Own(TorchCheckpointIO):
        pass

    module = fit(model_path, votes, tmp_path, enable_checkpointing=False, plugins=[Own()])
    assert type(module.trainer.strategy.checkpoint_io) is Own


def test_a_damaged_checkpoint_is_not_gone_on_from(checkpoint, model_path, votes, tmp_path):
    shutil.copy(checkpoint, tmp_path / "b.ckpt")
    damage(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=r"a.ckpt is damaged.*intact checkpoint beside it is .*b.ckpt"):
        fit(model_path, votes, tmp_path, ckpt_path=checkpoint, max_steps=3)
    fit(model_path, votes, tmp_path, ckpt_path=tmp_path / "b.ckpt", max_steps=3)


def test_a_damaged_checkpoint_is_not_loaded(checkpoint, model_path):
    assert PersonalizedLM.load_from_checkpoint(checkpoint, **parts(model_path)).vocabulary.ids
    damage(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=r"a.ckpt is damaged"):
        PersonalizedLM.load_from_checkpoint(checkpoint, **parts(model_path))


class Code:
    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return (os.mkdir, (self.proof,))


def test_code_in_a_checkpoint_with_a_right_seal_is_not_run(checkpoint, model_path, votes, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            evil = pickle.dumps(Code(tmp_path / "ran"), protocol=2)
            new.writestr(name, evil if name.endswith("data.pkl") else old.read(name))
    checkpoint_files.append_checksum(buffer)
    checkpoint.write_bytes(buffer.getvalue())
    checkpoint_files.check(checkpoint)
    with pytest.raises(DamagedCheckpointError, match="could run code"):
        fit(model_path, votes, tmp_path, ckpt_path=checkpoint, max_steps=3)
    with pytest.raises(pickle.UnpicklingError):
        PersonalizedLM.load_from_checkpoint(checkpoint, **parts(model_path))
    with pytest.raises(SystemExit, match="could run code"):
        main(["users", "list", "--model", str(checkpoint)])
    with pytest.raises(SystemExit, match="could run code"):
        main(["export", "--model", str(checkpoint), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "ran").exists()
    torch.load(checkpoint, weights_only=False)
    assert (tmp_path / "ran").exists()  # so that it could have been


def test_checkpoints_in_shards_are_left_to_lightning(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(TorchCheckpointIO, "load_checkpoint", lambda self, *args, **kwargs: asked.append(kwargs))
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda self, *args: asked.append(args[1]))
    ChecksummedCheckpointIO().load_checkpoint(tmp_path)
    ChecksummedCheckpointIO().save_checkpoint({}, "memory://a.ckpt")
    assert asked == [{"weights_only": True}, "memory://a.ckpt"]


class DiskFull(Callback):
    """The disk is full from some step on."""

    def __init__(self, monkeypatch, step):
        self.monkeypatch, self.step = monkeypatch, step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.monkeypatch.setattr(os, "fsync", self.fails)

    def fails(self, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_stops_training_and_keeps_the_checkpoint(model_path, votes, tmp_path, monkeypatch):
    every_step = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=1)
    callbacks = [DiskFull(monkeypatch, 2), every_step, SaveOnInterrupt()]
    says = r"last.ckpt could not be written: No space left on device. The old version is unchanged"
    with (
        pytest.raises(CheckpointWriteError, match=says),
        pytest.warns(UserWarning, match="Interrupted at step 3"),
    ):
        fit(model_path, votes, tmp_path, *callbacks, max_steps=5)
    monkeypatch.undo()
    assert os.listdir(tmp_path / "checkpoints") == ["last.ckpt"]
    assert checkpoint_files.load(tmp_path / "checkpoints/last.ckpt")["global_step"] == 2


def test_chance_goes_on_where_it_was(model_path, votes, tmp_path, monkeypatch):
    def run(folder, *callbacks, **kwargs):
        folder = tmp_path / folder
        monkeypatch.setenv("PRLHF_CACHE", str(folder / "cache"))
        return fit(model_path, votes, folder, *callbacks, max_steps=6, lora={"dropout": 0.3}, **kwargs)

    straight = run("straight")
    with pytest.raises(RuntimeError, match="crash"):
        run("crashed", SaveOnInterrupt(), Crash(3))
    torch.manual_seed(1)
    resumed = run("crashed", ckpt_path=tmp_path / "crashed/checkpoints/interrupted.ckpt")
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


FIXTURES = "tests/fixtures"


@pytest.fixture
def made(repo_root, tmp_path, monkeypatch):
    """The checkpoint of format 1, and the module that made it."""
    monkeypatch.syspath_prepend(repo_root / FIXTURES)
    import make_checkpoint

    shutil.copy(repo_root / FIXTURES / "format_1.ckpt", tmp_path)
    return tmp_path / "format_1.ckpt", make_checkpoint


def test_a_checkpoint_of_format_1_does_what_it_did(made, repo_root):
    path, make_checkpoint = made
    expected = json.loads((repo_root / FIXTURES / "format_1.json").read_text())
    module = PersonalizedLM.load_from_checkpoint(path)
    assert make_checkpoint.behavior(module) == pytest.approx(expected, abs=2e-3)
    values = sorted(expected.values())
    assert min(b - a for a, b in pairwise(values)) > 0.1  # users differ by far more than that


def test_a_run_of_format_1_goes_on(made, tmp_path):
    path, make_checkpoint = made
    more = [
        "--trainer.max_epochs=2",
        "--trainer.max_steps=6",
        "--ckpt_path",
        str(path),
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
    ]
    main([*make_checkpoint.COMMAND, *more])
    last = checkpoint_files.load(tmp_path / "runs/version_0/checkpoints/last.ckpt")
    assert last["global_step"] == 6
    assert last["prlhf_lightning"]["users"] == checkpoint_files.load(path)["prlhf_lightning"]["users"]


def test_the_users_of_format_1_are_listed(made, capsys):
    main(["users", "list", "--model", str(made[0])])
    assert "user-04" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"format": 2, "users": {"of": "another kind"}}, "has format 2.*reads formats up to 1.*Use the version that"),
        ({"format": 1, "users": [1, 2]}, "is not a list of ids"),
        ({"format": "1", "users": []}, "is not a list of ids"),
        ("users", "was not written by prlhf_lightning"),
    ],
)
def test_a_checkpoint_that_this_version_cannot_read_is_named(made, entry, says, tmp_path):
    path, make_checkpoint = made
    content = checkpoint_files.load(path)
    content["prlhf_lightning"] = entry
    checkpoint_files.save(content, path)
    for command in (
        [*make_checkpoint.COMMAND, "--ckpt_path", path, "--trainer.default_root_dir", tmp_path],
        ["export", "--model", path, "--output", tmp_path / "out"],
        ["users", "list", "--model", path],
    ):
        with pytest.raises(SystemExit, match=f"^error: .*format_1.ckpt: This checkpoint.*{says}"):
            main([*map(str, command)])
    with pytest.raises(ConfigurationError, match=says):
        PersonalizedLM.load_from_checkpoint(path)


def test_the_script_that_made_the_fixture_makes_the_same_again(made, repo_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "again").mkdir()
    made[1].write(tmp_path / "again")
    again, committed = (checkpoint_files.load(p / "format_1.ckpt") for p in (tmp_path / "again", repo_root / FIXTURES))
    assert again.keys() == committed.keys()
    assert again["state_dict"].keys() == committed["state_dict"].keys()
    entry, older = again["prlhf_lightning"], committed["prlhf_lightning"]
    came_later = {"base", "id_key", "means", "order", "place", "tokenization"}  # and need not be there
    assert entry.keys() - older.keys() == came_later
    assert older.keys() <= entry.keys()
