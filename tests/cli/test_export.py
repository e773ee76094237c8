"""A run's model, exported through the command line, is read by transformers alone, and its users with it."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import short_runs
import torch
import yaml
from conftest import write_votes
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from short_runs import run_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from prlhf_lightning import CausalLMPolicy, DPOLoss, FileSource, IndividualUserModel, LoRA, PersonalizedLM
from prlhf_lightning.cli.export import peft_name, write_user_vectors
from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.models import open_writer
from prlhf_lightning.data import PreferenceDataModule, UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference import GenerationRequest, Generator
from prlhf_lightning.types import Tokens, Users

INDIVIDUAL = {"class_path": "IndividualUserModel", "init_args": {"num_tokens": 2}}


def export(checkpoint, folder, *options):
    main(["export", "--model", str(checkpoint), "--output", str(folder), *options])


def fit(model_path, votes, folder, lora, user_model=INDIVIDUAL):
    model = {"user_model": user_model, "optim": {"lr": 0.05, "user_lr": 1.0}}
    return short_runs.fit(folder, run_config(folder, {"model": model_path, "lora": lora}, votes, model=model))


@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_exported_model_is_the_trained_policy(model_paths, votes, tmp_path, name, lora):
    checkpoint = fit(model_paths[name], votes, tmp_path, lora)
    export(checkpoint, tmp_path / "exported")
    ids = torch.tensor([[1, 5, 6, 7, 8, 2]])
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        scores = lm(ids).logits.log_softmax(-1)[0, [2, 3, 4], [7, 8, 2]]
        untrained = AutoModelForCausalLM.from_pretrained(model_paths[name])(ids).logits.log_softmax(-1)
    policy = PersonalizedLM.load_from_checkpoint(checkpoint, weights_only=True).policy
    (trained,) = policy.log_probs(Tokens.from_lists([[1, 5, 6]]), [Tokens.from_lists([[7, 8, 2]])])
    torch.testing.assert_close(scores, trained.tokens[0].detach(), rtol=1e-4, atol=1e-4)
    assert (scores - untrained[0, [2, 3, 4], [7, 8, 2]]).abs().max() > 1e-2
    assert lm.config.use_cache
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("the cat").input_ids == [1, 5, 6]


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: model: there is no checkpoint .*nothing.ckpt; [^\n]*$"):
        export(tmp_path / "nothing.ckpt", tmp_path / "exported")


def test_a_file_that_is_no_checkpoint_is_named(votes, tmp_path):
    with pytest.raises(SystemExit, match=r"votes.jsonl is damaged, or no checkpoint"):
        export(votes, tmp_path / "exported")


def test_a_module_built_in_code_says_how_to_load_its_checkpoint(model_path, votes, tmp_path):
    module = PersonalizedLM(IndividualUserModel(2), CausalLMPolicy(model_path, lora=LoRA(rank=2)), DPOLoss())
    data = PreferenceDataModule(FileSource(train=[str(votes)]), tokenizer=module.policy.tokenizer)
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "built.ckpt", weights_only=False)
    with pytest.raises(SystemExit, match="built in code"):
        export(tmp_path / "built.ckpt", tmp_path / "exported")


def trained(model_path, folder, user_model=INDIVIDUAL):
    """Train a few steps, so fast that users come to differ."""
    path = folder / "votes.jsonl"
    write_votes(path, {"ann": 12, "bob/../x": 12, "cy": 12})
    return fit(model_path, path, folder, {"rank": 2}, user_model)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def exported(request, model_paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRLHF_CACHE", str(folder / "cache"))
        checkpoint = trained(model_paths[request.param], folder)
        export(checkpoint, folder / "whole", "--prompt_embeds", "true", "--peft_users", "true")
        export(checkpoint, folder / "adapters", "--adapters", "true")
    return checkpoint, folder / "whole", folder / "adapters"


ASKED = [
    GenerationRequest(p, u, max_new_tokens=12)
    for p in ("the cat", "a dog ran")
    for u in ("ann", "bob/../x", "cy", "eve")
]


def test_folders_write_what_the_checkpoint_writes(exported):
    checkpoint, whole, adapters = exported
    written = open_writer(checkpoint).generate(ASKED)
    assert Generator.from_folder(whole).generate(ASKED) == written
    assert open_writer(adapters).generate(ASKED) == written
    assert len({answer.ids for answer in written}) > 2


def lines_of_docs(repo_root, name: str) -> str:
    text = (repo_root / "docs" / "export.md").read_text()
    return text.partition(f"<!-- test: {name} -->\n```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: f"{asked.prompt}-{asked.user[:3]}")
def test_the_documented_lines_give_the_same_tokens_without_us(exported, repo_root, asked):
    checkpoint, whole, _ = exported
    ours = open_writer(checkpoint).generate([replace(asked, max_new_tokens=40)])[0]
    code = lines_of_docs(repo_root, "peft")
    assert "prlhf" not in code
    names = {"folder": str(whole), "user": peft_name(asked.user if asked.user != "eve" else ""), "prompt": asked.prompt}
    exec(code, names)
    assert tuple(names["written"].tolist()) == ours.ids
    ids = names["ids"]
    by_peft = names["model"].generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, max_new_tokens=40, do_sample=False
    )
    assert tuple(by_peft[0, ids.shape[1] :].tolist()) == ours.ids


def test_documented_prompt_embeds_write_the_same_tokens(exported, repo_root):
    checkpoint, whole, _ = exported
    lm = AutoModelForCausalLM.from_pretrained(whole)
    for asked, ours in zip(ASKED, open_writer(checkpoint).generate(ASKED), strict=True):
        names = {"folder": str(whole), "user": asked.user, "prompt": asked.prompt}
        exec(lines_of_docs(repo_root, "embeds"), names)
        written = lm.generate(inputs_embeds=names["prompt_embeds"][None], max_new_tokens=12, do_sample=False)
        assert tuple(written[0].tolist()) == ours.ids


def test_user_vectors_are_the_user_models_own(exported):
    checkpoint, whole, _ = exported
    module = PersonalizedLM.load_from_checkpoint(checkpoint, weights_only=True)
    vectors = load_file(whole / "user_vectors.safetensors")
    assert set(vectors) == {"", *module.vocabulary.ids}
    for user_id, row in [("", 0), ("ann", 1), ("cy", 3)]:
        assert torch.equal(vectors[user_id], module.user_model(Users(torch.tensor([row]))).vectors[0])


def test_many_users_vectors_are_written_in_parts_with_an_index(tmp_path):
    user_model, ids = IndividualUserModel(num_tokens=2), [f"user-{i}" for i in range(24)]
    user_model.build(25, torch.randn(9, 8))
    nn.init.normal_(user_model.offsets.weight.data[1:])
    with torch.no_grad():
        write_user_vectors(tmp_path, user_model, UserVocabulary(ids), shard=10 * 2 * 8 * 4)
    index = json.loads((tmp_path / "user_vectors.safetensors.index.json").read_text())["weight_map"]
    assert [len(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))] == [10, 10, 5]
    for row, user_id in enumerate(["", *ids]):
        vectors = load_file(tmp_path / index[user_id])[user_id]
        assert torch.equal(vectors, user_model(Users(torch.tensor([row]))).vectors[0])


def test_users_false_also_removes_users_of_an_earlier_export(exported, tmp_path):
    checkpoint = exported[0]
    export(checkpoint, tmp_path / "e", "--peft_users", "true")
    export(checkpoint, tmp_path / "e", "--include_users", "false")
    files = [path for path in (tmp_path / "e").rglob("*") if path.is_file()]
    assert not [path for path in files if "user" in path.name or b"bob/.." in path.read_bytes()]
    with pytest.raises(ConfigurationError, match=r"has no prlhf.json; give a folder that `export` wrote"):
        Generator.from_folder(tmp_path / "e")


def test_the_card_says_what_it_is_and_warns_of_privacy(exported):
    card = (exported[1] / "README.md").read_text()
    assert "3 users" in card
    assert "**Privacy.**" in card
    assert "DPOLoss" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def test_a_folder_with_other_files_is_not_written_into(exported, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="has files in it that `export` did not write"):
        export(exported[0], tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"README.md": "mine", "config.json": "{}"}


def test_a_folder_can_not_be_a_file(exported, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=r"output: .*file is a file"):
        export(exported[0], tmp_path / "file")


def test_a_project_that_mentions_the_package_is_no_export(exported, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n\nMade with prlhf_lightning.\n")
    (tmp_path / "my-config.json").write_text("{}")
    with pytest.raises(SystemExit, match="has files in it that `export` did not write"):
        export(exported[0], tmp_path)
    assert (tmp_path / "my-config.json").exists()


def test_an_export_takes_the_place_of_an_earlier_one(exported, tmp_path):
    export(exported[0], tmp_path / "e")
    (tmp_path / "e" / "chat_template.jinja").write_text("of another model")
    with pytest.raises(SystemExit, match="'eve' is not in this model"):
        export(exported[0], tmp_path / "e", "--peft_users", "true", "--user", "eve")
    assert (tmp_path / "e" / "prlhf.json").exists()  # what can't be done costs nothing
    export(exported[0], tmp_path / "e", "--user_vectors", "false")
    assert AutoTokenizer.from_pretrained(tmp_path / "e").chat_template is None
    assert "user_vectors" not in (tmp_path / "e" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--adapters", "true", "--peft_users", "true"], "peft_users: PEFT puts a user's vectors before a model"),
        (
            ["--include_users", "false", "--peft_users", "true"],
            "include_users: prompt_embeds and peft_users are about users",
        ),
        (["--peft_users", "true", "--user", "[eve]"], "user: '\\[eve]' is not in this model"),
        (["--user", "ann"], "user: it selects users for PEFT folders"),
    ],
)
def test_options_that_contradict_one_another_are_refused(exported, tmp_path, options, says):
    with pytest.raises(SystemExit, match=says):
        export(exported[0], tmp_path / "e", *options)
    assert not (tmp_path / "e" / "prlhf.json").exists()


def test_composite_models_with_text_come_back(model_paths, tmp_path):
    parts = [
        {
            "class_path": "prlhf_lightning.user_models.ClusterUserModel",
            "init_args": {"num_clusters": 3, "num_tokens": 2},
        },
        {"class_path": "prlhf_lightning.user_models.TextUserModel"},
    ]
    spec = {"class_path": "prlhf_lightning.user_models.CompositeUserModel", "init_args": {"parts": parts}}
    checkpoint = trained(model_paths["llama"], tmp_path, spec)
    export(checkpoint, tmp_path / "e")
    asked = [replace(one, user_text="user likes short answers") for one in ASKED]
    assert open_writer(tmp_path / "e").generate(asked) == open_writer(checkpoint).generate(asked)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("prlhf.json", '{"format": 99}', "format is 99, and this version reads formats up to 2"),
        ("prlhf.json", "[]", "holds no JSON object"),
        ("prlhf.json", '{"format": 1}', "prlhf.json has no 'name'"),
        ("users.json", "{}", "users.json has no 'users'"),
        ("users.json", None, "has no users.json"),
        (
            "model.safetensors",
            "version https://git-lfs.github.com/spec/v1",
            "the model can't be used: .* git-lfs pointer",
        ),
        ("config.json", "<html>", "the tokenizer can't be used: config.json is an HTML page"),
        ("user_model.safetensors", "rubbish", "user_model.safetensors does not fit prlhf.json or can't be read"),
    ],
)
def test_damaged_folders_are_explained(exported, tmp_path, name, content, says):
    shutil.copytree(exported[1], tmp_path / "e")
    (tmp_path / "e" / name).unlink()
    if content is not None:
        (tmp_path / "e" / name).write_text(content)
    with pytest.raises(ConfigurationError, match=says):
        open_writer(tmp_path / "e")


def test_no_flipped_bit_of_a_folder_is_read_in_silence(exported, tmp_path):
    folder, chance = Path(shutil.copytree(exported[1], tmp_path / "e")), random.Random(0)
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("user_vectors")]
    for name in (name for name in names if name not in ("README.md", "token_embeddings.safetensors")):
        whole = (folder / name).read_bytes()
        for place in (chance.randrange(len(whole)) for _ in range(3)):
            flipped = bytes([whole[place] ^ 1 << chance.randrange(8)])
            (folder / name).write_bytes(whole[:place] + flipped + whole[place + 1 :])
            with pytest.raises(ConfigurationError):
                open_writer(folder)
        (folder / name).write_bytes(whole)
    open_writer(folder)


def test_a_folder_that_was_changed_on_purpose_can_be_read(exported, tmp_path):
    folder = Path(shutil.copytree(exported[1], tmp_path / "e"))
    settings = json.loads((folder / "prlhf.json").read_text())
    (folder / "prlhf.json").write_text(json.dumps(settings | {"name": "mine"}))
    with pytest.raises(ConfigurationError, match=r'prlhf.json is not as it was exported.* write "sha256": null'):
        open_writer(folder)
    (folder / "prlhf.json").write_text(json.dumps(settings | {"name": "mine", "sha256": None}))
    assert open_writer(folder).name == "mine"


def test_a_folder_that_lacks_a_weight_is_refused(exported, tmp_path):
    shutil.copytree(exported[1], tmp_path / "e")
    weights = load_file(tmp_path / "e" / "model.safetensors")
    name = next(name for name in weights if name.endswith("weight") and "0" in name)
    del weights[name]
    save_file(weights, tmp_path / "e" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=f"the model can't be used: the files lack 1 weight .*: {name}"):
        open_writer(tmp_path / "e")


def test_adapters_name_a_missing_base_and_warn_of_other_weights(exported, tmp_path):
    export(exported[0], tmp_path / "e", "--adapters", "true")
    settings = json.loads((tmp_path / "e" / "adapter_config.json").read_text())
    base = Path(shutil.copytree(settings["base_model_name_or_path"], tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"})
    for place in (base, tmp_path / "gone"):
        settings["base_model_name_or_path"] = str(place)
        (tmp_path / "e" / "adapter_config.json").write_text(json.dumps(settings))
        if place is base:
            with pytest.warns(UserWarning, match=r"The weights of the base model .*base are not those of training"):
                open_writer(tmp_path / "e")
        else:
            says = r"its base model '.*gone' could not be loaded; if it has moved, write its path into base_model_name"
            with pytest.raises(ConfigurationError, match=says):
                open_writer(tmp_path / "e")


@pytest.mark.parametrize("class_path", ["os.system", "torch.nn.Linear", "no.such.Model", "nothing"])
def test_a_folder_can_name_no_other_code_than_user_models(exported, tmp_path, class_path):
    shutil.copytree(exported[1], tmp_path / "e")
    settings = json.loads((tmp_path / "e" / "prlhf.json").read_text())
    settings["user_model"] = {"class_path": class_path, "init_args": {"command": "true"}}
    (tmp_path / "e" / "prlhf.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigurationError, match=r"which is not part of any model|, not of this package"):
        open_writer(tmp_path / "e")


@pytest.mark.parametrize("user_id", ["ann", "_", "..", "a/b", "ñandú", ""])
def test_names_of_users_folders_stay_in_place_and_apart(user_id, tmp_path):
    names = {peft_name(other) for other in ("ann", "_", "..", "a/b", "ñandú", "")}
    assert len(names) == 6
    assert (tmp_path / peft_name(user_id)).resolve().parent == tmp_path.resolve()
