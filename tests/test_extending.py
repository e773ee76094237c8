"""Components from outside the package, as docs/extending.md and the README show them."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
import torch
import yaml

from prlhf_lightning.cli.main import main
from prlhf_lightning.data import FileSource
from prlhf_lightning.policies import CausalLMPolicy

POLICY = '''
from prlhf_lightning import CausalLMPolicy, LogProbs


class TemperedPolicy(CausalLMPolicy):
    """Log-probabilities divided by a temperature."""

    def __init__(self, model: str, temperature: float = 2.0) -> None:
        super().__init__(model)
        self.temperature = temperature

    def log_probs(self, prompt, completions, soft_prompt=None):
        scores = super().log_probs(prompt, completions, soft_prompt)
        return tuple(LogProbs(score.tokens / self.temperature, score.mask) for score in scores)
'''


@pytest.fixture
def my_modules(repo_root, tmp_path, monkeypatch):
    """The guide's modules, importable; the README shows the loss as well."""
    guide, readme = ((repo_root / name).read_text() for name in ("docs/extending.md", "README.md"))
    blocks = [dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", text, re.DOTALL)) for text in (guide, readme)]
    sources = blocks[0]
    assert blocks[1] == {"my_losses": sources["my_losses"]}
    assert set(sources) == {"my_losses", "my_rl_losses", "my_users"}
    for name, code in {**sources, "my_policies": POLICY}.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_outside_loss_user_model_and_policy_train_by_class_path(my_modules, model_path, votes, tmp_path):
    main(
        ["fit", "--model.loss", "my_losses.SquaredHingeLoss", "--model.loss.beta", "0.5",
         "--model.user_model", "my_users.MyLowRankUserModel", "--model.user_model.rank", "2",
         "--model.policy", "my_policies.TemperedPolicy", "--model.policy.model", model_path,
         "--data.source", "FileSource", "--data.source.train", str(votes), "--data.validation_fraction", "0.2",
         "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu",
         "--trainer.default_root_dir", str(tmp_path / "runs")]
    )  # fmt: skip
    folder = tmp_path / "runs/version_0"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["user_model"] == {
        "class_path": "my_users.MyLowRankUserModel",
        "init_args": {"num_tokens": 4, "rank": 2},
    }
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    codes = state["user_model.codes.weight"]
    assert codes.shape == (5, 2)
    assert codes[1:].abs().sum() > 0
    assert not codes[0].any()


def test_outside_loss_of_online_rl_follows_its_equation(my_modules):
    loss = importlib.import_module("my_rl_losses").SoftGatedLoss(beta=0.0)
    log_probs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]])
    change, advantages = torch.tensor([[0.1, -0.2], [0.3, 0.0]]), torch.tensor([1.0, -2.0])
    mask = torch.ones(2, 2, dtype=torch.bool)
    found = loss(log_probs + change, log_probs, mask, advantages, denominator=2.0).loss
    gate = 4 / (1 + torch.exp(1 - change.exp()))
    torch.testing.assert_close(found, -(gate * advantages[:, None]).mean())


def test_the_readmes_python_trains(repo_root, model_path, votes, tmp_path, monkeypatch):
    readme = (repo_root / "README.md").read_text()
    (code,) = re.findall(r"```python\n(from lightning.*?)```", readme, re.DOTALL)
    code = code.replace("path/or/hub-name", model_path).replace("votes.jsonl", str(votes))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["model"].vocabulary.ids == ("ann", "bob", "cy", "dee")
    assert isinstance(names["policy"], CausalLMPolicy)
    assert isinstance(names["data"].source, FileSource)
