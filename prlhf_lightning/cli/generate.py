"""The command `generate`: answers to one or many prompts, for one or several users."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from prlhf_lightning.cli.candidates import described, finite, report_unknown
from prlhf_lightning.cli.models import open_writer, pick_device
from prlhf_lightning.data import Pseudonyms
from prlhf_lightning.data.conversations import fail, message_text, read_text, read_tools
from prlhf_lightning.errors import ConfigurationError, FeedbackFormatError, Place
from prlhf_lightning.inference import Completion, GenerationRequest, Generator
from prlhf_lightning.inference.best_of import Candidates, Scores, check_sampled, sample_candidates
from prlhf_lightning.inference.requests import Message
from prlhf_lightning.training.reward_scorer import load_scorer
from prlhf_lightning.utils.io import atomic_writer, check_output
from prlhf_lightning.utils.progress import tracked
from prlhf_lightning.utils.terminal import LAYOUT, plain_console, printable

_NARROWEST = 30  # columns of a panel


@dataclass(frozen=True)
class _Request:
    """A request with the fields of its output row."""

    generation: GenerationRequest
    id: str | int

    def renamed(self, name: Callable[[str], str]) -> _Request:
        """Return the request with renamed users."""
        user = self.generation.user
        if user is not None:
            user = name(user) if isinstance(user, str) else {name(one): share for one, share in user.items()}
        return replace(self, generation=replace(self.generation, user=user))

    @property
    def who(self) -> str:
        user = self.generation.user
        if user is None:
            return "generic user"
        return user if isinstance(user, str) else " + ".join(f"{share:g} {name}" for name, share in user.items())


def generate(
    model: Path,
    prompt: str | None = None,
    prompts: Path | None = None,
    user: str | list[str] | None = None,
    blend: dict[str, float] | None = None,
    user_text: str = "",
    strength: float = 1.0,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | list[str] | None = None,
    chat_template: bool | None = None,
    continue_final_message: bool = False,
    best_of: int = 1,
    reward_model: Path | None = None,
    keep_candidates: bool = False,
    output: Path | None = None,
    max_batch_rows: int = 64,
    device: str = "auto",
    hash_user_ids_with: str | None = None,
    trust_remote_code: bool = False,
    trust_classes: list[str] | None = None,
) -> None:
    """Generate answers for one or several users.

    See docs/generate.md for examples.

    Args:
        model: A checkpoint of `fit`, the folder of its run, or a folder that `export` wrote.
        prompt: The prompt.
        prompts: A JSONL file of rows with a `prompt` (a string or a conversation), and maybe `user_id` (or `user`),
            `id`, `user_text` and `tools`. A row without a user gets an answer for each of `user` and `blend`.
        user: Ids, as in `--user ann bob`; the generic user by default.
        blend: Shares of several users, as in `{ann: 2, bob: 1}`: one more answer, for the mixture. Quote ids with YAML
            characters.
        user_text: Text about the user, for user models that read it.
        strength: How strongly users change the answers: 0 is the generic user, 1 as trained, up to 4 exaggerates.
        max_new_tokens: Maximum number of new tokens; fewer if the model has no more positions.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Probability mass to sample from.
        seed: Random seed, the same for every answer.
        stop: Strings that end an answer.
        chat_template: Whether a string prompt is one user turn in the chat template; by default as in training.
            Conversations always use the template.
        continue_final_message: Continue the last message of each conversation, which must be the assistant's.
        best_of: Number of answers to sample; the one with the highest reward for the user is kept.
        reward_model: A checkpoint of a reward model, or of a policy (whose implicit reward is used), or the folder of
            its run. It scores the answers, also with `best_of: 1`.
        keep_candidates: Write all sampled answers and their rewards to `output`, as `candidates`.
        output: A JSONL file for the answers, in place of the terminal; replaced atomically.
        max_batch_rows: Maximum number of rows in a step; strengths other than 0 and 1 take two rows.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, ...; `auto` uses a GPU if there is one.
        hash_user_ids_with: The value of `data.hash_user_ids_with` in training; what is shown and written are the
            pseudonyms.
        trust_remote_code: Run code that comes with the base model, from its folder or hub name. Only for sources that
            you trust.
        trust_classes: Classes of your own, as my_file.MyLoss, that the model was trained with. Their modules are
            imported, which runs their code; all other classes that a file names are refused.
    """
    if (prompt is None) == (prompts is None):
        raise ConfigurationError("prompt: give one of --prompt and --prompts.")
    if output is not None:
        check_output(output, "output")
    if best_of > 1 and reward_model is None:
        raise ConfigurationError("best_of: who chooses the best answer? Give a reward model with --reward_model.")
    if keep_candidates and (output is None or reward_model is None):
        raise ConfigurationError("keep_candidates: candidates are written to --output, with a --reward_model.")
    check_sampled(best_of, temperature)
    ids = [user] if isinstance(user, str) else list(user or ())
    if not all(map(str.strip, (*ids, *(blend or ())))):
        raise ConfigurationError("user: an id is empty; leave it out to write for the generic user.")
    named: list[str | Mapping[str, float] | None] = [*ids, *([blend] if blend else [])]
    how: dict[str, Any] = {
        "strength": strength, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
        "seed": seed, "stop": (stop,) if isinstance(stop, str) else tuple(stop or ()), "chat_template": chat_template,
        "continue_final_message": continue_final_message,
    }  # fmt: skip
    rows = [{"prompt": prompt}] if prompts is None else list(_rows(prompts))
    requests = list(_requests(rows, named or [None], user_text, how))
    if hash_user_ids_with is not None:
        pseudonym = Pseudonyms.load(hash_user_ids_with)
        requests = [one.renamed(pseudonym) for one in requests]
    device = pick_device(device)
    scorer = None if reward_model is None else load_scorer(reward_model, device, trust_classes)
    writer = open_writer(model, "model", device, trust_remote_code, trust_classes)
    users = [one.generation.user for one in requests]
    report_unknown(writer.vocabulary, users)
    console = plain_console()
    if scorer is not None:
        report_unknown(scorer.vocabulary, users, "the reward model")
        progress = output is not None or console.is_terminal
        found = _candidates(writer, scorer, requests, best_of, max_batch_rows, progress)
        written = [one.answers[one.best] for one in found]
        if output is not None:
            _write(output, requests, written, found, keep_candidates)
            console.print(f"{len(written)} answers are in {output}", soft_wrap=True)
        elif len(requests) == 1:
            sys.stdout.write(printable(written[0].text, LAYOUT) + "\n")
        else:
            _show(console, requests, written)
        sys.stderr.write(described([one.rewards for one in found], [one.lengths for one in found]) + "\n")
    elif output is not None:
        written = writer.generate([one.generation for one in requests], True, max_batch_rows)
        _write(output, requests, written)
        console.print(f"{len(written)} answers are in {output}", soft_wrap=True)
    elif len(requests) == 1:
        texts = []
        for piece in writer.stream(requests[0].generation):
            texts.append(piece.text)
            sys.stdout.write(printable(piece.text, LAYOUT))
            sys.stdout.flush()
        sys.stdout.write("\n")
        _report_empty(writer, requests, ["".join(texts)])
        return
    else:
        written = writer.generate([one.generation for one in requests], console.is_terminal, max_batch_rows)
        _show(console, requests, written)
    _report_empty(writer, requests, [answer.text for answer in written])


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the validated rows of a file of prompts."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"prompts: {path} cannot be read as lines of UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = Place(str(path), number)
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise FeedbackFormatError(
                f"this is not JSON ({error})", "write one object per line", where=where
            ) from error
        if not isinstance(row, dict):
            raise FeedbackFormatError("this is not a JSON object", "write one per line, with a 'prompt'", where=where)
        user = row.get("user_id", row.get("user"))
        if type(user) is int:  # as in the files that training reads
            user = str(user)
        if not isinstance(row.get("prompt"), str | list):
            fix = "write a list of messages with 'role' and 'content', or a string"
            fail(where, "prompt", "must be a string, or a list of messages", fix)
        if not isinstance(user, str | None):
            fail(where, "user_id", f"is of type {type(user).__name__}", "ids are strings, so put it in quotes")
        if user is not None and not user.strip():
            fail(where, "user_id", "is empty", "leave it out for the generic user")
        if not isinstance(row.get("user_text") or "", str):
            fail(where, "user_text", "must be a string", "put it in quotes, or leave it out")
        if not isinstance(row.get("id", number), str | int):
            fail(where, "id", "must be a string or a whole number", "write one, or leave it out for the line's number")
        yield {
            "prompt": read_text(row["prompt"], where, "prompt"),
            "user": user,
            "id": row.get("id", number),
            "user_text": row.get("user_text"),
            "tools": read_tools(row.get("tools"), where),
        }


def _requests(
    rows: Sequence[Mapping[str, Any]],
    named: Sequence[str | Mapping[str, float] | None],
    user_text: str,
    how: Mapping[str, Any],
) -> Iterator[_Request]:
    for number, row in enumerate(rows, start=1):
        prompt: str | list[Message] = row["prompt"]
        for user in named if row.get("user") is None else [row["user"]]:
            text = row.get("user_text") or user_text
            tools = row.get("tools")
            yield _Request(GenerationRequest(prompt, user, user_text=text, tools=tools, **how), row.get("id", number))


def _candidates(
    writer: Generator, scorer: Scores, requests: Sequence[_Request], n: int, max_batch_rows: int, progress: bool
) -> list[Candidates]:
    """Return the sampled answers to each request, with rewards."""
    found: dict[int, Candidates] = {}
    asked = [one.generation for one in requests]
    for generation in asked:  # before anything is computed
        writer.prepare(generation)
    sampled = sample_candidates(writer, scorer, asked, n, max_batch_rows)
    for place, candidates in tracked(sampled, "Writing", len(requests), progress):
        found[place] = candidates
    return [found[place] for place in range(len(requests))]


def _report_empty(writer: Generator, requests: Sequence[_Request], texts: Sequence[str]) -> None:
    """Print the number of empty answers and the likely reason."""
    empty = [one.generation for one, text in zip(requests, texts, strict=True) if not text.strip()]
    if not empty:
        return
    advice = ""
    if writer.tokenizer.chat_template and any(writer.takes_as_it_stands(one) for one in empty):
        advice = (
            " Their prompts were used as plain text, without the chat template; if the model was trained "
            "on conversations, add `--chat_template true`."
        )
    sys.stderr.write(f"{len(empty)} of {len(texts)} answers are empty: the model ended them at once.{advice}\n")


def _show(console: Console, requests: Sequence[_Request], written: Sequence[Completion]) -> None:
    """Print the answers to each prompt side by side."""
    groups: dict[tuple[str | int, str], list[tuple[_Request, Completion]]] = {}
    for one, answer in zip(requests, written, strict=True):
        prompt = one.generation.prompt
        asked = prompt if isinstance(prompt, str) else message_text(prompt[-1])
        groups.setdefault((one.id, asked), []).append((one, answer))
    for (_, asked), answers in groups.items():
        console.print(Text(printable(asked, LAYOUT), style="bold"))
        width = max(_NARROWEST, console.width // len(answers) - 1)
        panels = [
            Panel(
                Text(printable(answer.text, LAYOUT)),
                title=Text(printable(one.who)),
                subtitle=None if answer.finish_reason == "stop" else f"cut off after {answer.completion_tokens} tokens",
                width=min(width, console.width),
            )
            for one, answer in answers
        ]
        console.print(Columns(panels))


def _write(
    path: Path,
    requests: Sequence[_Request],
    written: Sequence[Completion],
    found: Sequence[Candidates] | None = None,
    all_candidates: bool = False,
) -> None:
    with atomic_writer(path) as file:
        for number, (one, answer) in enumerate(zip(requests, written, strict=True)):
            row: dict[str, Any] = {
                "id": one.id,
                "user_id": one.generation.user if isinstance(one.generation.user, str) else None,
                **({"blend": dict(one.generation.user)} if isinstance(one.generation.user, Mapping) else {}),
                "prompt": one.generation.prompt,
                "completion": answer.text,
                "strength": one.generation.strength,
                "known_user": answer.known_user,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
            }
            if found is not None:
                candidates = found[number]
                row["reward"] = finite(candidates.rewards[candidates.best])
                if all_candidates:
                    row["candidates"] = [
                        {"completion": each.text, "reward": finite(reward), "completion_tokens": each.completion_tokens}
                        for each, reward in zip(candidates.answers, candidates.rewards, strict=True)
                    ]
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
