"""New users of a small model whose trained users want opposite things."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import write_votes
from devices import PretendedGPU
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from prlhf_lightning.adaptation import (
    Margins,
    Shrinkage,
    UserPrior,
    adapt_users,
    cold_start,
    fit_prior,
    fit_shrinkage,
    select_pairs,
    suggest,
    trained_rows,
)
from prlhf_lightning.adaptation.adapt import _Layout, _under_each_kind
from prlhf_lightning.adaptation.margins import DistinctTexts
from prlhf_lightning.cli.adapt import read_pairs, write_users
from prlhf_lightning.cli.checkpoints import read_checkpoint
from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.models import load_module, module_of
from prlhf_lightning.data import FileSource, PreferenceDataModule, Pseudonyms, UserVocabulary
from prlhf_lightning.data.feedback_log import Feedback, FeedbackLog
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.losses import DPOLoss, KTOLoss, SFTLoss, SimPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import Optim, PersonalizedLM, checkpoint_files
from prlhf_lightning.training.user_rows import UserRows
from prlhf_lightning.types import Tokens
from prlhf_lightning.user_models import (
    AmortizedUserModel,
    ClusterUserModel,
    CompositeUserModel,
    IndividualUserModel,
    LowRankUserModel,
    TextUserModel,
    UniformUserModel,
)

USER_MODELS = {
    "individual": lambda: IndividualUserModel(2),
    "cluster": lambda: ClusterUserModel(3, 2),
    "low rank": lambda: LowRankUserModel(2, 2),
    "composite": lambda: CompositeUserModel([IndividualUserModel(1), TextUserModel(), ClusterUserModel(2, 1)]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapt")


@pytest.fixture(scope="module", params=USER_MODELS)
def model(request, model_path, folder):
    """A model after one epoch over eight users, of whom every other one likes long answers."""
    torch.manual_seed(0)
    policy = CausalLMPolicy(model_path, lora=LoRA(rank=4))
    optim = Optim(lr=1e-2, user_lr=1e-1, warmup_steps=0)
    module = PersonalizedLM(USER_MODELS[request.param](), policy, DPOLoss(), optim=optim, cache_reference=False)
    votes = write_votes(folder / "votes.jsonl", {f"user{i}": 12 for i in range(8)})
    data = PreferenceDataModule(FileSource(votes), policy.tokenizer, batch_size=8, cache_dir=folder / "cache")
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "model.ckpt")
    return module.eval()


@pytest.fixture
def pairs(model, folder):
    return read_pairs(model, FileSource(write_votes(folder / "new.jsonl", {"long": 9, "short": 6}, seed=5)))[0]


def test_without_pairs_a_user_is_the_generic_one_bit_by_bit(model, pairs):
    found = adapt_users(model, pairs, ("short", "nobody", "long"), steps=1)
    assert torch.equal(found.rows[1], trained_rows(model)[1])
    assert not torch.equal(found.rows[0], found.rows[1])
    assert found.counts.tolist() == [6, 0, 9]
    nobody = adapt_users(model, select_pairs(pairs, torch.tensor([], dtype=torch.long)), ("nobody",), found.prior)
    assert torch.equal(nobody.rows[0], trained_rows(model)[1])


def test_pairs_of_users_who_are_not_named_are_refused_by_name(model, pairs):
    with pytest.raises(ConfigurationError, match="user_ids: 'long' has pairs and is not among them"):
        adapt_users(model, pairs, ("short", "nobody"))
    with pytest.raises(ConfigurationError, match="an id is repeated"):
        adapt_users(model, pairs, ("short", "long", "short"))


def test_many_users_at_once_equal_one_by_one(model, pairs):
    prior = fit_prior(model, pairs)
    together = adapt_users(model, pairs, prior=prior, steps=1, batch_size=4)
    for place, user_id in enumerate(together.user_ids):
        own = torch.tensor([i for i, owner in enumerate(pairs.user_ids) if owner == user_id])
        alone = adapt_users(model, select_pairs(pairs, own), prior=prior, steps=1)
        torch.testing.assert_close(together.rows[place], alone.rows[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.covariance[place], alone.covariance[0], atol=2e-3, rtol=0)


def test_gradients_are_those_of_each_pair_alone(model, pairs):
    margins_of = Margins(model, pairs)
    rows, _ = trained_rows(model)
    rows = rows[torch.arange(len(pairs)) % len(rows)]  # each pair's own
    of, directions = torch.arange(len(pairs)), 1e-2 * torch.randn(3, rows.shape[1])
    margins, slopes = margins_of.along(directions, rows, of)
    torch.testing.assert_close(margins, margins_of(rows, of))
    for direction, slope in zip(directions, slopes.T, strict=True):
        change = (margins_of(rows + direction, of) - margins_of(rows - direction, of)) / 2
        torch.testing.assert_close(change, slope, atol=2e-4, rtol=0.05)


def test_passes_in_parts_stay_in_the_limit_and_give_the_same(model, pairs, monkeypatch):
    directions, (rows, _) = torch.randn(2, trained_rows(model)[0].shape[1]), trained_rows(model)
    of, passes = torch.arange(len(pairs)) % len(rows), []
    log_probs = CausalLMPolicy.log_probs

    def counting(policy, prompt, completions, soft_prompt):
        longest = max(part.mask.shape[1] for part in completions)
        passes.append(len(prompt) * (soft_prompt.mask.shape[1] + prompt.mask.shape[1] + longest))
        return log_probs(policy, prompt, completions, soft_prompt)

    margins_of = Margins(model, pairs)
    together = margins_of.along(directions, rows, of)
    monkeypatch.setattr("prlhf_lightning.adaptation.margins._POSITIONS_WITH_GRADIENT", 50)
    monkeypatch.setattr(CausalLMPolicy, "log_probs", counting)
    apart = margins_of.along(directions, rows, of)
    assert len(passes) > 3
    assert max(passes) <= 50
    torch.testing.assert_close(apart, together)


def test_margins_are_the_objectives_whichever_answer_is_longer(model, pairs, folder):
    likes_long = read_pairs(model, FileSource(write_votes(folder / "likes_long.jsonl", {"x": 4})))[0]
    likes_short = replace(likes_long, chosen=likes_long.rejected, rejected=likes_long.chosen)
    for batch in (pairs, likes_long, likes_short):
        with torch.no_grad():
            (_, generic) = model.objective(batch, every_term=True)[1]
        found = Margins(model, batch, batch_size=3)(trained_rows(model)[1])
        torch.testing.assert_close(found, generic.margins, atol=1e-4, rtol=1e-4)


def test_added_untrained_users_do_not_count_in_the_prior(model, pairs):
    expected, tables = fit_prior(model, pairs), model.user_model.row_tables()
    whole = [table.data for table in tables]
    for table, new in zip(tables, model.user_model.new_rows(whole), strict=True):
        table.data = torch.cat([table.data, new.expand(8, *new.shape)])
    found = fit_prior(model, pairs)
    for table, data in zip(tables, whole, strict=True):
        table.data = data
    torch.testing.assert_close(asdict(found), asdict(expected))
    assert len(fit_prior(model, pairs, kinds=8, first=2).centers) == 3


def test_weights_and_left_out_chances_follow_bayes_rule(model, pairs):
    found = adapt_users(model, pairs)
    margins = torch.stack([Margins(model, pairs)(row) for row in found.prior.rows(found.prior.centers)], 1).double()
    own = margins[[user_id == "long" for user_id in pairs.user_ids]]
    joint = found.prior.weights.double() * F.logsigmoid(own).sum(0).exp()
    torch.testing.assert_close(found.weights[0].double(), joint / joint.sum(), atol=2e-3, rtol=0)
    others = found.prior.weights.double() * F.logsigmoid(own[1:]).sum(0).exp()
    expected = (others / others.sum() * own[0].sigmoid()).sum()
    assert float(found.left_out()[0]) == pytest.approx(float(expected), abs=2e-3)


def test_adapting_changes_only_the_new_rows_of_the_file(model, pairs, folder):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = adapt_users(model, pairs, steps=1)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    write_users(read_checkpoint(folder / "model.ckpt", "checkpoint"), folder / "with.ckpt", found)
    old, new = (read_checkpoint(folder / name, "checkpoint") for name in ("model.ckpt", "with.ckpt"))
    tables = UserRows(old).tables
    for name, weight in old["state_dict"].items():
        assert torch.equal(
            weight, new["state_dict"][name][: len(weight)] if name in tables else new["state_dict"][name]
        )
    rows = UserRows(new)
    assert rows.vocabulary.ids[-2:] == found.user_ids
    torch.testing.assert_close(rows.vectors()[-2:], found.rows)


def test_the_curve_starts_at_the_generic_user_with_fixed_users(model, pairs):
    points = cold_start(model, pairs, pairs, counts=(0, 6, 9))  # "short" has six pairs
    assert [(point.pairs, point.users) for point in points] == [(0, 2), (6, 2)]
    assert (points[0].gain, points[0].interval, points[0].accuracy) == (0.0, 0.0, points[0].generic)
    assert points[0].generic == points[1].generic
    own = torch.tensor([i for i, user_id in enumerate(pairs.user_ids) if user_id == "long"])
    (alone,) = cold_start(model, select_pairs(pairs, own), pairs, counts=(9,))
    assert math.isnan(alone.interval)


def test_what_is_asked_next_tells_at_least_as_much_as_the_rest(model, pairs):
    places, bits = suggest(model, adapt_users(model, pairs), pairs, 3)
    assert places.shape == (2, 3)
    assert bits.diff(dim=1).le(0).all()
    assert bits.ge(0).all()


def test_models_that_rank_nothing_or_know_no_users_say_so(model_path, pairs):
    for user_model, loss, says in (
        (UniformUserModel(1), DPOLoss(), "UniformUserModel has no user rows"),
        (IndividualUserModel(1), SFTLoss(), r"trained on demonstrations \(SFTLoss\)"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            Margins(PersonalizedLM(user_model, CausalLMPolicy(model_path), loss), pairs)
    of_thumbs = PersonalizedLM(IndividualUserModel(1), CausalLMPolicy(model_path), KTOLoss())
    with pytest.raises(ConfigurationError, match=r"trained on thumbs \(KTOLoss\).* train it with their thumbs too"):
        read_pairs(of_thumbs, FileSource("nowhere.jsonl"))
    with pytest.raises(ConfigurationError, match="UniformUserModel has no user rows"):
        trained_rows(PersonalizedLM(UniformUserModel(1), CausalLMPolicy(model_path), DPOLoss()))


def test_kinds_that_are_ruled_out_stay_ruled_out():
    codes, weights = torch.tensor([[0.0], [1.0]]), torch.tensor([0.5, 0.5])
    prior = UserPrior(torch.zeros(1), torch.ones(1, 1), codes, weights, 0.0, torch.full((2, 1), 0.5))

    def margins_of(row, only):  # under the kind all are wrong from the start, under the generic user from the fifth on
        wrong = torch.full((200,), -9.0) if row else torch.cat([torch.zeros(4), torch.full((196,), -3.0)])
        return wrong * only

    layout = _Layout(["ann"], ["ann"] * 200, torch.device("cpu"))
    assert _under_each_kind(prior, layout, margins_of)[1].tolist() == [[1.0, 0.0]]


def test_pairs_go_to_the_device_of_the_model(model_path, pairs, monkeypatch):
    class Asked(Exception):
        pass

    def of(pairs, uses_text):
        raise Asked(pairs.chosen.ids.device.type)

    monkeypatch.setattr(DistinctTexts, "of", of)
    users = IndividualUserModel(1)
    users.build(3, torch.randn(4, 8))
    with pytest.raises(Asked, match="meta"):
        Margins(PersonalizedLM(users, CausalLMPolicy(model_path), SimPOLoss()).to("meta"), pairs)


def test_held_out_pairs_decide_how_far_rows_are_shrunk(model, folder):
    users = {f"user{i}": 3 for i in range(8)}
    pairs = read_pairs(model, FileSource(write_votes(folder / "held_out.jsonl", users, seed=9)))[0]
    with torch.no_grad():
        own, generic = (term.margins for term in model.objective(pairs, every_term=True)[1])
    turned = (own < generic)[:, None]
    blocks = Tokens.concat([pairs.chosen, pairs.rejected])
    (first, second), (is_first, is_second) = blocks.ids.chunk(2), blocks.mask.chunk(2)

    def labeled(swap):
        chosen = Tokens(torch.where(swap, second, first), torch.where(swap, is_second, is_first))
        rejected = Tokens(torch.where(swap, first, second), torch.where(swap, is_first, is_second))
        return replace(pairs, chosen=chosen, rejected=rejected)

    found = fit_shrinkage(model, pairs, factors=(0.0, 1.0))
    for place, margins in enumerate((generic, own)):
        assert float(found.log_likelihoods[place]) == pytest.approx(float(F.logsigmoid(margins).mean()), abs=1e-4)
    assert fit_shrinkage(model, labeled(turned)).best == 1.0  # judged as the rows say
    assert fit_shrinkage(model, labeled(~turned)).best == 0.0
    with pytest.raises(ConfigurationError, match="no pair belongs to a user in the checkpoint"):
        fit_shrinkage(model, replace(pairs, user_ids=("nobody",) * len(pairs)))


def test_rows_read_from_pairs_stay_when_trained_ones_shrink(model_path, folder):
    users = CompositeUserModel([IndividualUserModel(1), AmortizedUserModel(1)])
    module = PersonalizedLM(users, CausalLMPolicy(model_path), DPOLoss())
    module.vocabulary = UserVocabulary(["ann", "bob"])
    module.configure_model()
    votes = write_votes(folder / "both.jsonl", {"ann": 4, "bob": 4})
    pairs = read_pairs(module.eval(), FileSource(votes))[0]
    with torch.no_grad():
        trained, read = users.row_tables()
        read[1:] = torch.randn_like(read[1:])
        with pytest.raises(ConfigurationError, match="all users of these pairs have the row of a new user"):
            fit_shrinkage(module, pairs)
        trained[1:] = torch.randn_like(trained[1:])
        found = fit_shrinkage(module, pairs, factors=(1.0, 0.0))
        assert found.tables == ("parts.0.offsets.weight",)
        for place, factor in enumerate(found.factors):
            trained *= factor
            margins = module.objective(pairs)[1][0].margins
            assert float(found.log_likelihoods[place]) == pytest.approx(float(F.logsigmoid(margins).mean()), abs=1e-4)


@pytest.fixture(scope="module")
def trained_file(model_path, folder):
    """A checkpoint that the command line wrote."""
    votes = write_votes(folder / "cli.jsonl", {f"user{i}": 6 for i in range(4)})
    args = ["fit", "--model.user_model", "LowRankUserModel", "--model.user_model.num_tokens", "2"]
    args += ["--model.policy", "CausalLMPolicy", "--model.policy.model", model_path, "--model.loss", "DPOLoss"]
    args += ["--data.source", "FileSource", "--data.source.train", str(votes), "--data.cache_dir", str(folder / "c")]
    args += ["--data.max_completion_length", "7"]
    args += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder / "runs")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prlhf_lightning"])
        patch.setenv("PRLHF_CACHE", str(folder / "cache"))
        main([*args, "--trainer.enable_progress_bar", "false"])
    return folder / "runs" / "version_0" / "checkpoints" / "last.ckpt"


def test_new_users_of_a_pseudonymous_study_get_pseudonyms(trained_file, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prlhf_lightning"])
    monkeypatch.setenv("STUDY_SALT", "a secret of many bytes")
    new, output = write_votes(folder / "secret.jsonl", {"person-1": 2}), folder / "secret.ckpt"
    command = ["adapt", "--model", str(trained_file), "--feedback", str(new), "--output", str(output)]
    main([*command, "--hash_user_ids_with", "STUDY_SALT"])
    assert Pseudonyms.load("STUDY_SALT")("person-1").encode() in output.read_bytes()
    assert b"person-1" not in output.read_bytes() + capsys.readouterr().out.encode()


def test_the_command_adds_users_and_names_what_to_ask_them(trained_file, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prlhf_lightning"])
    new = write_votes(folder / "two.jsonl", {"new-1": 6, "new-2": 2})
    command = ["adapt", "--model", str(trained_file), "--feedback", str(new)]
    main([*command, "--output", str(folder / "more.ckpt"), "--suggest", "1", "--pool", str(new)])
    said = capsys.readouterr().out
    asked = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [row["user_id"] for row in asked] == ["new-1", "new-2"]
    assert asked[0]["ask"].startswith(str(new))
    assert "all 2" in said
    with pytest.raises(SystemExit, match="'new-1' is in this checkpoint already"):
        main(["adapt", "--model", str(folder / "more.ckpt"), "--feedback", str(new)])
    with pytest.raises(SystemExit, match="pool: `--suggest` chooses from a file of pairs"):
        main([*command, "--suggest", "1"])
    with pytest.raises(SystemExit, match="suggest: give the number of pairs"):
        main([*command, "--pool", str(new)])
    with pytest.raises(SystemExit, match=r"output: .* is a folder; give a file"):
        main([*command, "--output", str(folder)])


def test_the_model_is_rebuilt_from_one_read_and_left_as_it_is(trained_file, folder, monkeypatch):
    content = read_checkpoint(trained_file, "x")
    untouched = read_checkpoint(trained_file, "x")
    module = module_of(content, trained_file, "x")
    assert content.keys() == untouched.keys()
    for name in content.keys() - {"state_dict", "optimizer_states"}:
        assert str(content[name]) == str(untouched[name])
    other = PersonalizedLM.load_from_checkpoint(trained_file)
    assert module.vocabulary == other.vocabulary
    assert module.tokenization == other.tokenization
    for (name, weight), (other_name, expected) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(weight, expected)
    checked = []
    monkeypatch.setattr(checkpoint_files, "check", checked.append)
    new, old = (write_votes(folder / f"{user}.jsonl", {user: 2}) for user in ("gus", "user0"))
    for args in (["adapt", "--feedback", str(new)], ["shrink", "--validation", str(old)]):
        main([*args, "--model", str(trained_file), "--output", str(folder / "once.ckpt")])
    assert checked == [trained_file, trained_file]


@pytest.mark.parametrize("command", ["adapt", "shrink"])
def test_the_commands_compute_on_the_device_that_is_named(trained_file, folder, monkeypatch, command):
    users = {"eve": 6, "fay": 5} if command == "adapt" else {f"user{i}": 2 for i in range(4)}
    file = write_votes(folder / f"{command}.jsonl", users)
    args = [command, "--model", str(trained_file)]
    args += ["--feedback", str(file), "--steps", "1"] if command == "adapt" else ["--validation", str(file)]
    main([*args, "--output", str(folder / f"{command} there.ckpt"), "--device", "cpu"])
    with PretendedGPU() as gpu:
        main([*args, "--output", str(folder / f"{command} here.ckpt"), "--device", "cuda"])
    assert any("margins.py" in where for where in gpu.waits)
    there, here = (read_checkpoint(folder / f"{command} {where}.ckpt", "x") for where in ("there", "here"))
    torch.testing.assert_close(UserRows(there).vectors(), UserRows(here).vectors())
    with pytest.raises(SystemExit, match="device: 'nonsense' can't be used here"):
        main([*args, "--device", "nonsense"])


def test_known_users_of_a_file_are_left_out_on_request(trained_file, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prlhf_lightning"])
    mixed = write_votes(folder / "mixed.jsonl", {"user0": 2, "user1": 1, "late": 2})
    mixed.write_text(mixed.read_text().replace('"user_id"', '"worker"'))
    command = ["adapt", "--model", str(trained_file), "--feedback", str(mixed), "--columns", "{user_id: worker}"]
    with pytest.raises(SystemExit, match=r"'user0' is in this checkpoint already\. .*`--skip_known true`"):
        main(command)
    main([*command, "--skip_known", "true", "--output", str(folder / "late.ckpt")])
    assert "2 users left out" in capsys.readouterr().out
    assert read_checkpoint(folder / "late.ckpt", "x")["prlhf_lightning"]["users"][4:] == ["late"]


def test_the_command_shrinks_rows_and_leaves_the_rest(trained_file, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prlhf_lightning"])
    turned = write_votes(folder / "turned.jsonl", {f"user{i}": 6 for i in range(1, 5)}, seed=3)
    output = folder / "shrunk.ckpt"
    found = Shrinkage((0.0, 1.0), torch.tensor([-0.6, -0.7]), torch.ones(2), 18, ("codes.weight",))
    monkeypatch.setattr("prlhf_lightning.cli.shrink.fit_shrinkage", lambda *_: found)
    main(["shrink", "--model", str(trained_file), "--validation", str(turned), "--output", str(output)])
    assert "with rows 0 times as far" in " ".join(capsys.readouterr().out.split())
    old, new = (read_checkpoint(path, "x") for path in (trained_file, output))
    rows = UserRows(new)
    assert torch.equal(rows.vectors()[1:], torch.stack([torch.cat([r.flatten() for r in rows.new_rows()])] * 4))
    assert not torch.equal(UserRows(old).vectors(), rows.vectors())
    assert all(torch.equal(old["state_dict"][k], v) for k, v in new["state_dict"].items() if k not in rows.tables)


def test_commands_say_when_nothing_can_be_shrunk_or_learned(trained_file, folder, capsys, monkeypatch):
    votes, output, frozen = (
        write_votes(folder / "any.jsonl", {"user0": 2}),
        folder / "same.ckpt",
        folder / "frozen.ckpt",
    )
    args = ["shrink", "--validation", str(votes), "--output", str(output), "--model"]
    content = read_checkpoint(trained_file, "x")
    before = UserRows(content).vectors()
    found = Shrinkage((1.0,), torch.zeros(1), torch.ones(1), 2, ("codes.weight",))
    monkeypatch.setattr("prlhf_lightning.cli.shrink.fit_shrinkage", lambda *_: found)
    main([*args, str(trained_file)])
    assert "with rows as they were" in " ".join(capsys.readouterr().out.split())
    assert torch.equal(UserRows(read_checkpoint(output, "x")).vectors(), before)
    for name in UserRows(content).tables:
        content["state_dict"][name][1:] = 0.0
    checkpoint_files.save(content, frozen)
    with pytest.raises(SystemExit, match=r"none of its users has a row that differs from a new user's"):
        main(["adapt", "--model", str(frozen), "--feedback", str(write_votes(folder / "eve.jsonl", {"eve": 1}))])
    for name in UserRows(content).tables:
        del content["state_dict"][name]
    content["prlhf_lightning"]["new_rows"] = {}  # as where training leaves the tables alone
    checkpoint_files.save(content, frozen)
    with pytest.raises(SystemExit, match=r"frozen\.ckpt holds no trained user rows, .* nothing to shrink"):
        main([*args, str(frozen)])
    with pytest.raises(SystemExit, match=r"model: .* is a sharded checkpoint"):
        main([*args, str(folder)])


def test_a_checkpoint_follows_its_base_model(trained_file, folder, model_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prlhf_lightning"])
    moved, output = shutil.copytree(model_path, folder / "moved model"), folder / "moved.ckpt"
    main(["relocate", "--model", str(trained_file), "--base", str(moved), "--output", str(output)])
    assert load_module(output, "x").policy.name == str(moved)
    assert f"{moved} instead of {model_path}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"policy\.model"):
        main(["relocate", "--model", str(trained_file), "--base", str(folder), "--output", str(folder / "no.ckpt")])
    assert not list(folder.glob("no.ckpt*"))
    before = output.read_bytes()
    with pytest.raises(SystemExit, match=r"policy\.model"):  # in place
        main(["relocate", "--model", str(output), "--base", str(folder), "--output", str(output)])
    assert output.read_bytes() == before


def test_a_missing_base_model_is_named_with_the_next_command(trained_file, folder):
    content = read_checkpoint(trained_file, "x")
    content["hyper_parameters"]["policy"]["init_args"]["model"] = "/gone/base"
    checkpoint_files.save(content, folder / "gone.ckpt")
    says = r"trained on the base model /gone/base, which does not exist\. .* relocate --model .*gone\.ckpt --base"
    for command in (["generate", "--prompt", "a", "--model"], ["export", "--output", "e", "--model"]):
        with pytest.raises(SystemExit, match=says):
            main([*command, str(folder / "gone.ckpt")])


def test_a_changed_base_is_refused_as_new_and_warned_of_as_old(trained_file, folder, model_path):
    other, output = Path(shutil.copytree(model_path, folder / "other base")), folder / "other.ckpt"
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with (
        pytest.warns(UserWarning, match=r"other base are not those of training\. The trained"),
        pytest.raises(SystemExit, match=r"base: the weights of .*other base are not those of .*llama, which .*ckpt"),
    ):
        main(["relocate", "--model", str(trained_file), "--base", str(other), "--output", str(output)])
    assert not output.exists()
    content = read_checkpoint(trained_file, "x")
    content["hyper_parameters"]["policy"]["init_args"]["model"] = str(other)
    content["prlhf_lightning"]["base"]["transformers"] = "5.17.0"  # whose names of the weights may have been others
    checkpoint_files.save(content, output)
    with pytest.warns(UserWarning, match=r"training \(or transformers 5\.17\.0 and .* arrange them differently\)"):
        load_module(output, "x")


def test_of_a_servers_log_the_new_users_are_learned(trained_file, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prlhf_lightning"])
    url = f"sqlite:///{folder}/feedback.db"
    log = FeedbackLog(url)
    for number, user in enumerate(["user0", "new", "new"]):
        log.append(Feedback("", str(number), 0.0, user, "a cat", "yes", "no"))
    main(["adapt", "--model", str(trained_file), "--feedback", url, "--output", str(folder / "logged.ckpt")])
    assert read_checkpoint(folder / "logged.ckpt", "x")["prlhf_lightning"]["users"][-1] == "new"


def test_texts_become_ids_as_in_training(trained_file, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prlhf_lightning"])
    alike = "the cat sat fast red sun moon"  # as many words as the limit of completions that it was trained with
    row = {"user_id": "new", "prompt": "a", "chosen": f"{alike} yes", "rejected": f"{alike} no"}
    (folder / "alike.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match="are the same tokens once they are cut"):
        main(["adapt", "--model", str(trained_file), "--feedback", str(folder / "alike.jsonl")])
