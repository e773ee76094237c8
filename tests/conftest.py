"""Small real models and tokenizers, made on the spot: nothing is downloaded."""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from chat_models import make_model
from hypothesis import settings
from postgres_cluster import Cluster, binaries, running_cluster
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM as AutoLM
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    set_seed,
)

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")
torch.set_num_threads(1)  # the models are so small that threads only wait for one another

_TEXT = "a the cat dog sat ran fast slow red blue sun moon user likes short long answers hello bye yes no"
WORDS = _TEXT.split()
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
VOCAB = len(SPECIAL) + len(WORDS)
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
    "qwen": Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "neox": GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def model_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A saved model with its tokenizer for each architecture."""
    root = tmp_path_factory.mktemp("models")
    for name, config in ARCHITECTURES.items():
        set_seed(0)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
        model = AutoLM.from_config(config)
        for param in model.parameters():
            # Larger than the default start, so that log-probs differ by more than rounding.
            param.data.add_(0.3 * torch.randn_like(param))
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return {name: str(root / name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def model_path(model_paths: dict[str, str]) -> str:
    return model_paths["llama"]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a chat model of a family of `chat_models`, made when it is first asked for."""
    root = tmp_path_factory.mktemp("chat_models")

    @cache
    def made(name: str) -> Path:
        return make_model(name, root / name)

    return made


@pytest.fixture(scope="session", autouse=True)
def _no_arguments_of_pytest() -> Iterator[None]:
    """Keep from a command that is run in this process what pytest was told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prlhf_lightning"])
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    set_seed(0)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).parent.parent


def write_votes(path: Path, users: dict[str, int], seed: int = 0) -> Path:
    """Write `users[id]` votes of each user: some like long answers, some short ones."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for i, (user, count) in enumerate(users.items()):
            for _ in range(count):
                long, short = (" ".join(draw.choices(WORDS, k=k)) for k in (5, 2))
                chosen, rejected = (long, short) if i % 2 else (short, long)
                prompt = " ".join(draw.choices(WORDS, k=3))
                row = {"user_id": user, "prompt": prompt, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(row | {"user_text": "user likes long answers"}) + "\n")
    return path


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    """A training file of four users."""
    return write_votes(tmp_path / "votes.jsonl", {"ann": 12, "bob": 12, "cy": 12, "dee": 12})


def write_thumbs(path: Path, votes: Path) -> Path:
    """Write each vote as a thumb: up for what was chosen, or down for what was rejected, in turn."""
    with path.open("w") as file:
        for number, line in enumerate(votes.read_text().splitlines()):
            vote = json.loads(line)
            chosen, rejected = vote.pop("chosen"), vote.pop("rejected")
            up = number % 2 == 0
            file.write(json.dumps(vote | {"completion": chosen if up else rejected, "label": up}) + "\n")
    return path


@pytest.fixture
def thumbs(votes: Path, tmp_path: Path) -> Path:
    """A training file of four users, who give thumbs."""
    return write_thumbs(tmp_path / "thumbs.jsonl", votes)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_files():
    """No file may be larger than 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL server of the tests' own."""
    pytest.importorskip("psycopg", reason="psycopg, of the extra postgres, is not installed")
    if binaries() is None:
        pytest.skip("PostgreSQL's server (initdb, pg_ctl) is not installed")
    with running_cluster(durable=False) as cluster:
        yield cluster


@pytest.fixture
def postgres_url(postgres: Cluster) -> str:
    """The URL of an empty database of that server."""
    return postgres.new_database()
