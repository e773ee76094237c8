"""A server with a real model: in this process, and in one that is told to end."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter

import httpx
import pytest
import torch
from serving_helpers import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from prlhf_lightning.cli.main import main
from prlhf_lightning.data.feedback_log import FeedbackLog
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.inference import Engine, GenerationRequest, Generator
from prlhf_lightning.serving.services import Services
from prlhf_lightning.simulation.grammar import PROMPTS
from prlhf_lightning.user_models import IndividualUserModel

USERS = [f"user-{i}" for i in range(64)]


@pytest.fixture(scope="module")
def writer(repo_root):
    """The shipped model, with a soft prompt for each of many users that is far from all others'."""
    folder = repo_root / "prlhf_lightning/assets/style-lm"
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    users = IndividualUserModel(num_tokens=4)
    torch.manual_seed(0)
    words = lm.get_input_embeddings().weight.detach()
    users.build(len(USERS) + 1, words)
    with torch.no_grad():
        for parameter in users.parameters():
            parameter.normal_(std=float(words.std()) * 3)
    return Generator(lm, tokenizer, users, UserVocabulary(USERS), "style-lm")


def test_64_streams_at_once_are_what_each_is_alone(writer):
    asked = [
        GenerationRequest(PROMPTS[i % len(PROMPTS)], user, max_new_tokens=24, temperature=1.0, seed=i)
        for i, user in enumerate(USERS)
    ]
    alone = [writer.generate([generation])[0].text for generation in asked]
    assert Counter(alone).most_common(1)[0][1] < 5  # else they could be exchanged unseen

    async def ask(client, generation):
        body = {"model": "style-lm", "prompt": generation.prompt, "user": generation.user, "seed": generation.seed}
        lines = (await client.post("/v1/completions", json=body | {"max_tokens": 24, "stream": True})).text.split(
            "\n\n"
        )
        return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {"))

    async def ask_all(url):
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            return await asyncio.gather(*(ask(client, generation) for generation in asked))

    with serving(Services(writer, lambda: Engine(writer))) as url:
        assert asyncio.run(ask_all(url)) == alone


def test_a_stop_string_ends_a_stream_wherever_its_tokens_begin(writer):
    whole = writer.generate([GenerationRequest(PROMPTS[0], USERS[0], max_new_tokens=24, temperature=1.0, seed=1)])[0]
    ask = {"model": "style-lm", "prompt": PROMPTS[0], "user": USERS[0], "seed": 1, "max_tokens": 24, "stream": True}
    with serving(Services(writer, lambda: Engine(writer))) as url, httpx.Client(base_url=url) as client:
        for begin in range(2, len(whole.text) - 5, 5):
            stop = whole.text[begin : begin + 5]
            more = {"stop": ["not there", stop], "stream_options": {"include_usage": True}}
            lines = client.post("/v1/completions", json=ask | more).text.split("\n\n")
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            pieces = [event["choices"][0] for event in events if event["choices"]]
            assert "".join(piece["text"] for piece in pieces) == whole.text.split(stop)[0]
            assert pieces[-1]["finish_reason"] == "stop"
            written = writer.tokenizer.decode(whole.ids[: events[-1]["usage"]["completion_tokens"]])
            assert stop in written


def test_usage_counts_what_was_read_and_written(writer):
    alone = writer.generate([GenerationRequest(PROMPTS[0], USERS[0], max_new_tokens=9)])[0]
    ask = {"model": "style-lm", "prompt": PROMPTS[0], "user": USERS[0], "max_tokens": 9, "temperature": 0}
    with serving(Services(writer, lambda: Engine(writer))) as url:
        usage = httpx.post(f"{url}/v1/completions", json=ask).json()["usage"]
    read, written = len(writer.tokenizer(PROMPTS[0])["input_ids"]), len(alone.ids)
    assert usage == {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


SERVER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from serving_helpers import EchoEngine, writer
from prlhf_lightning.serving import server
from prlhf_lightning.serving.limits import Limits
server.Engine = lambda *_: EchoEngine(0.02)
server.run(lambda: (writer(), None, None), "127.0.0.1", 0, sys.argv[3], None, Limits(), 10)
"""


def test_sigterm_ends_a_server_after_what_it_is_writing(tmp_path, repo_root):
    url, log = str(tmp_path / "feedback.db"), tmp_path / "log"
    paths = [str(repo_root / "tests"), str(repo_root / "tests/serving")]
    with log.open("w") as file, subprocess.Popen([sys.executable, "-c", SERVER, *paths, url], stderr=file) as process:
        while "startup complete" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        address = log.read_text().split(" at ")[1].split()[0]
        assert httpx.get(f"{address}/healthz", headers={"host": "evil.com"}).status_code == 403
        pair = {"user": "ann", "prompt": "secret", "chosen": "secret", "rejected": "no"}
        assert httpx.post(f"{address}/v1/feedback", json=pair).status_code == 201
        asked = {"model": "echo", "prompt": "secret " * 40, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=asked) as response:
            process.send_signal(signal.SIGTERM)
            assert response.read().endswith(b"data: [DONE]\n\n")
    said = log.read_text()
    assert process.returncode == 0, said
    routes = [json.loads(line)["route"] for line in said.splitlines() if line.startswith("{")]
    assert routes == ["none", "/v1/feedback", "/v1/completions"]
    assert "POST" not in "".join(line for line in said.splitlines() if not line.startswith("{"))
    assert "secret" not in said
    assert FeedbackLog(url).extent().rows == 1


def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "prlhf_lightning.serving.server", raising=False)
    with pytest.raises(SystemExit, match=r"serve needs uvicorn.*: pip install 'prlhf-lightning\[serve\]'"):
        main(["serve", "--model", str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--port", "99999"], "can't listen on 127.0.0.1 port 99999"),
        (["--allowed_hosts", "a", "b", "--port", "99999"], "can't listen"),
        (["--max_open", "0"], "max_open is 0"),
        (["--keys", "nowhere.toml"], "keys: nowhere.toml can't be read"),
        (["--port", "0", "--feedback_log", "nowhere/x.db"], "can't be used now"),
    ],
)
def test_what_keeps_a_server_from_starting_is_said(tmp_path, options, says):
    with pytest.raises(SystemExit, match=says):
        main(["serve", "--model", str(tmp_path), *options])


def test_a_key_is_made_by_a_command(capsys):
    main(["api-key", "--name", "team", "--user_pattern", "a-*"])
    said = capsys.readouterr().out
    assert 'users = "a-*"' in said
    assert "sk-" in said
