"""Damages every file that is read, one bit at a time, and counts what becomes of each when it is opened as users do.

    OMP_NUM_THREADS=1 python benchmarks/bit_flips.py                       # 500 bits of each kind of file
    OMP_NUM_THREADS=1 python benchmarks/bit_flips.py --only export --count 50 --show

Half of the bits are spread over a kind's files by their size, and half fall on each file alike. For every ten of them
there are also a file that is cut off, one with a page of zeros, and one that is exchanged for its namesake of a sister
(another cache, another export). What becomes of each:

- *refused*: one line that names the file or its folder,
- *told*: it opens, and one message or more name what was damaged; so a cache that is made anew,
- *harmless*: it opens without a word, and all that comes of it is as it was,
- *several lines*, *unnamed*: an error of ours that is not one line, or names no file,
- *trace*: an error that the command line shows with a stack trace,
- *silent*: it opens without a word, and something else comes of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_checkpoint import truncate, zero_page
from transformers import AutoTokenizer

from prlhf_lightning.cli import main as cli
from prlhf_lightning.cli.models import load_module, open_writer
from prlhf_lightning.data import FileSource
from prlhf_lightning.data.feedback_log import Feedback, FeedbackLog
from prlhf_lightning.data.holdout import count_users
from prlhf_lightning.data.records import Columns, parse_record
from prlhf_lightning.data.sources.base import read
from prlhf_lightning.data.store import FeedbackCache
from prlhf_lightning.data.tokenization import TokenizationSettings, tokenizer_identity
from prlhf_lightning.errors import PRLHFError
from prlhf_lightning.inference import Generator
from prlhf_lightning.policies import CausalLMPolicy, causal_lm
from prlhf_lightning.training import PersonalizedLM, checkpoint_files
from prlhf_lightning.training.reference_cache import ReferenceCache
from prlhf_lightning.utils import shipped

SLOW = 5.0  # seconds, more than which is told


@dataclass
class Kind:
    """Files that are read together.

    Attributes:
        folder: Where they are. It is put right after each damage.
        open: Opens them as a command does, and returns all that comes of them, as a text.
        files: Names of those that are damaged, all by default.
        sister: A folder with files of the same names and other content.
    """

    folder: Path
    open: Callable[[], str]
    files: list[str] | None = None
    sister: Path | None = None

    def names(self) -> list[str]:
        """Return the names of the files that are damaged."""
        found = (str(path.relative_to(self.folder)) for path in sorted(self.folder.rglob("*")) if path.is_file())
        return self.files or list(found)


def flip(raw: bytes, draw: random.Random) -> bytes:
    """Turn over one bit."""
    damaged = bytearray(raw)
    damaged[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def cut(raw: bytes, draw: random.Random) -> bytes:
    """Cut a file off; nothing may be left."""
    return truncate(raw, draw) if len(raw) > 200 else raw[: draw.randrange(len(raw))]


@dataclass
class Trial:
    """What became of one damage."""

    kind: str
    file: str
    damage: str
    outcome: str
    said: str
    seconds: float


def trials(name: str, kind: Kind, count: int, seed: int) -> Iterator[Trial]:
    """Damage the files of a kind one at a time, `count` times by a bit, and tell what becomes of each."""
    draw = random.Random(f"{seed} {name}")
    names = kind.names()
    sound = {file: (kind.folder / file).read_bytes() for file in names}
    spare = kind.folder.with_name(f"{kind.folder.name}.sound")
    shutil.copytree(kind.folder, spare)
    with _listening() as said:
        expected = kind.open()
        assert kind.open() == expected, f"{name} differs from one time to the next"
    assert not said, f"{name}: {said} of files that are sound"
    filled = [file for file in names if sound[file]]
    for number in range(count + 3 * (count // 10)):
        damage = flip if number < count else (cut, zero_page, None)[number % 3]
        by_size = draw.choices(filled, [len(sound[file]) for file in filled])[0]
        file = by_size if number % 2 else filled[number // 2 % len(filled)]
        if damage is None:
            sister = kind.sister / file if kind.sister else None
            if sister is None or not sister.is_file():
                continue
            damaged = sister.read_bytes()
        else:
            damaged = damage(sound[file], draw)
        if damaged == sound[file]:
            continue
        (kind.folder / file).write_bytes(damaged)
        start = time.monotonic()
        outcome, said = _outcome(kind, expected, file)
        yield Trial(name, file, damage.__name__ if damage else "exchange", outcome, said, time.monotonic() - start)
        shutil.rmtree(kind.folder)
        shutil.copytree(spare, kind.folder)
    shutil.rmtree(spare)


def _outcome(kind: Kind, expected: str, file: str) -> tuple[str, str]:
    def names(message: str) -> bool:
        return any(name in message for name in (str(kind.folder), Path(file).name))

    found = ""
    with _listening() as said:
        try:
            found = kind.open()
        except (PRLHFError, SystemExit) as error:
            told = str(error)
            if "\n" in told.strip():
                return "several lines", told
            return "refused" if names(told) else "unnamed", told
        except Exception as error:
            return "trace", f"{type(error).__module__}.{type(error).__name__}: {error}"
    if about := [message for message in said if names(message)]:
        return "told", " | ".join(about)
    return "harmless" if found == expected else "silent", " | ".join(said)


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect warnings and what is logged, by us or through Lightning."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    loggers = [logging.getLogger("prlhf_lightning"), logging.getLogger("lightning.pytorch.utilities.rank_zero")]
    for logger in loggers:
        logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield said
            said += [str(one.message) for one in caught]
    finally:
        for logger in loggers:
            logger.removeHandler(listener)


# What comes of files, as texts that are equal only where all is.


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield str((value.dtype, value.shape)).encode()
        yield value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield str((value.dtype, value.shape)).encode() + value.tobytes()
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _parts(one)
        yield b"."
    else:
        yield f"{value!r};".encode()


def of_lm(lm: Any, generation_config: Any) -> list[Any]:
    """Return the weights and settings of a language model, and what it computes, in training as well.

    `use_cache`, dropout rates and names that begin with an underscore are left out: what a model computes does not
    depend on them, as logits and answer show. transformers keeps such names of `config.json`, also damaged ones.
    """

    def read(settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        named = {str(name): read(value) for name, value in settings.items()}
        return {
            name: value
            for name, value in named.items()
            if not name.startswith("_") and "drop" not in name and name != "use_cache"
        }

    ids, was_training = torch.arange(3, 15)[None], lm.training
    logits = []
    with torch.no_grad():
        for mode in (False, True):
            torch.manual_seed(0)
            logits.append(lm.train(mode)(input_ids=ids).logits)
    lm.train(was_training)
    settings = [read(config.to_dict()) for config in (lm.config, lm.generation_config, generation_config)]
    return [dict(lm.state_dict()), settings, lm.generate(ids, max_new_tokens=4, do_sample=False), *logits]


def of_writer(writer: Generator) -> str:
    """Return all that decides what a writer writes."""
    return _digest([
        of_lm(writer.lm, writer.lm.generation_config), tokenizer_identity(writer.tokenizer),
        dict(writer.user_model.state_dict()), list(writer.vocabulary.ids), writer.tokenization,
    ])  # fmt: skip


def of_module(module: PersonalizedLM) -> str:
    """Return all that a module that was loaded from a checkpoint holds."""
    policy = module.policy
    assert isinstance(policy, CausalLMPolicy)
    return _digest([
        dict(module.state_dict()), of_lm(policy.lm, policy.generation_config), tokenizer_identity(policy.tokenizer),
        list(module.vocabulary.ids) if module.vocabulary else None, dict(module.hparams), module.tokenization,
    ])  # fmt: skip


# Sound files of each kind.

_WORDS = ["the", "cat", "sat", "on", "a", "red", "mat", "by", "my", "blue", "door"]
_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def make(root: Path) -> dict[str, Kind]:
    """Train, adapt, shrink and export small models, fill caches and a log, and return the kinds of files."""
    base = root / "base"
    shutil.copytree(Path(CausalLMPolicy("builtin:style-lm").path), base)
    (base / "chat_template.jinja").write_text(_TEMPLATE)
    run = _fit(root, base, 0)
    last = run / "checkpoints/last.ckpt"
    pairs = _pairs(root / "new.jsonl", ["zoe", "yan"])
    _command("adapt", "--model", last, "--feedback", pairs, "--steps=2", "--output", root / "adapted/adapted.ckpt")
    _command("shrink", "--model", last, "--output", root / "shrunk/shrunk.ckpt")
    sister = _fit(root, base, 1) / "checkpoints/last.ckpt"
    plain = root / "plain/plain.ckpt"
    plain.parent.mkdir()
    torch.save(checkpoint_files.load(last), plain)
    old = root / "old"
    old.mkdir()
    shutil.copy(Path(__file__).parent.parent / "tests/fixtures/format_1.ckpt", old)
    kinds = {
        "checkpoint": Kind(last.parent, lambda: of_module(load_module(last, "model")), [last.name]),
        "adapted": _of_checkpoint(root / "adapted/adapted.ckpt"),
        "shrunk": _of_checkpoint(root / "shrunk/shrunk.ckpt"),
        "unsealed": _of_checkpoint(plain),
        "format 1": _of_checkpoint(old / "format_1.ckpt"),
        "base model": Kind(base, lambda: of_module(load_module(last, "model"))),
    }
    options = {"merged": "--adapters=false", "adapters": "--adapters=true", "peft": "--peft_users=true"}
    for name, option in options.items():
        folders = [root / f"{name}", root / f"{name}_sister"]
        for checkpoint, folder in zip((last, sister), folders, strict=True):
            _command("export", "--model", checkpoint, "--output", folder, option)
        kinds[f"export {name}"] = Kind(folders[0], _opens(folders[0]), sister=folders[1])
    kinds["export as base"] = Kind(root / "merged", lambda: _built(str(root / "merged")), sister=root / "merged_sister")
    assets = shutil.copytree(shipped.ASSETS, root / "assets")
    shipped.ASSETS = causal_lm.ASSETS = assets
    kinds["shipped model"] = Kind(assets, lambda: _built("builtin:style-lm"), _names_in(assets, "style-lm"))
    kinds["config.yaml"] = Kind(run, lambda: _validated(last), ["config.yaml"])
    kinds |= _tokenized(root, base) | _reference(root) | _log(root) | _data(root)
    return kinds


def _names_in(folder: Path, part: str) -> list[str]:
    return [f"{part}/{path.name}" for path in sorted((folder / part).iterdir())]


def _built(model: str) -> str:
    """Return all that a base model holds which is to be trained."""
    policy = CausalLMPolicy(model, lora=None)
    policy.build()
    return _digest([of_lm(policy.lm, policy.generation_config), tokenizer_identity(policy.tokenizer)])


def _of_checkpoint(path: Path) -> Kind:
    return Kind(path.parent, lambda: of_module(load_module(path, "model")))


def _opens(folder: Path) -> Callable[[], str]:
    return lambda: of_writer(open_writer(folder))


def _command(*words: Any) -> str:
    shown, told = StringIO(), StringIO()
    try:
        with redirect_stdout(shown), redirect_stderr(told):
            cli.main([str(word) for word in words])
    except SystemExit as error:
        if error.code:
            raise SystemExit(told.getvalue() if error.code == 2 else error.code) from error
    return shown.getvalue()


def _fit(root: Path, base: Path, seed: int) -> Path:
    """Train a little, and return the run's folder."""
    _command(
        "fit", f"--seed_everything={seed}", "--trainer.max_steps=4", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={root / 'runs'}",
        "--model.user_model=IndividualUserModel", "--model.user_model.num_tokens=2", "--model.policy=CausalLMPolicy",
        f"--model.policy.model={base}", "--model.policy.lora={rank: 2, target_modules: [q_proj, v_proj]}",
        "--model.loss=DPOLoss", "--model.optim={lr: 0.01, user_lr: 0.1}", "--data.source=SimulatedSource",
        "--data.source.num_users=4", "--data.source.pairs_per_user=8", "--data.source.validation_pairs_per_user=2",
        f"--data.source.seed={seed}", "--data.batch_size=8",
    )  # fmt: skip
    return root / f"runs/version_{seed}"


def _validated(checkpoint: Path) -> str:
    return _command("validate", f"--ckpt_path={checkpoint}", "--trainer.enable_progress_bar=false")


def _pairs(path: Path, users: list[str], count: int = 8) -> Path:
    draw = random.Random(0)
    with path.open("w") as file:
        for user in users:
            for _ in range(count):
                prompt, chosen, rejected = (" ".join(draw.choices(_WORDS, k=k)) for k in (3, 6, 4))
                row = {
                    "user_text": f"{user} likes cats",
                    "user_id": user,
                    "prompt": prompt,
                    "chosen": f"{chosen}.",
                    "rejected": rejected,
                }
                file.write(json.dumps(row) + "\n")
    return path


def _tokenized(root: Path, base: Path) -> dict[str, Kind]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    made = []
    for number, users in enumerate((["ann", "bob"], ["cy", "dee"])):
        pairs = _pairs(root / f"pairs_{number}.jsonl", users, 40)
        cache = FeedbackCache(root / f"cache_{number}", tokenizer, TokenizationSettings(), "pairs", "error")

        def opened(cache: FeedbackCache = cache, pairs: Path = pairs) -> str:
            split = cache.open(FileSource(str(pairs)), "train")
            rows = split.rows(range(len(split)))
            return _digest([rows, split.users, split.user_ids, split.lengths, vars(split.report)])

        opened()
        (folder,) = (one for one in cache.root.iterdir() if one.is_dir())
        made.append(Kind(folder, opened))
    made[0].sister = made[1].folder
    return {"tokenized data": made[0]}


def _reference(root: Path) -> dict[str, Kind]:
    keys = [hashlib.md5(str(n).encode()).digest() for n in range(300)]
    folders = []
    for number in range(2):
        draw = np.random.default_rng(number)
        for part in (keys[:150], keys[150:]):
            with ReferenceCache(root / "reference", {"weights": number}) as cache:
                cache.put(part, [draw.normal(size=1 + n % 9).astype(np.float32) for n in range(len(part))])
        folders.append(cache.folder)
    for folder in folders:  # so that the names are those of the sister's
        for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
            path.rename(folder / f"{number}-{number}.safetensors")

    def opened() -> str:
        with ReferenceCache(root / "reference", {"weights": 0}) as cache:
            found = cache.get(keys)
            draw = np.random.default_rng(0)
            sound = [draw.normal(size=1 + n % 9).astype(np.float32) for n in [*range(150), *range(150)]]
            # What is missing is computed anew.
            return _digest(
                [have if have is not None else want for have, want in zip(found, sound, strict=True)]
                + [[n for n, have in enumerate(found) if have is None]]
            )

    return {"reference cache": Kind(folders[0], opened, sister=folders[1])}


def _log(root: Path) -> dict[str, Kind]:
    folder = root / "log"
    folder.mkdir()

    def opened() -> str:
        with closing(FeedbackLog(f"sqlite:///{folder / 'feedback.db'}", create=False)) as log:
            return _digest([list(log.pairs()), list(log.thumbs()), log.newest_pairs("ann", 5), log.extent()])

    with closing(FeedbackLog(f"sqlite:///{folder / 'feedback.db'}")) as log:
        for n in range(60):
            user, texts = ("ann", "bob", "cy")[n % 3], [f"a text of some length, number {n} {part}" for part in "abc"]
            if n % 4:
                log.append(Feedback("key", str(n), 1.0 * n, user, texts[0], texts[1], texts[2]))
            else:
                log.append(Feedback("key", str(n), 1.0 * n, user, texts[0], completion=texts[1], liked=n % 8 > 0))
    return {"feedback log": Kind(folder, opened)}


def _data(root: Path) -> dict[str, Kind]:
    kinds = {}
    pairs = FileSource(str(_pairs(root / "stream.jsonl", ["ann", "bob", "cy"], 40)))

    def counted() -> str:
        census = count_users(pairs, "train", root / "counts")
        return _digest([census.rows, census.texts])

    counted()
    kinds["users' counts"] = Kind(root / "counts", counted)
    jsonl = _pairs(root / "raw.jsonl", ["ann", "bob"], 40)
    _command("data", "convert", "--train", jsonl, "--output", root / "parquet")
    source = FileSource(str(root / "parquet/train.parquet"))

    def parsed() -> str:
        return _digest([vars(parse_record(row, where, Columns())) for where, row in read(source, "train")])

    kinds["parquet"] = Kind(root / "parquet", parsed)
    return kinds


def main() -> int:
    """Damage files and print a table; return how many were opened without a word, or not refused in a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="bits of each kind of file")
    parser.add_argument("--only", nargs="*", default=[], help="kinds, by the beginnings of their names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="what went wrong, and what was said first of each file")
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]  # Lightning would warn of words that it could have read itself
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        os.environ["PRLHF_CACHE"] = f"{name}/caches"
        for kind, files in make(Path(name)).items():
            if arguments.only and not kind.startswith(tuple(arguments.only)):
                continue
            start, counts = time.monotonic(), Counter[str]()
            shown: set[tuple[str, ...]] = set()
            for trial in trials(kind, files, arguments.count, arguments.seed):
                counts[trial.outcome] += 1
                counts["slow"] += trial.seconds > SLOW
                wrong = trial.outcome not in ("refused", "told", "harmless")
                bad += wrong
                key = (trial.file, trial.outcome, trial.said[:40])
                if arguments.show and key not in shown:
                    shown.add(key)
                    print(f"  {trial.outcome}: {trial.damage} in {trial.file}: {trial.said[:600]!r}", flush=True)
            told = "  ".join(f"{outcome} {number}" for outcome, number in counts.most_common() if number)
            print(f"{kind:16}{told}  ({time.monotonic() - start:.0f} s)", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main() > 0)
