"""The command `serve`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from prlhf_lightning.adaptation import UserPrior, adapt_users, encode_users, fit_prior
from prlhf_lightning.adaptation.pauses import pausing
from prlhf_lightning.cli.adapt import to_batch
from prlhf_lightning.cli.checkpoints import load_module, open_writer, pick_device, writer_of
from prlhf_lightning.data import Pseudonyms
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference import Generator
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.serving.limits import Limits
from prlhf_lightning.training.checkpoint_files import checkpoint_of
from prlhf_lightning.types import PreferenceBatch
from prlhf_lightning.utils.finite import are_finite


def serve(
    model: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    name: str | None = None,
    feedback_log: str | None = "sqlite:///feedback.db",
    adapt: bool = False,
    keys: Path | None = None,
    allowed_hosts: list[str] | None = None,
    max_new_tokens: int = 512,
    max_open: int = 256,
    max_batch: int = 64,
    max_batch_tokens: int = 131_072,
    max_prompt: int = 65_536,
    max_body: int = 1_048_576,
    max_learned: int = 1000,
    read_seconds: float = 30,
    requests_per_minute: float | None = None,
    burst: int = 20,
    drain_seconds: int = 30,
    hash_user_ids_with: str | None = None,
    trust_remote_code: bool = False,
    trust_classes: list[str] | None = None,
) -> None:
    """Serve a model over HTTP: an OpenAI-compatible API that writes for each user, with a page to try it.

    Args:
        model: A folder that `export` wrote, a checkpoint of `fit`, or the folder of its run.
        host: Address to listen on; 0.0.0.0 for every one of this machine, in which case give keys.
        port: Port to listen on; 0 takes any that is free.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, ...; `auto` takes a GPU where there is one.
        name: What the model is called in the API; its own name if none is given.
        feedback_log: Where feedback goes: a sqlite:/// or postgresql:// URL, or `none` for nowhere.
        adapt: Learn new users from their feedback when asked to (`POST /v1/adapt`); needs a checkpoint and a feedback
            log. What was learned lasts as long as the server; the command adapt adds users to a checkpoint.
        keys: TOML file of API keys, made with the command api-key. A key can also be given as $PRLHF_API_KEY. Without
            any, everyone who reaches the server may use it.
        allowed_hosts: Names, or patterns of them such as '*.example.org', by which the server may be called in the
            header Host, besides localhost and addresses. Without any, names are checked only where there are no keys
            and nobody but this machine can reach the server, which pages of other sites could use otherwise.
        max_new_tokens: Most tokens of an answer.
        max_open: Most requests for text that are waiting or being written; the next ones get 429. When there are so
            many, a newcomer takes the place of a waiting request of whichever key (without keys: address) has the most.
        max_batch: Most texts that are written at once.
        max_batch_tokens: Most positions for which the model keeps keys and values: texts written at once by the length
            of the longest, its answer included. Lower it where memory runs out.
        max_prompt: Most characters of a prompt; a longer one gets 413.
        max_body: Most bytes of a request; a larger one gets 413.
        max_learned: Most users that are learned while the server runs; the next ones get 409.
        read_seconds: Seconds within which the head of a request, and then its body, must be there; else it gets 408.
        requests_per_minute: Requests of one key (without keys: of one address) in the long run; more get 429.
        burst: Requests of one key at once, where they are limited.
        drain_seconds: How long answers may still be written after SIGTERM.
        hash_user_ids_with: What `data.hash_user_ids_with` was in training; feedback is kept under the ids as given.
        trust_remote_code: Run code that comes with the base model, from its folder or hub name. Only for sources that
            you trust.
        trust_classes: Classes of your own, as my_file.MyLoss, that the model was trained with. Their modules are
            imported, which runs their code; what a file names beside is refused.
    """
    try:
        from prlhf_lightning.serving.server import run  # FastAPI, uvicorn and SQLAlchemy, of the extra `serve`
    except ImportError as error:
        raise ConfigurationError(
            f"serve needs {error.name}, which is not installed: pip install 'prlhf-lightning[serve]'"
        ) from error

    feedback_log = None if feedback_log == "none" else feedback_log
    if adapt:
        model = checkpoint_of(model)
    if adapt and not feedback_log:
        raise ConfigurationError("adapt: users are learned by a model's checkpoint (.ckpt) from a feedback log.")

    def load() -> tuple[Generator, NewUsers | None]:
        place = pick_device(device)
        if adapt:
            module = load_module(model, "model", trust_remote_code, trust_classes).to(place).eval()
            writer = writer_of(module, model)
            learner = NewUsers(module, writer)
        else:
            writer, learner = open_writer(model, "model", place, trust_remote_code, trust_classes), None
        writer.name = name or writer.name
        return writer, learner

    limits = Limits(
        max_tokens=max_new_tokens,
        max_open=max_open,
        max_batch=max_batch,
        max_batch_tokens=max_batch_tokens,
        max_prompt=max_prompt,
        max_body=max_body,
        max_learned=max_learned,
        read_seconds=read_seconds,
        requests_per_minute=requests_per_minute,
        burst=burst,
    )
    rename = str if hash_user_ids_with is None else Pseudonyms.load(hash_user_ids_with)
    run(load, host, port, feedback_log, keys, limits, drain_seconds, rename, allowed_hosts or ())


_STEP_SECONDS = 0.001  # that tokenizing has for itself before others may go on
_ENOUGH = 32  # pairs, to tell kinds of users apart by


class NewUsers:
    """Learns users from their pairs, and has a writer know them. They are held in memory only.

    Args:
        model: A trained model.
        writer: Writes with the same policy and user model.
    """

    def __init__(self, model: PersonalizedModel, writer: Generator) -> None:
        self._model, self._writer = model, writer
        self._tokenize = FeedbackTokenizer(model.policy.tokenizer, model.tokenization)
        self._trained = writer.vocabulary
        self._prior: UserPrior | None = None
        self._fitted_on = 0

    @torch.no_grad()
    def __call__(
        self, user_id: str, rows: Sequence[Mapping[str, Any]], between: Callable[[], None] = lambda: None
    ) -> None:
        """Learn a user from their pairs, in place of what had been learned of them before; see `serving.Learner`.

        Raises:
            ConfigurationError: The model was trained on this user, or can't learn users.
            FeedbackFormatError: The pairs are not what they should be.
        """
        if user_id in self._trained:
            raise ConfigurationError("This model was trained on this user; train it again with the new feedback.")
        with ThreadPoolExecutor(1) as aside:  # the tokenizer lets go of the thread's lock, and texts may be long
            tokenizing = aside.submit(self._pairs, [{**row, "user_id": user_id} for row in rows])
            while not wait([tokenizing], _STEP_SECONDS).done:
                between()
        pairs = tokenizing.result()
        with pausing(between):
            row = self._row(user_id, pairs)
        if not are_finite([row]):
            raise ConfigurationError("What was learned of this user is infinite or NaN, and was dropped.")
        # The writer shares the user model; its own list of users is replaced, so that running requests keep theirs.
        self._model.add_users([user_id], row[None])
        if self._model.vocabulary is not None:
            self._writer.vocabulary = self._model.vocabulary

    def _row(self, user_id: str, pairs: PreferenceBatch) -> torch.Tensor:
        """Return a user's row, the numbers of all tables side by side."""
        if self._model.user_model.history_size:
            return encode_users(self._model, pairs, [user_id]).rows[0]
        return adapt_users(self._model, pairs, [user_id], self._prior_by(pairs)).rows[0]

    def _prior_by(self, pairs: PreferenceBatch) -> UserPrior:
        """Return what is known of a new user, told by the pairs of whoever had the most so far, until they suffice."""
        if self._prior is None or self._fitted_on < min(len(pairs), _ENOUGH):
            trained = len(self._trained) - 1  # those who were learned here, and come after them, are no evidence
            self._prior, self._fitted_on = fit_prior(self._model, pairs, first=trained), len(pairs)
        return self._prior

    def _pairs(self, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        try:
            found = to_batch(self._tokenize, rows, [f"pair {number}" for number in range(1, len(rows) + 1)])
        finally:
            self._tokenize.forget()  # what people write is not to be kept
        if found is None:
            raise ConfigurationError("In every pair both answers are the same to the model.")
        return found[0]
