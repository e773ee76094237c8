"""Reward models whose language model is trained, with users as soft prompts."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import write_votes
from lightning.pytorch import Callback
from short_runs import fit, run_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prlhf_lightning.cli.main import main
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import BradleyTerryLoss, CPOLoss, DPOLoss, ORPOLoss, SFTLoss, SimPOLoss
from prlhf_lightning.policies import LoRA, RewardPolicy
from prlhf_lightning.rewards import RewardBackbone
from prlhf_lightning.training import PersonalizedLM, PersonalizedRewardModel, checkpoint_files, load_scorer
from prlhf_lightning.types import PreferenceBatch, Tokens
from prlhf_lightning.user_models import IndividualUserModel, UniformUserModel

PAIRS = [
    ("ann", [1, 5, 6, 7, 8, 9], [10, 11, 2], [12, 2]),
    ("bob", [1, 5, 6, 7, 8, 9], [12, 2], [10, 11, 2]),
    ("ann", [1, 13], [14, 15, 16, 17, 2], [18, 2]),
    ("stranger", [1, 19, 20], [21, 2], [22, 23, 2]),
]


def batch_of(pairs) -> PreferenceBatch:
    users, *parts = zip(*pairs, strict=True)
    prompt, chosen, rejected = (Tokens.from_lists(part) for part in parts)
    nothing = Tokens.from_lists([[]] * len(pairs))
    return PreferenceBatch(users, nothing, prompt, chosen, rejected, torch.arange(len(pairs)))


def make(path, user_model=None, loss=None, alpha=0.6, lora=LoRA(rank=4)) -> PersonalizedLM:  # noqa: B008
    users = IndividualUserModel(2) if user_model is None else user_model
    module = PersonalizedLM(users, RewardPolicy(path, lora=lora), loss or BradleyTerryLoss(), alpha=alpha)
    module.vocabulary = UserVocabulary(["ann", "bob"])
    module.configure_model()
    torch.nn.init.normal_(module.policy.head.weight)
    for table in module.user_model.row_tables():
        torch.nn.init.normal_(table.data[1:], std=0.5)
    return module


def gradients(module, loss) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: param.grad.to_dense().clone() for name, param in module.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_without_users_loss_and_gradients_are_those_of_trl(model_path, coefficient):
    trainer = pytest.importorskip("trl").RewardTrainer
    module = make(model_path, UniformUserModel(0), BradleyTerryLoss(center_rewards_coefficient=coefficient), lora=None)
    theirs = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1)
    theirs.model.load_state_dict(AutoModelForCausalLM.from_pretrained(model_path).model.state_dict())
    theirs.score.weight.data.copy_(module.policy.head.weight)
    rows = Tokens.from_lists([prompt + pair[side] for side in (0, 1) for _, prompt, *pair in PAIRS])
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=coefficient or None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {"input_ids": rows.ids, "attention_mask": rows.mask.long()}
    expected = trainer.compute_loss(stub, theirs, inputs)
    losses, _ = module.objective(batch_of(PAIRS))
    torch.testing.assert_close(losses.mean(), expected)
    ours = gradients(module, losses.mean())
    expected.backward()
    own = {f"policy.model.{name}": param.grad for name, param in theirs.named_parameters()}
    own["policy.head.weight"] = own.pop("policy.model.score.weight")
    assert ours.keys() == own.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_pair_has_the_same_loss_and_gradient_in_any_batch(model_path):
    module = make(model_path)
    together, _ = module.objective(batch_of(PAIRS))
    apart = torch.cat([module.objective(batch_of([pair]))[0] for pair in PAIRS])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    of_all, of_each = gradients(module, together.sum()), gradients(module, apart.sum())
    assert of_all.keys() == of_each.keys()
    for name, gradient in of_all.items():
        torch.testing.assert_close(gradient, of_each[name], rtol=1e-3, atol=1e-4)


def test_users_rank_differently_and_strangers_as_nobody(model_path):
    module = make(model_path)
    pair = PAIRS[0][1:]
    ann, bob, stranger = (module.rewards(batch_of([(user, *pair)]))[0] for user in ("ann", "bob", "nobody"))
    assert (ann - bob).abs() > 1e-3
    torch.testing.assert_close(stranger, module.rewards(batch_of([("ann", *pair)]), generic=True)[0])


@pytest.mark.parametrize("loss", [DPOLoss(), ORPOLoss(), SFTLoss(), SimPOLoss(), CPOLoss()])
def test_losses_of_log_probabilities_are_refused(model_path, loss):
    with pytest.raises(ConfigurationError, match=f"model.loss is {type(loss).__name__}.*BradleyTerryLoss"):
        PersonalizedLM(UniformUserModel(0), RewardPolicy(model_path), loss)


def test_centering_is_refused_where_it_would_do_nothing(model_path):
    with pytest.raises(ConfigurationError, match="center_rewards_coefficient has no effect"):
        PersonalizedRewardModel(
            UniformUserModel(1), RewardBackbone(model_path), loss=BradleyTerryLoss(center_rewards_coefficient=0.1)
        )


@pytest.fixture(scope="module")
def run(model_path, tmp_path_factory):
    """The checkpoint of a run of the command line, in the run's folder."""
    folder = tmp_path_factory.mktemp("reward_policy")
    train, held_out = (write_votes(folder / f"{n}.jsonl", {"ann": 60, "bob": 60}, seed=n) for n in (0, 1))
    content = run_config(folder, {"model": model_path, "lora": {"rank": 4}}, train)
    content["data"]["source"]["init_args"]["validation"] = str(held_out)
    content["trainer"] |= {"max_epochs": 2, "log_every_n_steps": 1}
    content["data"]["batch_size"] = 4
    content["model"]["policy"]["class_path"] = "RewardPolicy"
    content["model"]["loss"] = "BradleyTerryLoss"
    content["model"]["optim"] = {"lr": 0.01, "user_lr": 0.1, "warmup_steps": 0}
    return fit(folder, content)


def test_a_checkpoint_holds_adapters_users_and_the_trained_head(run):
    weights = checkpoint_files.load(run)["state_dict"]
    assert {name.split(".")[0] for name in weights} == {"policy", "user_model"}
    assert all("lora_" in name or name == "policy.head.weight" for name in weights if name.startswith("policy."))
    assert weights["policy.head.weight"].abs().mean() > 2 / 32  # a start has 1 / 33


def test_a_scorer_gives_each_user_the_rewards_of_the_model(run):
    scorer = load_scorer(run)
    texts = (["the cat", "the cat"], ["dog ran fast slow red", "sun"])
    rewards = {user: scorer.score([user] * 2, *texts) for user in ("ann", "bob")}
    # Ann likes short answers, and Bob long ones.
    assert rewards["ann"][0] < rewards["ann"][1]
    assert rewards["bob"][0] > rewards["bob"][1]


def test_the_log_names_rewards_and_no_log_probabilities(run):
    header = (run.parent.parent / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/chosen_rewards", "train/rejected_rewards"} <= set(header)
    assert not [name for name in header if "log_prob" in name or "log_ratio" in name or "generated" in name]


@pytest.mark.parametrize("command", ["generate", "export", "serve"])
def test_commands_that_need_a_writer_say_so(run, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the server makes its database there
    options = {
        "generate": ["--model", run, "--user", "ann", "--prompt", "the cat"],
        "export": ["--model", run, "--output", tmp_path / "out"],
        "serve": ["--model", run],
    }[command]
    with pytest.raises(SystemExit) as end:
        main([command, *map(str, options)])
    assert "is a reward model (RewardPolicy)" in str(end.value)


def test_it_learns_new_users(run, tmp_path):
    new = write_votes(tmp_path / "new.jsonl", {"cy": 12}, seed=2)
    main(["adapt", "--model", str(run), "--feedback", str(new), "--output", str(tmp_path / "more.ckpt")])
    assert load_scorer(tmp_path / "more.ckpt").knows("cy")


def test_a_run_that_goes_on_ends_with_the_same_weights(run, tmp_path):
    content = yaml.safe_load((run.parent.parent.parent.parent / "config.yaml").read_text())
    content["trainer"]["default_root_dir"] = str(tmp_path / "runs")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    words = ["fit", "-c", str(tmp_path / "config.yaml")]
    main([*words, "--trainer.callbacks+", f"{__name__}.Stop"])
    main([*words, "--ckpt_path", "last"])
    last = max(tmp_path.glob("runs/*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    expected, found = (checkpoint_files.load(path)["state_dict"] for path in (run, last))
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


class Stop(Callback):
    """Ends the training within the second epoch."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 40
