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
from prlhf_lightning.cli.models import load_module, open_writer, pick_device, writer_of
from prlhf_lightning.data import Pseudonyms
from prlhf_lightning.data.tokenization import FeedbackTokenizer
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference import Generator
from prlhf_lightning.model import PersonalizedModel
from prlhf_lightning.serving.limits import Limits
from prlhf_lightning.training import load_scorer
from prlhf_lightning.training.checkpoint_files import checkpoint_of
from prlhf_lightning.training.scorer import Scorer
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
    reward_model: Path | None = None,
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
        host: Address to listen on; 0.0.0.0 for all addresses of this machine (then use keys).
        port: Port to listen on; 0 for any free port.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, ...; `auto` uses a GPU if there is one.
        name: Name of the model in the API; its own name by default.
        feedback_log: Database for feedback: a sqlite:/// or postgresql:// URL, or `none` to turn feedback off.
        adapt: Learn new users from their feedback on request (`POST /v1/adapt`); needs a checkpoint and a feedback log.
            Learned users exist until the server stops; the command adapt adds users to a checkpoint.
        reward_model: Rank answers for users on request (`POST /v1/rerank`) by this reward model, or policy (by its
            implicit reward): a checkpoint, or the folder of its run.
        keys: TOML file of API keys, made with the command api-key. A key can also be given as $PRLHF_API_KEY. Without
            keys, everyone who can reach the server may use it.
        allowed_hosts: Names or patterns such as '*.example.org' that are allowed in the Host header, besides localhost
            and IP addresses. By default, names are checked only if there are no keys and the server listens on this
            machine only, which protects it from pages of other sites.
        max_new_tokens: Maximum number of tokens of an answer.
        max_open: Maximum number of waiting and running requests for text; further ones get 429. At the limit, a new
            request replaces a waiting request of the key (without keys: address) with the most requests.
        max_batch: Maximum number of texts generated at once.
        max_batch_tokens: Maximum number of positions in the KV cache: running texts times the longest, including its
            answer. Lower it if memory runs out.
        max_prompt: Maximum characters of a prompt; a longer one gets 413.
        max_body: Maximum bytes of a request; a larger one gets 413.
        max_learned: Maximum number of users learned by a running server; further ones get 409.
        read_seconds: Time limit in seconds for the headers of a request, and again for its body; after it, 408.
        requests_per_minute: Long-run rate limit of one key (without keys: of one address); more requests get 429.
        burst: Number of requests of one key at once under the rate limit.
        drain_seconds: Time in seconds for running answers after SIGTERM.
        hash_user_ids_with: The value of `data.hash_user_ids_with` in training; feedback is kept under the ids as given.
        trust_remote_code: Run code that comes with the base model, from its folder or hub name. Only for sources that
            you trust.
        trust_classes: Classes of your own, as my_file.MyLoss, that the model was trained with. Their modules are
            imported, which runs their code; all other classes that a file names are refused.
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
        raise ConfigurationError("adapt: learning users needs a checkpoint (.ckpt) and a feedback log.")

    def load() -> tuple[Generator, NewUsers | None, Scorer | None]:
        place = pick_device(device)
        if adapt:
            module = load_module(model, "model", trust_remote_code, trust_classes).to(place).eval()
            writer = writer_of(module, model)
            learner = NewUsers(module, writer)
        else:
            writer, learner = open_writer(model, "model", place, trust_remote_code, trust_classes), None
        writer.name = name or writer.name
        return writer, learner, None if reward_model is None else load_scorer(reward_model, place, trust_classes)

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


_STEP_SECONDS = 0.001  # of tokenizing before other work may run
_ENOUGH = 32  # pairs, enough to distinguish kinds of users


class NewUsers:
    """Learns users from their pairs and adds them to a generator, in memory only.

    Args:
        model: A trained model.
        writer: A generator with the same policy and user model.
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
        """Learn a user from their pairs, replacing an earlier result; see `serving.Learner`.

        Raises:
            ConfigurationError: The model was trained on this user, or can't learn users.
            FeedbackFormatError: A pair is malformed.
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
            raise ConfigurationError("The learned row of this user is infinite or NaN, and was dropped.")
        # The generator shares the user model; its list of users is replaced, so that running requests keep theirs.
        self._model.add_users([user_id], row[None])
        if self._model.vocabulary is not None:
            self._writer.vocabulary = self._model.vocabulary

    def _row(self, user_id: str, pairs: PreferenceBatch) -> torch.Tensor:
        """Return a user's row, with all tables concatenated."""
        if self._model.user_model.history_size:
            return encode_users(self._model, pairs, [user_id]).rows[0]
        return adapt_users(self._model, pairs, [user_id], self._prior_by(pairs)).rows[0]

    def _prior_by(self, pairs: PreferenceBatch) -> UserPrior:
        """Return the prior of new users, fitted again while a user has more pairs than any before, up to a limit."""
        if self._prior is None or self._fitted_on < min(len(pairs), _ENOUGH):
            trained = len(self._trained) - 1  # users learned by the server come later and are ignored
            self._prior, self._fitted_on = fit_prior(self._model, pairs, first=trained), len(pairs)
        return self._prior

    def _pairs(self, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        try:
            found = to_batch(self._tokenize, rows, [f"pair {number}" for number in range(1, len(rows) + 1)])
        finally:
            self._tokenize.forget()  # do not keep users' text in memory
        if found is None:
            raise ConfigurationError("In every pair, both answers have the same tokens.")
        return found[0]
