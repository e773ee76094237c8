"""Rows of conversations, from the tokens to what models, checkpoints and exports make of them."""

from __future__ import annotations

import datetime
import json
from types import SimpleNamespace

import pytest
import torch
from chat_models import ANSWERS, FAMILIES, conversation
from datasets import Dataset
from short_runs import fit, run_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from prlhf_lightning import CausalLMPolicy
from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.models import open_writer
from prlhf_lightning.data.records import parse_record
from prlhf_lightning.data.tokenization import FeedbackTokenizer, TokenizationSettings
from prlhf_lightning.inference import GenerationRequest
from prlhf_lightning.types import Tokens

QUESTION, ANSWER = next(iter(ANSWERS.items()))
EARLIER = conversation(list(ANSWERS)[1])
DATED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ strftime_now('%d %b %Y') }}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def row(*earlier, chosen=ANSWER, rejected="No."):
    answers = {"chosen": chosen, "rejected": rejected}
    said = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {"user_id": "ann", "prompt": [*earlier, {"role": "user", "content": QUESTION}], **said}


def by_transformers(folder, messages, answer, ends):
    """Return the log-prob of an answer, its end included, in the whole conversation."""
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*messages, *answer], return_dict=False)
    stop = next(n for n in range(len(prompt), len(whole)) if whole[n] in ends) + 1
    with torch.no_grad():
        scores = lm(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(scores[n - 1, whole[n]].item() for n in range(len(prompt), stop))


@pytest.mark.parametrize("earlier", [[], EARLIER], ids=["one turn", "two turns"])
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_are_transformers_on_the_whole_conversation(name, earlier, chat_model):
    policy = CausalLMPolicy(str(chat_model(name)))
    policy.build()
    policy.eval()
    raw = row(*earlier)
    (ids,) = FeedbackTokenizer(policy.tokenizer, TokenizationSettings())([parse_record(raw, "f:1")], ["f:1"])
    completions = [Tokens.from_lists([part.tolist()]) for part in (ids.chosen, ids.rejected)]
    with torch.no_grad():
        scored = policy.log_probs(Tokens.from_lists([ids.prompt.tolist()]), completions)
    expected = [
        by_transformers(chat_model(name), raw["prompt"], raw[part], FAMILIES[name].ends)
        for part in ("chosen", "rejected")
    ]
    assert [one.sum.item() for one in scored] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_trls_dpo_up_to_the_answers_end(name, chat_model):
    pytest.importorskip("trl")
    from trl import DPOTrainer  # slow to import

    tokenizer = AutoTokenizer.from_pretrained(chat_model(name))
    chats = [row(), row(*EARLIER), row(rejected="Go to bed early, and walk.")]
    plain = [{"prompt": f"{QUESTION}\n", "chosen": ANSWER, "rejected": "No."}]
    tokenize = FeedbackTokenizer(tokenizer, TokenizationSettings())
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None)
    after_the_end = {tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False)["input_ids"]}
    trainer = SimpleNamespace(_tokenizer=tokenizer, _is_vision_dataset=False)
    for rows in (chats, plain):
        fed = Dataset.from_list([{part: one[part] for part in ("prompt", "chosen", "rejected")} for one in rows])
        theirs = list(DPOTrainer._prepare_dataset(trainer, fed, tokenizer, settings, "train"))
        ours = tokenize([parse_record({"user_id": "ann", **one}, "f:1") for one in rows], ["f:1"] * len(rows))
        for ids, other in zip(ours, theirs, strict=True):
            assert ids.prompt.tolist() == other["prompt_ids"]
            for part in ("chosen", "rejected"):
                mine = getattr(ids, part).tolist()
                assert mine == other[f"{part}_ids"][: len(mine)]
                assert set(other[f"{part}_ids"][len(mine) :]) <= after_the_end


@pytest.fixture(scope="module")
def dated(chat_model, tmp_path_factory):
    """A model whose template writes a date, trained on the first of May with an argument of the template."""
    folder = tmp_path_factory.mktemp("dated")
    base = chat_model("qwen")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder / "base")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(4)))
    config = run_config(
        folder,
        {"model": str(folder / "base")},
        folder / "rows.jsonl",
        trainer={"max_steps": 1, "enable_model_summary": False},
        model={
            "user_model": {"class_path": "UniformUserModel", "init_args": {"num_tokens": 1}},
            "cache_reference": False,
            "sampling": {"max_new_tokens": 4},
        },
        data={"cache_dir": str(folder / "cache")},
        collapse={"prompts": 0},
    )
    options = ["--data.chat_template_args", "{enable_thinking: false}", "--data.chat_template_date", "2026-05-01"]
    checkpoint = fit(folder, config, *options)
    main(["export", "--model", str(checkpoint), "--output", str(folder / "export")])
    return checkpoint, folder


def test_checkpoints_and_exports_keep_arguments_and_date(dated):
    checkpoint, folder = dated
    for model in (checkpoint, folder / "export"):
        writer = open_writer(model)
        text = writer.tokenizer.decode(writer.prepare(GenerationRequest(row()["prompt"], "ann")).prompt)
        assert text.endswith("<|im_start|>assistant\n01 May 2026<think></think>")


def test_validation_takes_a_checkpoints_date_and_arguments(dated):
    checkpoint, folder = dated
    options = ["--ckpt_path", str(checkpoint), "--data.source.init_args.validation", str(folder / "rows.jsonl")]
    with pytest.warns(UserWarning, match=r"data.chat_template_args was {'enable_thinking': False} and is {}"):
        main(["predict", "-c", str(folder / "config.yaml"), *options])
    (path,) = (folder / "runs").rglob("predictions.jsonl")
    written = path.read_text()
    assert "01 May 2026" in written
    assert datetime.date.today().strftime("%d %b %Y") not in written
