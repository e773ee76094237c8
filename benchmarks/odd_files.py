"""Odd files of every kind that a command opens, made of sound ones; see `fuzz_files.py`."""

# ruff: noqa: E501 - one odd file a line
from __future__ import annotations

import copy
import gzip
import io
import json
import math
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml  # type: ignore[import-untyped]  # it has no stubs
from safetensors.torch import load_file, save_file

from prlhf_lightning.training import checkpoint_files

_WORDS = ["a", "the", "cat", "dog", "sat", "ran", "fast", "slow", "red", "blue", "sun", "moon"]
_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
_MANY = 1 << 20


def _deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


#: Stand in the place of any value of a tree of settings.
ODD: list[Any] = [
    None, True, -1, 0, 100_000, 10**12, 10**30, 1e308, math.nan, -math.inf, "", "x", "x" * _MANY, "\x00", "\ud800",
    "\u202e\x1b[31m", "../" * 20 + "etc/passwd", "1e3", [], [None], {}, {"": None}, {"class_path": "os.system"},
    _deep(200), list(range(100_000)),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command, and how the files that it opens are made odd.

    Attributes:
        usual: The command, as `Sound.words` knows it.
        name: What is odd.
        file: Which file of `Sound` is changed, and is the one that the command opens.
        change: Changes a copy of it.
    """

    usual: str
    name: str
    file: str
    change: Callable[[Path], None]


class Sound:
    """Files as they should be, in a folder.

    Attributes:
        folder: It holds `base` (a model), `votes.jsonl`, `new.jsonl`, `run`, `merged` and `adapters` (exports).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def made(cls, folder: Path, run: Callable[[Sequence[str], Path], Any]) -> Sound:
        """Make them, unless they are there.

        Args:
            folder: Where.
            run: Runs a command in a folder.
        """
        folder = folder.absolute()
        if not (folder / "adapters").is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            _write_rows(folder)
            assets = Path(sys.modules["prlhf_lightning"].__path__[0]) / "assets"
            shutil.copytree(assets / "style-lm", folder / "base")
            (folder / "base/chat_template.jinja").write_text(_TEMPLATE)
            checkpoint = "run/checkpoints/last.ckpt"
            for words in (
                [*_training("fit", folder / "base", folder / "votes.jsonl"), "--trainer.default_root_dir=runs"],
                ["export", "--model", "runs/version_0", "--output", "merged"],
                ["export", "--model", "runs/version_0", "--output", "adapters", "--adapters", "true"],
            ):
                found = run(words, folder)
                if found.outcome != "finished":
                    sys.exit(f"{words} failed:\n{found.said}")
            (folder / "runs/version_0").rename(folder / "run")
            assert (folder / checkpoint).is_file()
        return cls(folder)

    def words(self, command: str, here: Path, case: Case | None) -> list[str]:
        """Return the words of a command, whose files lie in `here` where a case has changed them."""
        places = {
            name: self.folder / name for name in ("base", "votes.jsonl", "new.jsonl", "run", "merged", "adapters")
        }
        if case is not None:
            copied = here / case.file
            if places[case.file].is_dir():
                shutil.copytree(places[case.file], copied)
            else:
                shutil.copy(places[case.file], copied)
            places[case.file] = copied
            case.change(copied)
            if not copied.exists():  # it has got another name
                places[case.file] = next(path for path in here.iterdir() if path.name.startswith(copied.stem))
        place = {name.partition(".")[0]: str(path) for name, path in places.items()}
        run, checkpoint = place["run"], f"{place['run']}/checkpoints/last.ckpt"
        base, votes = Path(place["base"]), Path(place["votes"])
        written = ["--prompt", "a cat", "--max_new_tokens", "4", "--device", "cpu"]
        known: dict[str, list[str]] = {
            "generate": ["generate", "--model", checkpoint, "--user", "ann", *written],
            "export": ["export", "--model", checkpoint, "--output", "out"],
            "users list": ["users", "list", "--model", checkpoint],
            "users show": ["users", "show", "--model", checkpoint, "--user", "ann"],
            "users add": ["users", "add", "--model", checkpoint, "--user", "yan", "--output", "out.ckpt"],
            "users remove": ["users", "remove", "--model", checkpoint, "--user", "ann", "--output", "out.ckpt"],
            "users export": ["users", "export", "--model", checkpoint, "--output", "out"],
            "shrink": ["shrink", "--model", checkpoint, "--output", "out.ckpt", "--device", "cpu"],
            "relocate": ["relocate", "--model", checkpoint, "--base", str(base), "--output", "out.ckpt"],
            "adapt": ["adapt", "--model", checkpoint, "--feedback", place["new"], "--device", "cpu"],
            "report": ["report", "--model", run, "--device", "cpu", "--num_users", "1", "--num_prompts", "1",
                       "--max_new_tokens", "2"],
            "serve": ["serve", "--model", checkpoint, "--port", "0", "--feedback_log", "none", "--device", "cpu"],
            "serve merged": ["serve", "--model", place["merged"], "--port", "0", "--feedback_log", "none",
                             "--device", "cpu"],
            "generate merged": ["generate", "--model", place["merged"], "--user", "ann", *written],
            "generate adapters": ["generate", "--model", place["adapters"], "--user", "ann", *written],
            "validate": ["validate", "--ckpt_path", checkpoint, "--trainer.accelerator=cpu", "--trainer.logger=false"],
            "predict": ["predict", f"--config={run}/config.yaml", "--ckpt_path", checkpoint, "--trainer.accelerator=cpu", "--trainer.logger=false",
                        "--model.sampling.max_new_tokens=2"],
            "fit": _training("fit", base, votes),
            "fit --config": ["fit", "--config", f"{run}/config.yaml", "--trainer.max_steps=1"],
            "fit --init_from": [*_training("fit", base, votes), f"--init_from={checkpoint}"],
            "fit --init_from merged": [*_training("fit", Path(place["merged"]), votes), f"--init_from={place['merged']}"],
            "fit --ckpt_path": [*_training("fit", base, votes), f"--ckpt_path={checkpoint}"],
            "data check": ["data", "check", "--source", "FileSource", "--source.train", str(votes)],
            "data convert": ["data", "convert", "--source", "FileSource", "--source.train", str(votes),
                             "--output", "out"],
            "data describe": ["data", "describe", "--source", "FileSource", "--source.train", str(votes),
                              "--output", "out.html"],
        }  # fmt: skip
        return known[command]


def _training(command: str, base: Path, votes: Path) -> list[str]:
    return [
        command, "--model.user_model=IndividualUserModel", "--model.user_model.num_tokens=2",
        "--model.policy=CausalLMPolicy", f"--model.policy.model={base}", "--model.policy.lora.rank=2",
        "--model.loss=DPOLoss", "--data.source=FileSource", f"--data.source.train={votes}",
        "--data.chat_template=true", "--data.batch_size=32", "--data.split_by=pair", "--data.validation_fraction=0.2", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def _write_rows(folder: Path) -> None:
    def row(user: str, number: int) -> dict[str, str]:
        long, short = " ".join(_WORDS[number % 5 : number % 5 + 6]), _WORDS[number % 12]
        chosen, rejected = (long, short) if user in "annbob" else (short, long)
        return {"user_id": user, "prompt": f"{short} {long}", "chosen": chosen, "rejected": rejected}

    rows = [row(user, number) for number in range(12) for user in ("ann", "bob", "cy", "dee")]
    (folder / "votes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "new.jsonl").write_text("".join(json.dumps(row("zoe", number)) + "\n" for number in range(6)))


# ---- trees of settings


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where values stand in a tree; of a long list the first two alone."""
    yield path
    if isinstance(tree, Mapping):
        for key in tree:
            yield from _places(tree[key], (*path, key))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree[:2]):
            yield from _places(value, (*path, number))


def _with(tree: Any, path: Sequence[Any], value: Any) -> Any:
    """Return a tree with another value in a place; Ellipsis takes out what is there."""
    if not path:
        return value
    tree = copy.copy(list(tree) if isinstance(tree, tuple) else tree)
    if len(path) == 1 and value is ...:
        del tree[path[0]]
    else:
        tree[path[0]] = _with(tree[path[0]], path[1:], value)
    return tree


def _odd_trees(tree: Any) -> Iterator[tuple[str, Any]]:
    for path in _places(tree):
        where = ".".join(map(str, path)) or "all of it"
        if path:
            yield f"{where} is missing", _with(tree, path, ...)
        for value in ODD:
            yield f"{where} = {_short(value)}", _with(tree, path, value)


def _short(value: Any) -> str:
    try:
        shown = repr(value)
    except RecursionError:
        shown = "[[[..."
    return shown if len(shown) < 60 else f"{shown[:40]}... ({len(shown)} characters)"


# ---- checkpoints

_CHECKPOINT_COMMANDS = (
    "generate", "export", "users list", "users show", "users add", "users remove", "users export", "shrink", "relocate",
    "adapt", "report", "serve", "validate", "predict", "fit --init_from", "fit --ckpt_path",
)  # fmt: skip


def _odd_tensors(tensor: torch.Tensor) -> Iterator[tuple[str, Any]]:
    yield "NaN", torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor.float()
    yield "infinite", torch.full_like(tensor.float(), math.inf)
    yield "complex", tensor.to(torch.complex64)
    yield "int8", tensor.to(torch.int8)
    yield "bool", tensor.bool()
    yield "float16", tensor.half()
    yield "sparse", tensor.to_sparse()
    yield "empty", torch.empty(0)
    yield "a number", torch.tensor(1.0)
    yield "flat", tensor.flatten()
    yield "transposed", tensor.T.contiguous() if tensor.ndim == 2 else tensor[None]
    yield "no rows", torch.empty(0, *tensor.shape[1:])
    yield "one row more", torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor[None]
    yield "10^12 numbers that are one", torch.zeros(1).expand(10**6, 10**6)
    yield "10^10 rows that are one", torch.zeros(1).expand(10**10, *tensor.shape[1:])
    yield "a meta tensor", torch.empty(tensor.shape, device="meta")
    yield "a parameter", torch.nn.Parameter(tensor.float())


def _checkpoint_changes(content: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    trees = {key: value for key, value in content.items() if key not in ("state_dict", "optimizer_states")}
    for name, tree in _odd_trees(trees):
        if isinstance(tree, Mapping):
            yield name, lambda tree=tree: {**{k: content[k] for k in ("state_dict", "optimizer_states")}, **tree}
        else:
            yield name, lambda tree=tree: tree
    hyper = content["hyper_parameters"]["policy"]["init_args"]
    for rank in (0, -1, 3, 100_000, 10**9, 10**12):
        for command_like in (rank, float(rank)):
            lora = {**hyper["lora"], "rank": command_like}
            yield (
                f"lora.rank = {command_like!r}",
                lambda lora=lora: _with(content, ("hyper_parameters", "policy", "init_args", "lora"), lora),
            )
    for setting in ("num_tokens", "num_clusters", "init_std"):
        for value in ODD:
            yield (
                f"user_model.{setting} = {_short(value)}",
                lambda s=setting, v=value: _with(
                    content, ("hyper_parameters", "user_model", "init_args"), {"num_tokens": 2, s: v}
                ),
            )
    users = content["prlhf_lightning"]["users"]
    for name, others in {
        "twice the same user": [users[0], *users[:-1]],
        "a user more than rows": [*users, "eve"],
        "a user less than rows": users[:-1],
        "a million users": [f"u{n}" for n in range(10**6)],
        "an empty id": ["", *users[1:]],
        "an id of 1 MB": ["x" * _MANY, *users[1:]],
        "an id that escapes": ["\x1b[2J\u202e", *users[1:]],
        "half a surrogate": ["\ud800", *users[1:]],
    }.items():
        yield name, lambda others=others: _with(content, ("prlhf_lightning", "users"), others)
    weights = content["state_dict"]
    names = [*(name for name in weights if "user_model" in name), *[name for name in weights if "lora" in name][:2]]
    for where in names:
        yield f"state_dict without {where}", lambda where=where: _with(content, ("state_dict", where), ...)
        for kind, tensor in _odd_tensors(weights[where]):
            yield f"{where} is {kind}", lambda w=where, t=tensor: _with(content, ("state_dict", w), t)
        for value in ODD:
            yield f"{where} = {_short(value)}", lambda w=where, v=value: _with(content, ("state_dict", w), v)
    for table, row in content["prlhf_lightning"]["new_rows"].items():
        for kind, tensor in _odd_tensors(row):
            path = ("prlhf_lightning", "new_rows", table)
            yield f"new_rows.{table} is {kind}", lambda p=path, t=tensor: _with(content, p, t)
    state = content["optimizer_states"][0]["state"]
    for path in [p for p in _places(content["optimizer_states"]) if len(p) < 5][:40]:
        for value in ODD[:12]:
            yield (
                f"optimizer_states.{path} = {_short(value)}",
                lambda p=path, v=value: _with(content, ("optimizer_states", *p), v),
            )
    first = next(iter(state))
    for key, value in state[first].items():
        if isinstance(value, torch.Tensor):
            for kind, tensor in _odd_tensors(value):
                path = ("optimizer_states", 0, "state", first, key)
                yield f"optimizer's {key} is {kind}", lambda p=path, t=tensor: _with(content, p, t)
    yield "a thing of its own beside", lambda: {**content, "x" * 1000: _deep(200)}
    yield "keys that are no names", lambda: {**content, 7: 7, None: 1, ("a",): 2}
    for other in (None, 1, "x", [], {}, torch.zeros(3), {"state_dict": weights}):
        yield f"instead of all {_short(other)}", lambda other=other: other


def checkpoints(sound: Sound) -> Iterator[Case]:
    """Yield checkpoints whose content is odd and whose checksum is right."""
    content = checkpoint_files.load(sound.folder / "run/checkpoints/last.ckpt")

    def change(make: Callable[[], Any]) -> Callable[[Path], None]:
        def write(run: Path) -> None:
            for path in (run / "checkpoints").glob("*.ckpt"):
                path.unlink()
            checkpoint_files.save(make(), run / "checkpoints/last.ckpt")

        return write

    for name, make in _checkpoint_changes(content):
        for command in _CHECKPOINT_COMMANDS:
            yield Case(command, name, "run", change(make))


# ---- exported folders and base models

_TEMPLATES = {
    "no Jinja": "{% for %}",
    "unclosed": "{% for m in messages %}",
    "loop over 10^9": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "nested loops that write": "{% for i in range(9999) %}{% for j in range(9999) %}{{ messages }}{% endfor %}{% endfor %}",
    "doubled text": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "multiplied text": "{{ 'x' * 10**11 }}",
    "multiplied list": "{{ ([1] * 10**10) | length }}",
    "padded text": "{{ '%0999999999d' % 1 }}",
    "formatted text": "{{ '{:>9999999999}'.format('x') }}",
    "centered text": "{{ 'x' | center(10**10) }}",
    "indented text": "{{ 'x\n' | indent(10**10) }}",
    "power": "{{ 9**9**9 }}",
    "power of powers": "{{ (10**7)**(10**6) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "recursion that branches": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(64) }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "filters over and over": "{% for i in range(99999) %}{{ range(99999) | list | sort | join }}{% endfor %}",
    "one long filter": "{{ range(99999) | map('string') | join | replace('1', 'x' * 99999) | length }}",
    "raises": "{{ raise_exception('no') }}",
    "raises much": "{{ raise_exception('no' * 9999999) }}",
    "raises a trace": "{{ raise_exception('Traceback (most recent call last)\n' * 3) }}",
    "divides by zero": "{{ 1 / 0 }}",
    "undefined": "{{ a.b.c }}",
    "escapes the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "nothing": "",
    "always the same": "hello",
    "a word without the message": "{{ messages[0].role }}",
    "5 MB": "x" * (5 * _MANY) + _TEMPLATE,
    "deep nesting": "{% if 1 %}" * 5000 + "x" + "{% endif %}" * 5000,
    "deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "half a surrogate": "{{ '\\ud800' }}" + _TEMPLATE,
    "NUL": "\x00" + _TEMPLATE,
    "a date": "{{ strftime_now('%Y' * 999999) }}" + _TEMPLATE,
}

_SAFETENSORS = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header of 10^8": struct.pack("<Q", 10**8) + b"{" + b" " * 1000,
    "header that is no JSON": struct.pack("<Q", 8) + b"\xff" * 8,
    "header of a list": struct.pack("<Q", 2) + b"[]",
    "no tensors": struct.pack("<Q", 2) + b"{}",
    "sizes of 10^12": None,
    "deep header": struct.pack("<Q", 20_000) + b"[" * 10_000 + b"]" * 10_000,
    "metadata of 2 MB": None,
}


def _safetensors_of(kind: str) -> bytes:
    raw = _SAFETENSORS[kind]
    if raw is not None:
        return raw
    header: dict[str, Any] = {
        "generic_prompt": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    }
    if kind.startswith("metadata"):
        header = {"__metadata__": {"x": "y" * 2 * _MANY}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def _json_change(name: str, content: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(json.dumps(content))
        _forget_checksums(folder)

    return write


def _forget_checksums(folder: Path) -> None:
    settings = folder / "prlhf.json"
    try:
        content = json.loads(settings.read_text())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(content, dict) and "sha256" in content:
        settings.write_text(json.dumps({**content, "sha256": None}))


def _raw_json() -> Iterator[tuple[str, bytes]]:
    yield "is empty", b""
    yield "is no JSON", b"{"
    yield "is of NUL bytes", b"\0" * 4096
    yield "is not UTF-8", b'{"a": "\xff\xfe"}'
    yield "has a BOM", b"\xef\xbb\xbf{}"
    yield "is 100,000 lists deep", b"[" * 100_000 + b"]" * 100_000
    yield "is 100,000 objects deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    yield "has a number of 10,000 digits", b'{"format": ' + b"9" * 10_000 + b"}"
    yield "is 20 MB of text", b'{"a": "' + b"x" * (20 * _MANY) + b'"}'


def _folder_changes(folder: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    def write(name: str, raw: bytes) -> Callable[[Path], None]:
        def change(place: Path) -> None:
            (place / name).write_bytes(raw)
            _forget_checksums(place)

        return change

    def remove(name: str) -> Callable[[Path], None]:
        def change(place: Path) -> None:
            (place / name).unlink()
            _forget_checksums(place)

        return change

    def as_folder(name: str) -> Callable[[Path], None]:
        def change(place: Path) -> None:
            (place / name).unlink()
            (place / name).mkdir()

        return change

    for path in sorted(folder.iterdir()):
        yield f"{path.name} is missing", remove(path.name)
        yield f"{path.name} is a folder", as_folder(path.name)
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            for what, tree in _odd_trees(content if path.name != "tokenizer.json" else _small(content)):
                yield f"{path.name}: {what}", _json_change(path.name, _whole(tree, content))
            for what, raw in _raw_json():
                yield f"{path.name} {what}", write(path.name, raw)
        if path.suffix == ".safetensors":
            for kind in _SAFETENSORS:
                yield f"{path.name}: {kind}", write(path.name, _safetensors_of(kind))
            weights = load_file(path)
            for where in list(weights)[:2]:
                for kind, tensor in _odd_tensors(weights[where]):
                    if kind not in ("sparse", "a meta tensor", "a parameter") and tensor.numel() < 10**9:
                        yield f"{path.name}: {where} is {kind}", _tensor_change(path.name, weights | {where: tensor})


def _small(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer without the words of its vocabulary, of which none is more odd than another."""
    return _with(tokenizer, ("model", "vocab"), "VOCABULARY")


def _whole(tree: Any, tokenizer: dict[str, Any]) -> Any:
    is_small = (
        isinstance(tree, dict) and isinstance(tree.get("model"), dict) and tree["model"].get("vocab") == "VOCABULARY"
    )
    return _with(tree, ("model", "vocab"), tokenizer["model"]["vocab"]) if is_small else tree


def _tensor_change(name: str, weights: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / name)
        _forget_checksums(folder)

    return change


def exports(sound: Sound) -> Iterator[Case]:
    """Yield exported folders with odd settings, users, tokenizers, configurations and weights."""
    for kind, commands in {
        "merged": ("generate merged", "serve merged", "fit --init_from merged"),
        "adapters": ("generate adapters",),
    }.items():
        for name, change in _folder_changes(sound.folder / kind):
            for command in commands:
                yield Case(command, name, kind, change)


def bases(sound: Sound) -> Iterator[Case]:
    """Yield base models of the same kinds."""
    for name, change in _folder_changes(sound.folder / "base"):
        yield Case("fit", name, "base", change)


def templates(sound: Sound) -> Iterator[Case]:
    """Yield chat templates that never end, or that nobody can render."""
    for name, text in _TEMPLATES.items():

        def change(folder: Path, text: str = text) -> None:
            (folder / "chat_template.jinja").write_bytes(text.encode("utf-8", "surrogatepass"))
            _forget_checksums(folder)

        yield Case("fit", name, "base", change)
        for command in ("generate merged", "serve merged"):
            yield Case(command, name, "merged", change)


# ---- runs and configurations

_YAML = {
    "billion laughs": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(9)),
    "a cycle": "data: &d {source: *d}\nmodel: &m {policy: *m}\n",
    "a tag that runs": "data: !!python/object/apply:os.system ['true']\n",
    "deep": "[" * 20_000,
    "no YAML": "a: b: c: [\n",
    "tabs": "\tdata:\n\t\tsource: 1\n",
    "two documents": "---\na: 1\n---\nb: 2\n",
    "NUL": "data: \x00\n",
    "a list": "- 1\n- 2\n",
    "a number": "1\n",
    "nothing": "",
    "keys twice": "data: {}\ndata: {}\n",
    "odd keys": "? [1, 2]\n: 3\n? {a: b}\n: 4\n1: 2\nnull: 3\n",
    "10 MB": "a: '" + "x" * (10 * _MANY) + "'\n",
    "a number of 10,000 digits": "seed_everything: " + "9" * 10_000 + "\n",
    "in another encoding": "\ufeffdata: é\n",
}
_TABLES: dict[str, bytes] = {
    "nothing": b"",
    "NUL": b"\0" * 5000,
    "not UTF-8": b"step,train/loss\n1,\xff\n",
    "a line of 5 MB": b"step,train/loss\n1," + b"1" * (5 * _MANY) + b"\n",
    "words": b"step,train/loss\nx,y\n",
    "more cells than columns": b"step,user_id\n1,2,3,4,5\n",
    "less cells than columns": b"step,user_id,accuracy,pairs\n1\n",
    "NaN and infinity": b"step,train/loss,val/seen/accuracy\nnan,inf,-inf\n1e308,1e400,nan\n",
    "negative and huge steps": b"step,train/loss,val/seen/accuracy\n-1,-1,-1\n1e300,1,1\n",
    "no step": b"train/loss\n1\n",
    "odd names": "step,\u202e\x1b[31m,<script>\n1,1,1\n".encode(),
    "a quote that stays open": b'step,train/loss\n1,"2\n3,4\n',
    "a column of no name": b"step,,\n1,2,3\n",
    "users": b"user_id,accuracy,pairs\nann,2,-1\nann,nan,1e30\n,,\n",
    "users without numbers": b"user_id,accuracy,pairs\nann,,\n",
}


def runs(sound: Sound) -> Iterator[Case]:
    """Yield a run's folder with an odd configuration, odd metrics and odd tables of users."""
    content = yaml.safe_load((sound.folder / "run/config.yaml").read_text())
    commands = ("fit --config", "validate", "predict", "report")

    def text_change(name: str, raw: bytes) -> Callable[[Path], None]:
        return lambda run: (run / name).write_bytes(raw) and None

    for name, tree in _odd_trees(content):
        for command in commands:
            yield Case(command, f"config.yaml: {name}", "run", lambda run, t=tree: (run / "config.yaml").write_text(
                yaml.safe_dump(t, allow_unicode=True)) and None)  # fmt: skip
    for name, text in _YAML.items():
        raw = text.encode("utf-16" if name == "in another encoding" else "utf-8")
        for command in commands:
            yield Case(command, f"config.yaml: {name}", "run", text_change("config.yaml", raw))
    for file in ("metrics.csv", "users_seen.csv"):
        for name, table in _TABLES.items():
            yield Case("report", f"{file}: {name}", "run", text_change(file, table))
    for name, raw in _raw_json():
        yield Case("report", f"comparison.json {name}", "run", text_change("comparison.json", raw))
    for value in ODD:
        raw = json.dumps({"vanilla": {"accuracy": value}, "personalized": value}).encode()
        yield Case("report", f"comparison.json: {_short(value)}", "run", text_change("comparison.json", raw))


# ---- data

_ROW = {"user_id": "ann", "prompt": "a cat", "chosen": "the sun", "rejected": "a dog"}


def _data_files() -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    line = json.dumps(_ROW).encode() + b"\n"
    for field in _ROW:
        yield f"no {field}", "jsonl", lambda f=field: json.dumps({k: v for k, v in _ROW.items() if k != f}).encode()
        for value in [
            *ODD,
            [{"role": "user"}],
            [{"role": 1, "content": 2}],
            [{"role": "assistant", "content": _deep(50)}],
        ]:
            yield (
                f"{field} = {_short(value)}",
                "jsonl",
                lambda f=field, v=value: line * 3 + json.dumps({**_ROW, f: v}).encode(),
            )
    for field in ("tools", "user_text", "label", "completion", "winner", "response_a", "messages"):
        for value in ODD:
            yield (
                f"also {field} = {_short(value)}",
                "jsonl",
                lambda f=field, v=value: line * 3 + json.dumps({**_ROW, f: v}).encode(),
            )
    raw: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "line breaks only": lambda: b"\n" * 1000,
        "NUL bytes": lambda: line + b"\0" * 4096,
        "NUL in between": lambda: line + line.replace(b"cat", b"c\0t"),
        "not UTF-8": lambda: line + line.replace(b"cat", b"c\xfft"),
        "UTF-16": lambda: (line * 3).decode().encode("utf-16"),
        "a BOM": lambda: b"\xef\xbb\xbf" + line * 12,
        "half a line": lambda: line * 3 + line[:20],
        "a line of 100 MB": lambda: line + json.dumps({**_ROW, "prompt": "x " * (50 * _MANY)}).encode(),
        "a line of 100 MB that is no JSON": lambda: line + b"x" * (100 * _MANY),
        "100,000 lists deep": lambda: line + b"[" * 100_000 + b"]" * 100_000,
        "100,000 objects deep": lambda: line + b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "deep in a field": lambda: line + b'{"user_id": "a", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        "a number of 10,000 digits": lambda: line + b'{"user_id": ' + b"9" * 10_000 + b"}",
        "NaN": lambda: line + b'{"user_id": NaN, "prompt": Infinity}',
        "keys twice": lambda: b'{"user_id": "a", "user_id": "b", "prompt": "p", "chosen": "c", "rejected": "r"}\n',
        "lists for rows": lambda: b"[1, 2]\n[3]\n",
        "numbers for rows": lambda: b"1\n2\n",
        "100,000 columns": lambda: json.dumps({**_ROW, **{f"c{n}": n for n in range(100_000)}}).encode(),
        "gzip by another name": lambda: gzip.compress(line * 3),
        "parquet by another name": lambda: _parquet(pa.table({k: [v] * 3 for k, v in _ROW.items()})),
    }
    for name, make in raw.items():
        yield name, "jsonl", make
    for name, make in {
        "empty": lambda: b"",
        "no list": lambda: b"{}",
        "an object of rows": lambda: json.dumps({"data": [_ROW] * 12}).encode(),
        "a list of numbers": lambda: b"[1, 2, 3]",
        "cut off": lambda: json.dumps([_ROW] * 3).encode()[:-9],
        "100,000 lists deep": lambda: b"[" * 100_000 + b"]" * 100_000,
    }.items():
        yield name, "json", make
    head, row = ",".join(_ROW).encode() + b"\n", ",".join(_ROW.values()).encode() + b"\n"
    for name, make in {
        "empty": lambda: b"",
        "head only": lambda: head,
        "columns twice": lambda: b"user_id,user_id,prompt,chosen,rejected\na,b,c,d,e\n",
        "more cells than columns": lambda: head + row + b"1,2,3,4,5,6,7\n",
        "less cells than columns": lambda: head + row + b"1\n",
        "a quote that stays open": lambda: head + row + b'ann,"open\n' * 50_000,
        "a cell of 10 MB": lambda: head + b'ann,"' + b"x" * (10 * _MANY) + b'",a,b\n',
        "NUL": lambda: head + row + b"\0" * 1000 + b"\n",
        "UTF-16": lambda: (head + row * 3).decode().encode("utf-16"),
        "Latin-1": lambda: head + row * 3 + "ann,é,ü,ö\n".encode("latin-1"),
        "semicolons": lambda: (head + row * 12).replace(b",", b";"),
        "old Macs' line breaks": lambda: (head + row * 12).replace(b"\n", b"\r"),
        "100,000 columns": lambda: b",".join(b"c%d" % n for n in range(100_000)) + b"\n" + b"," * 99_999 + b"\n",
        "formulas": lambda: head + row.replace(b"ann", b"=cmd|' /C calc'!A0") * 6,
    }.items():
        yield name, "csv", make
    for name, make in {
        "a bomb": lambda: gzip.compress(b"x" * (1024 * _MANY), 9),
        "a bomb of lines": lambda: gzip.compress(b"\n" * (1024 * _MANY), 9),
        "a bomb of rows": lambda: gzip.compress(line * 1_000_000, 1),
        "cut off": lambda: gzip.compress(line * 300)[:-9],
        "flipped": lambda: gzip.compress(line * 300)[:40] + b"\xff\xff" + gzip.compress(line * 300)[42:],
        "no gzip": lambda: line * 3,
        "empty": lambda: b"",
    }.items():
        yield name, "jsonl.gz", make
    columns: dict[str, Callable[[], Any]] = {
        "integers": lambda: pa.array([1, 2, 3]),
        "floats": lambda: pa.array([1.5, math.nan, math.inf]),
        "booleans": lambda: pa.array([True, False, None]),
        "dates": lambda: pa.array([1, 2, 3], pa.timestamp("ns", tz="Asia/Tokyo")),
        "binary": lambda: pa.array([b"\xff", b"a", b""]),
        "decimals": lambda: pa.array(["1.1", "2", "3"]).cast(pa.decimal128(38, 2)),
        "lists of numbers": lambda: pa.array([[1], [2, 3], []]),
        "structs": lambda: pa.array([{"role": "user", "content": 1}] * 3),
        "maps": lambda: pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
        "dictionaries": lambda: pa.array(["a", "b", "a"]).dictionary_encode(),
        "nulls": lambda: pa.nulls(3),
        "large strings": lambda: pa.array(["a", "b", "c"], pa.large_string()),
        "durations": lambda: pa.array([1, 2, 3], pa.duration("s")),
        "unsigned": lambda: pa.array([2**63, 1, 2], pa.uint64()),
    }
    for field in _ROW:
        for kind, array in columns.items():
            yield (
                f"{field} of {kind}",
                "parquet",
                lambda f=field, a=array: _parquet(pa.table({**{k: [v] * 3 for k, v in _ROW.items()}, f: a()})),
            )
    table = pa.table({k: [v] * 3 for k, v in _ROW.items()})
    for name, make in {
        "no rows": lambda: _parquet(table[:0]),
        "no columns": lambda: _parquet(pa.table({})),
        "empty": lambda: b"",
        "cut off": lambda: _parquet(table)[:-5],
        "zeros in the middle": lambda: _parquet(table)[:40] + b"\0" * 40 + _parquet(table)[80:],
        "a footer of zeros": lambda: _parquet(table)[:-60] + b"\0" * 52 + _parquet(table)[-8:],
        "10^7 rows that are one": lambda: _parquet(pa.table({k: _same(v, 10**7) for k, v in _ROW.items()})),
        "columns twice": lambda: _parquet(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["user_id", "user_id"])),
    }.items():  # fmt: skip
        yield name, "parquet", make


def _same(value: str, count: int) -> pa.Array:
    places = pa.Array.from_buffers(pa.int32(), count, [None, pa.py_buffer(bytes(4 * count))])
    return pa.DictionaryArray.from_arrays(places, pa.array([value]))


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def data(sound: Sound) -> Iterator[Case]:
    """Yield files of feedback that are odd."""
    for name, ending, make in _data_files():
        for command in ("data check", "data convert", "data describe", "fit", "adapt"):

            def change(path: Path, ending: str = ending, make: Callable[[], bytes] = make) -> None:
                path.unlink()
                path.with_suffix(f".{ending}").write_bytes(make())

            yield Case(command, f"{ending}: {name}", "new.jsonl" if command == "adapt" else "votes.jsonl", change)


KINDS: dict[str, Callable[[Sound], Iterator[Case]]] = {
    "checkpoint": checkpoints,
    "export": exports,
    "base": bases,
    "template": templates,
    "run": runs,
    "data": data,
}
