"""Rows of users at the end of a training: moved where held-out pairs contradict them, untouched otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_votes
from lightning.pytorch import Callback, Trainer
from quiet_trainer import quiet_trainer
from torch.nn import functional as F

from prlhf_lightning.adaptation import ShrinkUsers, fit_shrinkage, shrink_users
from prlhf_lightning.adaptation.shrink_users import most_likely
from prlhf_lightning.cli.adapt import read_pairs
from prlhf_lightning.data import FileSource, PreferenceDataModule
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import Optim, PersonalizedLM, checkpoint_files
from prlhf_lightning.training.callbacks.outputs import BestAndLast
from prlhf_lightning.training.user_rows import UserRows
from prlhf_lightning.user_models import IndividualUserModel

USERS = [f"user{i}" for i in range(8)]


class Rows(Callback):
    """Changes the rows before each validation, and logs the epoch, so that the first is the best.

    Args:
        noise: Standard deviation of what is added.
        scale: What the rows are multiplied with.
    """

    def __init__(self, noise: float = 2.0, scale: float = 1.0) -> None:
        self.noise, self.scale = noise, scale

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.is_last_batch:
            (table,) = pl_module.user_model.row_tables()
            table[1:] = self.scale * table[1:] + self.noise * torch.randn_like(table[1:])

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/epoch", float(trainer.current_epoch))


def held_out(folder: Path) -> Path:
    return write_votes(folder / "held_out.jsonl", dict.fromkeys(USERS, 24), seed=1)


def parts(model_path: str) -> dict[str, Any]:
    policy = CausalLMPolicy(model_path, lora=LoRA(rank=2))
    return {"user_model": IndividualUserModel(2), "policy": policy, "loss": DPOLoss(beta=1.0)}


def train(
    model_path: str, folder: Path, *callbacks: Callback, epochs: int = 2, resumed: Path | None = None
) -> tuple[PersonalizedLM, Trainer, dict[str, Path]]:
    """Train eight users; return the module, its trainer and the kept checkpoints by name."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    optim = Optim(lr=1e-2, user_lr=1e-1, warmup_steps=0, schedule="constant")
    module = PersonalizedLM(**parts(model_path), optim=optim)
    votes = write_votes(folder / "votes.jsonl", dict.fromkeys(USERS, 12))
    data = PreferenceDataModule(FileSource(votes, validation=held_out(folder)), model_path, batch_size=8)
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=[*callbacks, BestAndLast("val/epoch")])
    trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    return module, trainer, kept(folder)


def kept(folder: Path) -> dict[str, Path]:
    return {path.stem.partition("-")[0]: path for path in folder.glob("checkpoints/*.ckpt")}


def content(path: Path) -> dict:
    return checkpoint_files.load(path)


def rows(content: dict) -> torch.Tensor:
    return UserRows(content).vectors()


@pytest.fixture(scope="module")
def plain(model_path, tmp_path_factory):
    return train(model_path, tmp_path_factory.mktemp("plain"), Rows())[2]


@pytest.fixture
def shrunk(model_path, tmp_path):
    return train(model_path, tmp_path, Rows(), ShrinkUsers())


def test_noisy_rows_end_more_likely_in_every_kept_file(plain, shrunk, model_path, tmp_path):
    module, _, files = shrunk
    assert files.keys() == {"best", "last"}
    assert content(files["best"])["global_step"] < content(files["last"])["global_step"]
    for name, path in files.items():
        before, after = content(plain[name]), content(path)
        factor = after["prlhf_lightning"].pop("shrunk")
        raw = PersonalizedLM.load_from_checkpoint(plain[name], **parts(model_path))
        pairs, _ = read_pairs(raw, FileSource(held_out(tmp_path)))
        found = fit_shrinkage(raw, pairs, (0.0, factor, 1.0))
        assert 0 < factor < 1
        assert found.place == 1  # pairs are more likely than with the generic user, and than with the trained rows
        table = before["state_dict"]["user_model.offsets.weight"]
        table[1:] = torch.lerp(table[:1], table[1:], factor)
        assert all(torch.equal(after["state_dict"][name], weight) for name, weight in before["state_dict"].items())
        assert after["prlhf_lightning"].keys() == before["prlhf_lightning"].keys()
    weights = module.state_dict()
    assert all(torch.equal(weights[name], one) for name, one in content(files["last"])["state_dict"].items())


def test_metrics_are_those_of_the_moved_rows(shrunk):
    module, trainer, files = shrunk
    known = dict(trainer.callback_metrics)
    quiet = quiet_trainer(Path(trainer.default_root_dir))
    (found,) = quiet.validate(module, trainer.datamodule, ckpt_path=files["last"], verbose=False, weights_only=True)
    assert found.keys() <= known.keys()
    for name, value in found.items():
        assert float(known[name]) == pytest.approx(value, abs=1e-6)


def test_rows_that_held_out_pairs_confirm_stay(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(shrink_users, "margins_by_factor", lambda *_: pytest.fail("scored pairs"))
    _, _, plain = train(model_path, tmp_path / "a", Rows(0, 0.1))
    _, _, files = train(model_path, tmp_path / "b", Rows(0, 0.1), ShrinkUsers())
    for name, path in files.items():
        before, after = content(plain[name]), content(path)
        assert "shrunk" not in after["prlhf_lightning"]
        assert all(torch.equal(after["state_dict"][name], weight) for name, weight in before["state_dict"].items())


def test_a_kill_between_two_files_leaves_both_whole(plain, model_path, tmp_path, monkeypatch):
    def save_once(*args, **kwargs):
        monkeypatch.setattr(shrink_users.checkpoint_files, "save", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        original(*args, **kwargs)

    original = checkpoint_files.save

    class Arm(ShrinkUsers):
        def on_train_end(self, trainer, pl_module):
            monkeypatch.setattr(shrink_users.checkpoint_files, "save", save_once)
            super().on_train_end(trainer, pl_module)

    with pytest.raises(MemoryError):
        train(model_path, tmp_path, Rows(), Arm())
    files = kept(tmp_path)
    assert "shrunk" in content(files["best"])["prlhf_lightning"]
    assert torch.equal(rows(content(files["last"])), rows(content(plain["last"])))


def test_training_goes_on_and_a_file_is_shrunk_once(model_path, shrunk, tmp_path):
    _, _, files = shrunk
    best = rows(content(files["best"]))
    before = files["last"].read_bytes()
    _, trainer, again = train(model_path, tmp_path, Rows(), ShrinkUsers(), epochs=3, resumed=files["last"])
    assert trainer.current_epoch == 3
    assert torch.equal(rows(content(again["best"])), best)
    assert again["last"].read_bytes() != before
    assert content(again["last"])["prlhf_lightning"]["shrunk"] < 1


def test_a_factor_is_found_between_those_tried():
    torch.manual_seed(0)
    generic, own = torch.randn(2, 5000, dtype=torch.double)
    chosen = torch.rand(5000) < (generic + 0.4 * own).sigmoid()  # rows are 2.5 times too far
    signs = torch.where(chosen, 1.0, -1.0)
    margins = torch.stack([generic, generic + own]) * signs
    grid = [i / 100 for i in range(101)]
    best = max(grid, key=lambda f: float(F.logsigmoid(torch.lerp(margins[0], margins[1], f)).sum()))
    assert most_likely((0.0, 1.0), margins) == pytest.approx(best, abs=0.026)
    assert most_likely((0.0, 1.0), margins[:, :20]) == 1.0  # so few pairs are no evidence
    assert most_likely((0.0, 1.0), margins * float("nan")) == 1.0
