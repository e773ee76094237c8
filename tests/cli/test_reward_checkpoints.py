"""Commands on checkpoints of reward models: what each does, or what to use in its place."""

from __future__ import annotations

import json
import random
import re
import shutil

import pytest
import torch
from conftest import WORDS, write_votes
from safetensors.torch import load_file
from short_runs import fit, reward_config, run_config, write_config
from starlette.testclient import TestClient

from prlhf_lightning.adaptation import adapt_heads, suggest_pairs
from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.models import reward_model_of
from prlhf_lightning.cli.new_pairs import tokenized
from prlhf_lightning.data import FileSource
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.inference import Engine
from prlhf_lightning.rewards import JudgedPairs
from prlhf_lightning.rewards.fitting import IndexedPairs, fit_codes
from prlhf_lightning.serving.app import create_app
from prlhf_lightning.serving.services import Ranker, Services
from prlhf_lightning.training import RewardDataModule, checkpoint_files

USERS = {"ann@example.org": 30, "bob-the-builder": 30, "carla-ñandú-🦤": 30, "dee dee": 30}
CARLA = "carla-ñandú-🦤"
NEW = {"likes short": 12, "likes long": 12}


@pytest.fixture(scope="module")
def trained(model_path, tmp_path_factory):
    """The checkpoint of a run of the command line, in the run's folder."""
    folder = tmp_path_factory.mktemp("reward")
    train, held_out = (write_votes(folder / f"{seed}.jsonl", USERS, seed) for seed in (0, 1))
    content = reward_config(folder, model_path, train)
    content["data"]["source"]["init_args"]["validation"] = str(held_out)
    return fit(folder, content)


@pytest.fixture
def checkpoint(trained, tmp_path):
    run = shutil.copytree(trained.parent.parent, tmp_path / "runs" / "version_0")
    return run / "checkpoints" / "last.ckpt"


@pytest.fixture
def new_pairs(tmp_path):
    return write_votes(tmp_path / "new.jsonl", NEW, seed=2)


def run(*args: object) -> None:
    main([*map(str, args)])


def model_of(path):
    return reward_model_of(checkpoint_files.load(path), path, "model")


def pairs_of(model, path):
    return RewardDataModule(FileSource(path), model.backbone.tokenizer, ties="drop").training_pairs()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generate", "--prompt", "a dog"], "judges texts and writes none"),
        (["shrink"], "need no shrinking"),
    ],
    ids=["generate", "shrink"],
)
def test_a_command_for_policies_says_so(checkpoint, words, told):
    with pytest.raises(SystemExit, match=told):
        run(words[0], "--model", checkpoint, *words[1:])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", "--ckpt_path", "{path}"], "goes on from no checkpoint"),
        (["fit", "--init_from", "{path}"], "fitted to all pairs at once"),
        (["predict", "--ckpt_path", "{path}"], "writes no text"),
    ],
    ids=["fit from a checkpoint", "fit with init_from", "predict"],
)
def test_a_training_command_says_what_to_use_instead(checkpoint, words, told):
    words = [word.format(path=checkpoint) for word in words]
    with pytest.raises(SystemExit, match=told):
        run(words[0], "-c", checkpoint.parent.parent / "config.yaml", *words[1:])


@pytest.mark.parametrize("option", ["ckpt_path", "init_from"])
def test_a_policy_does_not_start_from_a_reward_model(checkpoint, model_path, votes, tmp_path, option):
    config = write_config(tmp_path, run_config(tmp_path, {"model": model_path}, votes))
    with pytest.raises(SystemExit, match=f"{option}: {re.escape(str(checkpoint))} is .*a reward model"):
        run("fit", "-c", config, f"--{option}", checkpoint)


def test_a_fit_with_ckpt_path_last_starts_anew(checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = torch.load(checkpoint)["state_dict"]
    run("fit", "-c", checkpoint.parent.parent / "config.yaml", "--ckpt_path", "last",
        "--trainer.default_root_dir", tmp_path / "again")  # fmt: skip
    (anew,) = (tmp_path / "again").glob("*/checkpoints/last.ckpt")
    after = torch.load(anew)["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_validate_takes_the_configuration_of_the_run(checkpoint, capsys):
    run("validate", "--ckpt_path", checkpoint)
    assert "pair accuracy" in capsys.readouterr().out


def test_a_moved_backbone_is_found_again(checkpoint, model_path, tmp_path):
    moved = shutil.copytree(model_path, tmp_path / "moved")
    run("relocate", "--model", checkpoint, "--base", moved, "--output", tmp_path / "moved.ckpt")
    assert model_of(tmp_path / "moved.ckpt").backbone.path == str(moved)


def test_a_removed_user_leaves_no_trace_and_others_no_change(checkpoint, capsys):
    before, raw = model_of(checkpoint), checkpoint.read_bytes()
    row = before.user_model.codes.weight[before.rows_of([CARLA])[0]]
    secrets = (CARLA.encode(), row.detach().numpy().tobytes())
    assert all(secret in raw for secret in secrets)
    run("users", "remove", "--model", checkpoint, "--user", CARLA)
    raw = checkpoint.read_bytes()
    assert not any(secret in raw for secret in secrets)
    said = capsys.readouterr().out
    assert f"{CARLA} and 1 vectors: nothing left" in said
    assert "users_seen.csv" in said
    after = model_of(checkpoint)
    ids = [user_id for user_id in USERS if user_id != CARLA]
    assert after.vocabulary.ids == tuple(ids)
    assert torch.equal(after.heads(after.rows_of(ids)), before.heads(before.rows_of(ids)))


def test_an_added_user_is_the_generic_user(checkpoint, capsys):
    run("users", "add", "--model", checkpoint, "--user", "zoe")
    model = model_of(checkpoint)
    rows = model.rows_of(["zoe"])
    assert rows[0] == 5
    assert torch.equal(model.heads(rows), model.heads(rows, generic=True))
    run("users", "list", "--model", checkpoint)
    assert "zoe" in capsys.readouterr().out


def test_adapted_users_are_judged_for_by_their_own_pairs(checkpoint, new_pairs, tmp_path, capsys):
    run("adapt", "--model", checkpoint, "--feedback", new_pairs, "--output", tmp_path / "with.ckpt")
    assert "likes short" in capsys.readouterr().out
    model, before = model_of(tmp_path / "with.ckpt"), model_of(checkpoint)
    held_out = pairs_of(model, write_votes(tmp_path / "held_out.jsonl", NEW, seed=3))
    features, rows = model.features_of(held_out.texts), model.rows_of(held_out.user_ids)
    chosen, rejected = (model.rewards(features, rows, texts) for texts in (held_out.chosen, held_out.rejected))
    assert (chosen > rejected).float().mean() > 0.75
    assert torch.equal(before.heads(before.rows_of([*USERS])), model.heads(model.rows_of([*USERS])))


def test_known_users_are_not_adapted(checkpoint, tmp_path):
    known = write_votes(tmp_path / "known.jsonl", {CARLA: 3})
    with pytest.raises(SystemExit, match="is in this checkpoint already"):
        run("adapt", "--model", checkpoint, "--feedback", known)


def test_each_user_is_asked_what_tells_most(checkpoint, new_pairs, tmp_path, capsys):
    pool = write_votes(tmp_path / "pool.jsonl", {"anyone": 20}, seed=4)
    run("adapt", "--model", checkpoint, "--feedback", new_pairs, "--suggest", 2, "--pool", pool)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"user_id"')]
    assert [row["user_id"] for row in rows] == ["likes short"] * 2 + ["likes long"] * 2
    assert all(0 <= row["bits"] <= 1 for row in rows)


def test_what_a_pair_tells_is_the_mutual_information(checkpoint, new_pairs, tmp_path):
    model = model_of(checkpoint)
    found = adapt_heads(model, pairs_of(model, new_pairs))
    pool = pairs_of(model, write_votes(tmp_path / "pool.jsonl", {"anyone": 6}, seed=4))
    generic, slopes = model.linear_margins(pool)
    draw = torch.distributions.MultivariateNormal(found.rows[0], found.covariances[0])
    chances = (generic + draw.sample((20_000,)) @ slopes.T).sigmoid()

    def entropy(p):
        return -(p * p.log2() + (1 - p) * (1 - p).log2())

    expected = entropy(chances.mean(0)) - entropy(chances).mean(0)
    places, bits = suggest_pairs(model, found, pool, len(pool))
    assert torch.allclose(bits[0], expected[places[0]], atol=5e-3)


def test_leaving_a_pair_out_is_learning_from_the_others(checkpoint, new_pairs):
    """Against 24 estimates from all pairs but one, with the pair's weights as in all."""
    model = model_of(checkpoint)
    pairs = pairs_of(model, new_pairs)
    found = adapt_heads(model, pairs)
    expected = []
    for out in range(len(pairs)):
        some = torch.tensor([n for n in range(len(pairs)) if n != out and found.users[n] == found.users[out]])
        rest = IndexedPairs(torch.zeros_like(some), pairs.chosen[some], pairs.rejected[some], found.weights[some])
        rank = found.rows.shape[1]
        start = torch.zeros(1, rank), torch.eye(rank)[None]
        code, covariance = fit_codes(found.generic_margins[some], found.slopes[some], rest, *start, 50)
        slope = found.slopes[out]
        mean, variance = found.generic_margins[out] + slope @ code[0], slope @ covariance[0] @ slope
        expected.append((mean / (1 + torch.pi / 8 * variance).sqrt()).sigmoid())
    assert torch.allclose(found.left_out(), torch.stack(expected), atol=0.03)


def lines_of_docs(repo_root):
    text = (repo_root / "docs" / "reward_models.md").read_text()
    return text.partition("<!-- test: exported -->\n```python\n")[2].partition("```")[0]


USER_MODELS = {
    "low rank": {"class_path": "LowRankUserModel", "init_args": {"num_tokens": 1, "rank": 2}},
    "cluster": {"class_path": "ClusterUserModel", "init_args": {"num_tokens": 1, "num_clusters": 2}},
    "individual": {"class_path": "IndividualUserModel", "init_args": {"num_tokens": 1}},
    "without users": {"class_path": "UniformUserModel", "init_args": {"num_tokens": 1}},
}


def write_ratings(path, prompts, users):
    """Write pairs of known texts of known prompts, so that prompts and texts get weights of their own."""
    draw = random.Random(0)
    texts = [f"{one} {two}" for one in WORDS[:4] for two in WORDS[4:7]]
    with path.open("w") as file:
        for user in users:
            for prompt in prompts:
                for _ in range(12):
                    chosen, rejected = sorted(draw.sample(texts, 2), reverse=user < "b")
                    row = {"user_id": user, "prompt": f"{prompt} ", "chosen": chosen, "rejected": rejected}
                    file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("user_model", USER_MODELS)
def test_plain_torch_reads_an_exported_reward_model(repo_root, model_path, tmp_path, user_model):
    """The lines of the docs give each user the model's own rewards: of known and new prompts, texts and users."""
    train = write_ratings(tmp_path / "train.jsonl", ["the cat", "a dog"], ["ann", "bob"])
    model = {"user_model": USER_MODELS[user_model], "steps": 30}
    checkpoint = fit(tmp_path, reward_config(tmp_path, model_path, train, model=model))
    run("export", "--model", checkpoint, "--output", tmp_path / "exported")
    module = model_of(checkpoint)
    assert len(module.features.prompt_keys) == 2
    assert len(module.features.text_keys) > 10
    tokenize = FeedbackTokenizer(module.backbone.tokenizer, module.tokenization)
    for user in ("ann", "bob", "eve"):
        for prompt, completion in (("the cat ", f"{WORDS[0]} {WORDS[4]}"), ("a dog ", "moon"), ("new sun ", "moon")):
            record = {"user_id": user, "prompt": prompt, "chosen": completion, "rejected": "yes no"}
            pair = JudgedPairs.of_rows(tokenized(tokenize, [record], ["here"])[0])
            expected = module.rewards(module.features_of(pair.texts), module.rows_of([user]), pair.chosen)
            given = {"folder": tmp_path / "exported", "user": user, "prompt": prompt, "completion": completion}
            exec(lines_of_docs(repo_root), given)
            assert given["reward"] == pytest.approx(float(expected), abs=1e-4)


def test_a_server_ranks_by_it_beside_a_policy(checkpoint, model_path, votes, tmp_path, monkeypatch):
    (tmp_path / "policy").mkdir()
    policy = fit(tmp_path / "policy", run_config(tmp_path / "policy", {"model": model_path}, votes))
    loaded = []
    monkeypatch.setattr("prlhf_lightning.serving.server.run", lambda load, *_: loaded.append(load()))
    run("serve", "--model", policy, "--reward_model", checkpoint.parent.parent, "--device", "cpu")
    ((writer, _, scorer),) = loaded
    app = create_app(Services(writer, lambda: Engine(writer), hosts=None, ranker=Ranker("tiny-reward", scorer)))
    documents = ["sun", "dog ran fast", "moon yes no"]
    asked = {"query": "the cat", "documents": documents, "user": CARLA}
    found = TestClient(app, base_url="http://localhost").post("/v1/rerank", json=asked).json()
    model = model_of(checkpoint)
    records = [{"user_id": CARLA, "prompt": "the cat", "chosen": one, "rejected": "red"} for one in documents]
    tokenize = FeedbackTokenizer(model.backbone.tokenizer, model.tokenization)
    pairs = JudgedPairs.of_rows(tokenized(tokenize, records, ["here"] * 3)[0])
    rewards = model.rewards(model.features_of(pairs.texts), model.rows_of([CARLA] * 3), pairs.chosen).tolist()
    assert [one["index"] for one in found["results"]] == sorted(range(3), key=lambda n: -rewards[n])
    assert [one["relevance_score"] for one in found["results"]] == pytest.approx(sorted(rewards)[::-1], abs=1e-5)


def test_an_export_without_users_names_none(checkpoint, tmp_path):
    run("export", "--model", checkpoint, "--output", tmp_path / "exported", "--include_users", "false")
    assert len(load_file(tmp_path / "exported" / "users.safetensors")["shares"]) == 1
    assert not any(CARLA.encode() in path.read_bytes() for path in (tmp_path / "exported").iterdir())


def test_an_exported_reward_model_is_no_policy(checkpoint, tmp_path):
    run("export", "--model", checkpoint, "--output", tmp_path / "exported")
    with pytest.raises(SystemExit, match="is an exported reward model"):
        run("generate", "--model", tmp_path / "exported", "--prompt", "a dog")


def test_more_pairs_settle_more(checkpoint, tmp_path):
    model = model_of(checkpoint)
    users = {"few": 2, "some": 0, "many": 40}
    found = adapt_heads(model, pairs_of(model, write_votes(tmp_path / "few_or_many.jsonl", users, seed=5)))
    assert found.user_ids == ("few", "many")
    assert 0 < found.settled[0] < found.settled[1] < 1
    assert found.expected_accuracy_std[0] > found.expected_accuracy_std[1]
