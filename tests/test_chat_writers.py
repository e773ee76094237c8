"""All writers write what plain transformers writes with the base model, and stop where it stops."""

from __future__ import annotations

import json

import httpx
import pytest
import torch
from chat_models import ANSWERS, FAMILIES
from serving.serving_helpers import serving
from short_runs import fit, run_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from prlhf_lightning import PersonalizedLM, Sampling
from prlhf_lightning.cli.main import main
from prlhf_lightning.cli.models import open_writer
from prlhf_lightning.data.records import FeedbackRecord
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError
from prlhf_lightning.inference import Engine, GenerationRequest
from prlhf_lightning.serving.services import Services

GREEDY = Sampling(max_new_tokens=40, temperature=0.0)


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def by_transformers(folder, question, config=None, **how) -> list[int]:
    """Return the tokens that plain transformers writes."""
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    if config is not None:
        lm.generation_config = config
    ids = tokenizer.apply_chat_template(
        ask(question), add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    written = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, **how)
    return written[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def trained(family, chat_model, tmp_path_factory):
    """A checkpoint and exports of a chat model that training has left as it was, and the base's folder."""
    base, folder = chat_model(family), tmp_path_factory.mktemp(family)
    with (folder / "rows.jsonl").open("w") as file:
        for user in ("ann", "bob"):
            for question, text in ANSWERS.items():
                answers = {"chosen": text, "rejected": "No."}
                rows = {name: [{"role": "assistant", "content": said}] for name, said in answers.items()}
                file.write(json.dumps({"user_id": user, "prompt": ask(question), **rows}) + "\n")
    rows = str(folder / "rows.jsonl")
    config = run_config(
        folder,
        {"model": str(base)},
        rows,
        trainer={"max_steps": 1, "enable_model_summary": False},
        model={
            "user_model": {"class_path": "UniformUserModel", "init_args": {"num_tokens": 0}},
            "optim": {"lr": 1e-9, "user_lr": 1e-9},
            "cache_reference": False,
            "sampling": {"max_new_tokens": 40, "temperature": 0.0},
        },
        data={
            "source": {"class_path": "FileSource", "init_args": {"train": rows, "validation": rows}},
            "cache_dir": str(folder / "cache"),
        },
        collapse={"prompts": 0},
    )
    checkpoint = fit(folder, config)
    for kind, options in (("whole", []), ("adapters", ["--adapters", "true"])):
        main(["export", "--model", str(checkpoint), "--output", str(folder / kind), *options])
    return base, checkpoint, folder


@pytest.fixture(scope="module")
def expected(family, chat_model):
    """The tokens of each answer as plain transformers writes them, which are those of the answers known by heart."""
    ends = list(FAMILIES[family].ends)
    tokenizer = AutoTokenizer.from_pretrained(chat_model(family))
    neutral = GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])
    written = {question: tuple(by_transformers(chat_model(family), question, neutral)) for question in ANSWERS}
    texts = {question: tokenizer.decode(ids, skip_special_tokens=True) for question, ids in written.items()}
    assert texts == ANSWERS
    assert all(ids[-1] in ends for ids in written.values())
    return written


def test_the_bases_generation_config_stops_at_the_same_token(family, chat_model, expected):
    if family != "chatml-over-base":  # whose makers left the end of a turn out
        assert tuple(by_transformers(chat_model(family), next(iter(ANSWERS)))) == next(iter(expected.values()))


@pytest.mark.parametrize("kind", ["checkpoint", "whole", "adapters"])
def test_the_engine_stops_and_shows_no_special_token(trained, expected, kind):
    _, checkpoint, folder = trained
    writer = open_writer(checkpoint if kind == "checkpoint" else folder / kind)
    written = writer.generate([GenerationRequest(ask(question), max_new_tokens=40) for question in ANSWERS])
    assert [answer.ids for answer in written] == list(expected.values())
    assert [answer.text for answer in written] == list(ANSWERS.values())
    assert {answer.finish_reason for answer in written} == {"stop"}
    streamed = writer.stream(GenerationRequest(ask(next(iter(ANSWERS))), max_new_tokens=40))
    assert "".join(piece.text for piece in streamed) == next(iter(ANSWERS.values()))


@pytest.mark.parametrize("one_by_one", [False, True], ids=["by transformers' generate", "one sequence at a time"])
def test_the_policy_stops(trained, expected, one_by_one):
    module = PersonalizedLM.load_from_checkpoint(trained[1])
    module.policy._writes_in_batches = not one_by_one
    written = module.generate([ask(question) for question in ANSWERS], ["ann"] * len(ANSWERS), sampling=GREEDY)
    assert written == list(ANSWERS.values())


def test_the_commands_stop(trained):
    _, checkpoint, folder = trained
    with (folder / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": ask(question)}) + "\n" for question in ANSWERS)
    options = ["--prompts", folder / "prompts.jsonl", "--output", folder / "answers.jsonl", "--max_new_tokens", "40"]
    main(["generate", "--model", str(checkpoint), *map(str, options)])
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [(row["completion"], row["finish_reason"]) for row in rows] == [(text, "stop") for text in ANSWERS.values()]
    main(["predict", "-c", str(folder / "config.yaml"), "--ckpt_path", str(checkpoint)])
    (path,) = (folder / "runs").rglob("predictions.jsonl")
    assert {json.loads(line)["completion"] for line in path.read_text().splitlines()} == set(ANSWERS.values())
    path.unlink()


def test_the_server_stops(trained):
    writer = open_writer(trained[1])
    writer.name = "m"
    with serving(Services(writer, lambda: Engine(writer))) as url:
        for question, text in ANSWERS.items():
            body = {"model": "m", "messages": ask(question), "temperature": 0, "max_tokens": 40}
            (choice,) = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


def test_an_answer_is_continued_where_that_is_asked(trained, tmp_path, expected):
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    question = next(iter(expected))
    whole = ANSWERS[question]
    begun, rest = whole[:9], whole[9:]
    assert (begun, rest[0]) == ("Go to bed", " ")
    turns = [*ask(question), {"role": "assistant", "content": begun}]
    writer = open_writer(trained[1])
    (written,) = writer.generate([GenerationRequest(turns, max_new_tokens=40, continue_final_message=True)])
    assert (written.text, written.finish_reason) == (rest, "stop")
    prompt = tokenizer.apply_chat_template(turns, continue_final_message=True, return_dict=False)
    assert writer.prepare(GenerationRequest(turns, continue_final_message=True)).prompt == prompt
    writer.name = "m"
    with serving(Services(writer, lambda: Engine(writer))) as url:
        body = {"model": "m", "messages": turns, "temperature": 0, "add_generation_prompt": False}
        body["continue_final_message"] = True
        (choice,) = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"]
    assert choice["message"]["content"] == rest
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": turns}))
    options = ["--prompts", tmp_path / "p.jsonl", "--output", tmp_path / "o.jsonl", "--continue_final_message", "true"]
    main(["generate", "--model", str(trained[1]), *map(str, options)])
    assert json.loads((tmp_path / "o.jsonl").read_text())["completion"] == rest


def test_a_conversation_that_ends_with_an_answer_is_refused(trained):
    turns = [*ask("What"), {"role": "assistant", "content": "Go"}]
    writer = open_writer(trained[1])
    with pytest.raises(FeedbackFormatError, match="ends with a message of the assistant"):
        writer.generate([GenerationRequest(turns)])
    with pytest.raises(FeedbackFormatError, match="does not end with a message of the assistant"):
        writer.generate([GenerationRequest(ask("What"), continue_final_message=True)])
    with pytest.raises(ConfigurationError, match="the last message is the assistant's"):
        PersonalizedLM.load_from_checkpoint(trained[1]).generate([turns], ["ann"])


def test_empty_answers_and_long_prompts_are_as_in_other_servers(trained):
    writer = open_writer(trained[1])
    writer.name = "m"
    with serving(Services(writer, lambda: Engine(writer))) as url:
        turns = [*ask("What"), {"role": "assistant", "content": ""}, *ask("What helps to sleep?")]
        body = {"model": "m", "messages": turns, "max_tokens": 3}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        error = httpx.post(f"{url}/v1/chat/completions", json=body | {"messages": ask("what " * 300)}).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        error = httpx.post(f"{url}/v1/chat/completions", json=body | {"user_text": "old"}).json()["error"]
        assert (error["code"], error["param"]) == ("refused", "user_text")


def test_a_plain_prompt_to_a_model_of_conversations_is_answered(trained, capsys):
    _, checkpoint, folder = trained
    for model in (checkpoint, folder / "whole"):
        for question, text in ANSWERS.items():
            main(["generate", "--model", str(model), "--prompt", question, "--max_new_tokens", "40"])
            assert capsys.readouterr().out == text + "\n"
    module = PersonalizedLM.load_from_checkpoint(checkpoint)
    assert module.generate(list(ANSWERS), ["ann"] * 3, sampling=GREEDY) == list(ANSWERS.values())
    writer = open_writer(folder / "adapters")
    writer.name = "m"
    with serving(Services(writer, lambda: Engine(writer))) as url:
        for question, text in ANSWERS.items():
            body = {"model": "m", "prompt": question, "temperature": 0, "max_tokens": 40}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"] == text


def test_plain_rows_of_new_users_become_conversation_ids(trained):
    module = PersonalizedLM.load_from_checkpoint(trained[1])
    encode = FeedbackTokenizer(module.policy.tokenizer, module.tokenization)
    question, text = next(iter(ANSWERS.items()))
    turns = [[{"role": "assistant", "content": said}] for said in (text, "No.")]
    records = [FeedbackRecord("eve", question, text, "No."), FeedbackRecord("eve", ask(question), *turns)]
    plain, conversation = (encode([record], ["row 1"])[0] for record in records)
    assert [ids.tolist() for ids in plain] == [ids.tolist() for ids in conversation]


@pytest.mark.parametrize("output", [False, True], ids=["streamed", "to a file"])
def test_an_empty_answer_is_told_with_what_may_help(family, trained, tmp_path, capsys, monkeypatch, output):
    end = FAMILIES[family].ends[0]
    monkeypatch.setattr(
        "prlhf_lightning.inference.engine.sample_tokens", lambda logits, *_: torch.full((len(logits),), end)
    )
    options = ["--output", str(tmp_path / "answers.jsonl")] if output else []
    main(["generate", "--model", str(trained[1]), "--prompt", "What", "--chat_template", "false", *options])
    assert "1 of 1 answers are empty: the model ended them at once." in (told := capsys.readouterr().err)
    assert "`--chat_template true`" in told
    main(["generate", "--model", str(trained[1]), "--prompt", "What", *options])
    assert "`--chat_template true`" not in capsys.readouterr().err


def test_a_plain_prompt_is_taken_as_it_stands_on_request(trained):
    base, checkpoint, _ = trained
    tokenizer, lm = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([tokenizer("What helps")["input_ids"]])
    expected = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[0]
    raw = GenerationRequest("What helps", max_new_tokens=4, chat_template=False)
    writer = open_writer(checkpoint)
    (written,) = writer.generate([raw])
    whole, start = (tokenizer.decode(part, skip_special_tokens=True) for part in (expected, ids[0]))
    text = whole.removeprefix(start)
    assert written.text == text
    assert text.startswith(" to")  # with the space that SentencePiece's tokenizers leave out at the start of a text
    assert "".join(piece.text for piece in writer.stream(raw)) == text
    module = PersonalizedLM.load_from_checkpoint(checkpoint)
    how = {"sampling": Sampling(4, 0.0), "chat_template": False}
    assert module.generate(["What helps"], ["ann"], **how) == [text]


def test_plain_transformers_stops_with_the_exported_folder(family, trained, expected):
    folder = trained[2] / "whole"
    assert {question: tuple(by_transformers(folder, question)) for question in ANSWERS} == expected
    eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert set(eos if isinstance(eos, list) else [eos]) == set(FAMILIES[family].ends)
