"""The command `serve`."""

from __future__ import annotations

from pathlib import Path

from prlhf_lightning.checkpoint_files import checkpoint_of
from prlhf_lightning.data import Pseudonyms
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference import PersonalizedWriter
from prlhf_lightning.serving.settings import Limits
from prlhf_lightning.tasks.models import load_module, open_writer, pick_device, writer_of
from prlhf_lightning.tasks.new_users import NewUsers


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

    def load() -> tuple[PersonalizedWriter, NewUsers | None]:
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
