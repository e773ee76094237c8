"""Schemas of requests and responses: OpenAI's fields, and those of personalization.

The OpenAPI document is generated from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from prlhf_lightning.inference.requests import MOST_SEED, MOST_SHARE, MOST_STRENGTH, MOST_TEMPERATURE

# The characters that `str.strip` strips; regular expression dialects differ in \s.
_BLANK = r"\u0009-\u000d\u001c-\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# A visible character and no NUL, which PostgreSQL cannot store. Matching takes linear time: no part of the pattern can
# begin with the end of the part before it.
_VISIBLE = rf"^[{_BLANK}]*[^{_BLANK}\u0000][^\u0000]*$"
Visible: TypeAlias = Annotated[str, Field(pattern=_VISIBLE)]
UserId: TypeAlias = Annotated[Visible, Field(max_length=256)]
# JSON Schema counts 1.0 as an integer.
_from_whole = BeforeValidator(lambda number: int(number) if isinstance(number, float) and number % 1 == 0 else number)
Count: TypeAlias = Annotated[int, Field(ge=1, le=2**31 - 1), _from_whole]
Seed: TypeAlias = Annotated[int, Field(ge=-MOST_SEED, le=MOST_SEED), _from_whole]  # exact in every JSON reader
One: TypeAlias = Annotated[int, Field(ge=1, le=1), _from_whole]
Share: TypeAlias = Annotated[float, Field(gt=0, le=MOST_SHARE, allow_inf_nan=False)]
Blend: TypeAlias = Annotated[
    dict[UserId, Share],
    Field(min_length=1, max_length=64),
    WithJsonSchema(  # pydantic's own schema allows names that do not match the pattern
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 64,
            "propertyNames": {"type": "string", "pattern": _VISIBLE, "maxLength": 256},
            "additionalProperties": {"type": "number", "exclusiveMinimum": 0, "maximum": MOST_SHARE},
        }
    ),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, regex_engine="python-re")


class TextPart(_Request):
    """A part of a message's content; only text is supported."""

    type: Literal["text"]
    text: Visible


class ChatMessage(_Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Visible | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    def plain(self) -> dict[str, str]:
        """Return the message in the format of chat templates."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class AnswerTurn(ChatMessage):
    """An assistant turn, which may be empty, like some answers."""

    role: Literal["assistant"]
    content: (
        Annotated[str, Field(pattern=r"^[^\u0000]*$")] | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    )


def _turn(value: Any) -> str:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return "Answer" if role == "assistant" else "Message"


Turn: TypeAlias = Annotated[
    Annotated[ChatMessage, Tag("Message")] | Annotated[AnswerTurn, Tag("Answer")], Discriminator(_turn)
]
Messages: TypeAlias = Annotated[list[Turn], Field(min_length=1, max_length=256)]


class StreamOptions(_Request):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Generate(_Request):
    """Common fields of both kinds of generation requests.

    Unsupported OpenAI parameters are accepted with a value that has no effect, since many clients send them.
    """

    model: str = Field(description="The name from /v1/models.")
    user: UserId | None = Field(None, description="Id of the user to write for. Unknown users get the generic user.")
    user_text: Annotated[Visible, Field(max_length=8192)] | None = Field(
        None, description="Text about the user, for models that read it."
    )
    strength: float = Field(
        1.0,
        ge=0,
        le=MOST_STRENGTH,
        allow_inf_nan=False,
        description="0 writes for the generic user, 1 as trained, more exaggerates.",
    )
    blend: Blend | None = Field(
        None, description="A mixture of users by shares to write for; `user` then only identifies the caller."
    )
    max_tokens: Count | None = Field(None, description="The server's own limit also applies.")
    temperature: float | None = Field(
        None, ge=0, le=MOST_TEMPERATURE, allow_inf_nan=False, description="1 if not given."
    )
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False, description="1 if not given.")
    seed: Seed | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: One | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def limits(self) -> list[int]:
        """Return the limits of the answer's length, in tokens."""
        return [self.max_tokens] if self.max_tokens else []


class ChatRequest(_Generate):
    """A conversation to continue."""

    messages: Messages
    continue_final_message: bool | None = Field(
        None, description="Continue the last message, which must be the assistant's, as in vLLM."
    )
    add_generation_prompt: bool | None = Field(
        None, description="As in vLLM: not true together with continue_final_message, and false only with it."
    )
    max_completion_tokens: Count | None = Field(None, description="The newer name of max_tokens.")
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None

    def limits(self) -> list[int]:
        """Return the limits of the answer's length, in tokens."""
        return [*super().limits(), *([self.max_completion_tokens] if self.max_completion_tokens else [])]


class CompletionRequest(_Generate):
    """A text to continue; with a model trained on conversations, a text to answer."""

    prompt: Visible | Annotated[list[Visible], Field(min_length=1, max_length=1)]
    chat_template: bool | None = Field(
        None, description="Whether the prompt is a user turn in the chat template; as in training by default."
    )
    best_of: One | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    def text(self) -> str:
        """Return the prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class TextFormat(_Request):
    """The form of an answer; only text is supported."""

    type: Literal["text"]


ChatRequest.model_rebuild()


class Personalization(BaseModel):
    """The users of an answer."""

    status: Literal["known", "unknown", "blend", "none"] = Field(
        description="known: this user. unknown: the generic user, as the model does not know this one. blend: several. "
        "none: no user was given."
    )
    unknown_users: list[str] = Field(description="Users of the request that the model does not know.")


class Usage(BaseModel):
    """Token counts of prompt and answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


Finish: TypeAlias = Literal["stop", "length"]


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """The only answer."""

    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Finish


class CompletionChoice(BaseModel):
    """A continuation of a text."""

    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: Finish | None  # null in all chunks of a stream but the last


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage | None = None
    personalization: Personalization


class ChatCompletion(_Answer):
    """A whole answer to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Completion(_Answer):
    """A continuation of a text, whole or a chunk of it."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class Delta(BaseModel):
    """The text that a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class DeltaChoice(BaseModel):
    """A chunk of an answer."""

    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: Finish | None = None


class ChatCompletionChunk(_Answer):
    """A chunk of an answer to a conversation."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[DeltaChoice]


class Model(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["prlhf-lightning"] = "prlhf-lightning"


class ModelList(BaseModel):
    """The list of the served models."""

    object: Literal["list"] = "list"
    data: list[Model]


class UserQuery(BaseModel):
    """Filter of the users to list."""

    model_config = ConfigDict(extra="forbid")

    prefix: str = Field("", max_length=256, description="Prefix of their ids.")
    limit: int = Field(100, ge=1, le=1000)


class User(BaseModel):
    """A known user."""

    id: str
    object: Literal["user"] = "user"


class UserList(BaseModel):
    """A list of known users."""

    object: Literal["list"] = "list"
    data: list[User]
    has_more: bool


class _Feedback(_Request):
    user: UserId = Field(description="Who judged.")
    prompt: Visible | Messages = Field(description="What was answered.")
    user_text: Annotated[Visible, Field(max_length=8192)] | None = Field(None, description="Text about the user.")
    id: Annotated[Visible, Field(max_length=128)] | None = Field(
        None, description="The sender's own id; the same feedback sent again with it counts once."
    )


class PairFeedback(_Feedback):
    """Which of two answers was better."""

    chosen: Visible
    rejected: Visible = Field(description="The other answer; the same text as `chosen` says that neither was better.")


class ThumbFeedback(_Feedback):
    """Whether an answer was good."""

    completion: Visible
    label: Literal["up", "down"] | bool = Field(description="Thumbs up or down; also true or false, as in files.")


def _form(value: Any) -> str:
    """Return the form, pair or thumb, so that errors are about the intended form."""
    given = value if isinstance(value, dict) else vars(value) if isinstance(value, BaseModel) else {}
    return "thumb" if {"completion", "label"} & set(given) else "pair"


AnyFeedback: TypeAlias = Annotated[
    Annotated[PairFeedback, Tag("pair")] | Annotated[ThumbFeedback, Tag("thumb")], Discriminator(_form)
]


class FeedbackReceipt(BaseModel):
    """Confirmation that feedback is on disk."""

    id: str
    object: Literal["feedback"] = "feedback"
    duplicate: bool = Field(description="Whether it was already stored.")


class RerankDocument(_Request):
    """A document as an object."""

    text: Visible


class RerankRequest(_Request):
    """Candidate answers to rank."""

    model: str | None = Field(None, description="The reward model's name from /v1/models.")
    query: Visible | Messages = Field(description="The prompt that the documents answer.")
    documents: Annotated[list[Visible | RerankDocument], Field(min_length=1, max_length=1024)]
    top_n: Count | None = Field(None, description="Number of results; all if not given.")
    return_documents: bool | None = Field(None, description="Whether results repeat their document.")
    user: UserId | None = Field(None, description="Id of the user to rank for. Unknown users get the generic user.")
    user_text: Annotated[Visible, Field(max_length=8192)] | None = Field(
        None, description="Text about the user, for models that read it."
    )

    def text(self, number: int) -> str:
        """Return the text of a document."""
        document = self.documents[number]
        return document if isinstance(document, str) else document.text


class RankedDocument(BaseModel):
    """A ranked document."""

    index: int = Field(description="Its place in the request, from 0.")
    relevance_score: float = Field(description="Its reward; any number, and comparable within one response only.")
    document: RerankDocument | None = None


class RerankUsage(BaseModel):
    """Token counts of all documents, each with the query."""

    prompt_tokens: int
    total_tokens: int


class Reranking(BaseModel):
    """Ranked documents, best first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: RerankUsage
    personalization: Personalization


class LearnRequest(_Request):
    """The user to learn."""

    user: UserId


class Learned(BaseModel):
    """Confirmation that the model has learned a user."""

    user: str
    object: Literal["user"] = "user"
    pairs: int = Field(description="Pairs that the user was learned from.")


class Health(BaseModel):
    """State of the server."""

    status: Literal["ok"] = "ok"


def event_stream(model: type[BaseModel]) -> dict[str, Any]:
    """Return the documentation of a stream of server-sent events, each of which holds a `model`."""
    data = {"type": "string", "description": f"A {model.__name__} as JSON, an error, or at last [DONE]."}
    event = {"type": "object", "description": "An event.", "properties": {"data": data}, "required": ["data"]}
    return {"text/event-stream": {"schema": event}}
