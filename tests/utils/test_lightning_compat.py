"""What `utils/lightning_compat.py` takes from Lightning is there, and means what it is taken for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from quiet_trainer import quiet_trainer
from recording_logger import RecordingLogger
from torch.utils.data import DataLoader

import prlhf_lightning
from prlhf_lightning.utils import lightning_compat as compat

PACKAGE = Path(prlhf_lightning.__file__).parent


class Line(LightningModule):
    """A line through points; it notes what it is told before each step."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.from_config = compat.is_built_from_config()
        self.save_hyperparameters()
        self.line = torch.nn.Linear(width, 1)
        self.seen: list[tuple[bool, bool, bool]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        due = compat.is_validation_due(self.trainer)
        self.seen.append((compat.ends_optimizer_step(self.trainer), compat.logs_this_step(self.trainer), due))
        return self.line(batch).mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def points() -> DataLoader:
    return DataLoader(torch.randn(6, 1))


def test_the_last_step_of_an_accumulation_is_known_and_logged(tmp_path, points):
    module = Line()
    quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=2).fit(module, points)
    assert [ends for ends, _, _ in module.seen] == [False, True] * 3
    assert [logs for ends, logs, _ in module.seen if ends] == [False, True, False]


class Watch(Callback):
    """Notes, after each batch, whether a validation is due and whether there was one."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append((compat.is_validation_due(trainer), compat.has_validated(trainer)))


def test_a_validation_is_known_to_be_due_and_to_have_been(tmp_path, points):
    watch = Watch()
    trainer = quiet_trainer(tmp_path, max_epochs=1, val_check_interval=2, callbacks=[watch])
    trainer.fit(Line(), points, points)
    assert watch.seen == [(False, False), (True, False), (False, True), (True, True), (False, True), (True, True)]


def test_a_module_has_no_trainer_before_it_is_trained(tmp_path, points):
    module, trainer = Line(), quiet_trainer(tmp_path, max_epochs=1)
    assert compat.trainer_of(module) is None
    trainer.fit(module, points)
    assert compat.trainer_of(module) is trainer


def test_a_module_is_rebuilt_from_the_content_of_a_checkpoint(tmp_path, points):
    module, trainer = Line(1), quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, points)
    compat.save_checkpoint_alone(trainer, tmp_path / "alone.ckpt")
    again = compat.load_from_content(Line, torch.load(tmp_path / "alone.ckpt", weights_only=False))
    assert torch.equal(again.line.weight, module.line.weight)
    assert not again.from_config


def test_a_module_can_be_told_its_device():
    module = Line()
    compat.set_device(module, torch.device("meta"))
    assert module.device == torch.device("meta")
    assert module.line.weight.device == torch.device("cpu")


@pytest.mark.parametrize(("devices", "setting", "replaces"), [(1, True, False), (2, True, True), (2, False, False)])
def test_only_a_trainer_of_several_processes_replaces_samplers(tmp_path, devices, setting, replaces):
    options = {"strategy": "ddp"} if devices > 1 else {}
    trainer = quiet_trainer(tmp_path, devices=devices, use_distributed_sampler=setting, **options)
    assert compat.replaces_sampler(trainer) == replaces


def test_callback_metrics_can_be_added_to(tmp_path):
    trainer = quiet_trainer(tmp_path)
    compat.set_callback_metrics(trainer, {"val/accuracy": torch.tensor(0.5)})
    assert trainer.callback_metrics == {"val/accuracy": torch.tensor(0.5)}


def test_a_checkpoint_is_restored_within_a_context(tmp_path, points):
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(Line(), points)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    entered: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        entered.append(str(trainer.ckpt_path))
        yield

    trainer = quiet_trainer(tmp_path, max_epochs=2)
    compat.wrap_restoring(trainer, context)
    trainer.fit(Line(), points, ckpt_path=tmp_path / "one.ckpt")
    assert str(tmp_path / "one.ckpt") in entered  # the state of the loops among it
    assert len(entered) == 3


def test_what_a_step_logged_can_be_passed_on(tmp_path, monkeypatch, points):
    class Logs(Line):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = self.line(batch).mean()
            self.log("loss", loss)
            return loss

        def on_train_batch_end(self, *_: object) -> None:
            compat.log_training_step(self.trainer)

    monkeypatch.chdir(tmp_path)  # the logger has no folder of its own, so checkpoints go into the current one
    logger = RecordingLogger()
    quiet_trainer(tmp_path, max_epochs=1, log_every_n_steps=1, logger=logger).fit(Logs(), points)
    assert len(logger.values["loss"]) == 12  # by Lightning, and by us


def test_no_other_module_uses_private_parts_of_lightning():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "lightning_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], path
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                assert "trainer" not in owner, f"{path}: {owner}.{node.attr}"
