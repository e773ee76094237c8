"""Limits on the time and memory of chat templates, which come with a model and are untrusted.

Jinja's sandbox keeps a template from reading or changing anything, but not from endless loops or growth. Here every
loop iteration, call and filter checks the time, and an operation that would create a huge text or number is rejected
before it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import wraps
from threading import local
from typing import Any, cast

from jinja2 import Environment, Template, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from prlhf_lightning.errors import ConfigurationError

SECONDS = 2.0  # CPU time of the thread per conversation; rendering takes milliseconds
_LONGEST_TEMPLATE = 1_000_000  # characters; the templates of large models have up to 30,000
_LARGEST = 100_000_000  # characters of a text, or entries of a list
_WIDEST = 100_000  # of a number that is a width or a count
_MOST_BITS = 10_000  # of an integer
#: Filters, and methods of texts and numbers, whose numbers are widths and counts.
_BY_WIDTH = {"center", "indent", "batch", "slice", "round", "wordwrap", "truncate", "tojson"}
_BY_WIDTH |= {"ljust", "rjust", "zfill", "expandtabs", "to_bytes"}


class TemplateLimitError(ConfigurationError):
    """A chat template exceeds the limits of time or size."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the tokenizer's chat template (chat_template.jinja, or chat_template in tokenizer_config.json) {what}; "
            "correct it there, or take that of the original model."
        )


class _Budget(local):
    """Remaining budget of the template that this thread renders; None if it renders none."""

    deadline: float | None = None
    characters = 0


_budget = _Budget()


class LimitedTemplate(Template):
    """Template with limits on rendering."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Render; see `jinja2.Template.render`.

        Raises:
            TemplateLimitError: It takes too long, creates too large an object, or writes invalid text.
        """
        before = _budget.deadline, _budget.characters
        _budget.deadline, _budget.characters = time.thread_time() + SECONDS, _LARGEST
        try:
            text = super().render(*args, **kwargs)
            text.encode()  # Python's texts can hold half a surrogate pair; a tokenizer fails over it with a trace
            return text
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise TemplateLimitError(f"writes U+{code:X}, half of a surrogate pair") from error
        except MemoryError as error:
            raise TemplateLimitError("needs more memory than there is") from error
        finally:
            _budget.deadline, _budget.characters = before


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits on time and size."""

    template_class = LimitedTemplate
    intercepted_binops = frozenset(("*", "**", "%", "+"))  # constants as well, which else are computed beforehand

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"finalize": _written, **kwargs})
        # Compiled templates reach these where no template can put something else in their place.
        self.rounds, self.joined = _rounds, _joined
        self.globals.pop("lipsum", None)  # generates any amount of text

    def compile(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Compile a template with checks of loops and concatenations."""
        if isinstance(source, str):
            if len(source) > _LONGEST_TEMPLATE:
                raise TemplateLimitError(f"has {len(source):,} characters, and {_LONGEST_TEMPLATE:,} are the most")
            source = self.parse(source)
            self._watch(source)
            source.set_environment(self)
        # Those that were added since the environment was made are among them.
        self.filters = {name: _limited(name, function) for name, function in self.filters.items()}
        return super().compile(source, *args, **kwargs)

    def _watch(self, template: nodes.Template) -> None:
        for loop in list(template.find_all(nodes.For)):
            loop.iter = _call("rounds", cast("list[nodes.Expr]", [loop.iter]))

        def watched(node: Any) -> Any:
            return _call("joined", node.nodes) if isinstance(node, nodes.Concat) else node

        for parent in reversed([template, *template.find_all(nodes.Node)]):  # what is inside first
            for field, value in list(parent.iter_fields()):
                setattr(parent, field, [*map(watched, value)] if isinstance(value, list) else watched(value))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Evaluate an operator, unless the result would be huge."""
        _check_time()
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(0, right))
        elif operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and isinstance(other, Sized):
                    _check_size(len(other) * max(0, one))
        elif isinstance(left, Sized) and isinstance(right, Sized):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, method or macro of a template."""
        _check_time()
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps `format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int):
            _check_growth(getattr(method, "__name__", ""), owner, [*args, *kwargs.values()])
        return super().call(context, function, *args, **kwargs)


def limit_templates() -> None:
    """Patch transformers to compile all chat templates with these limits; it has no setting for it."""
    chat_template_utils.ImmutableSandboxedEnvironment = LimitedEnvironment


def _call(attribute: str, args: Sequence[nodes.Expr]) -> nodes.Expr:
    line = args[0].lineno
    function = nodes.EnvironmentAttribute(attribute, lineno=line)
    return nodes.Call(function, list(args), [], None, None, lineno=line)


def _rounds(values: Iterable[Any]) -> Iterable[Any]:
    """Wrap the values of a loop so every iteration checks the time."""
    return _Timed(values) if isinstance(values, Sized) else _timed(values)


class _Timed:
    """Wrapper of a collection in a loop; supports `len`."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return _timed(self._values)


def _timed(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _check_time()
        yield value


def _joined(*parts: Any) -> str:
    """Concatenate parts, as the operator `~` does."""
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _written(value: Any) -> Any:
    """Return an output value; counts its characters."""
    if _budget.deadline is not None:
        _check_time()
        _budget.characters -= len(value) if isinstance(value, str) else len(str(value))
        if _budget.characters < 0:
            _check_size(_LARGEST + 1)
    return value


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so it checks its arguments first."""
    if hasattr(function, "_is_limited"):
        return function

    @wraps(function)  # keeps what Jinja notes on it
    def limited(*args: Any, **kwargs: Any) -> Any:
        _check_time()
        given = [value for value in args if not isinstance(value, Environment | Context | nodes.EvalContext)]
        _check_growth(name, given[0] if given else None, [*given[1:], *kwargs.values()])
        return function(*args, **kwargs)

    vars(limited)["_is_limited"] = True
    return limited


def _check_time() -> None:
    if _budget.deadline is not None and time.thread_time() > _budget.deadline:
        raise TemplateLimitError(
            f"computes for more than {SECONDS:g} seconds over one conversation, as in endless loops"
        )


def _check_size(size: int) -> None:
    if size > _LARGEST:
        raise TemplateLimitError(f"makes a text or a list of more than {_LARGEST:,} characters or entries")


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise TemplateLimitError("computes with a number of thousands of digits")


def _check_growth(name: str, value: Any, others: Sequence[Any]) -> None:
    """Check a filter or method whose result may be far larger than its arguments."""
    if name in _BY_WIDTH and any(isinstance(other, int) and abs(other) > _WIDEST for other in others):
        raise TemplateLimitError(f"asks {name!r} for more than {_WIDEST:,}")
    if name in ("replace", "translate") and others:
        largest = max(others[-1].values(), key=_size, default="") if isinstance(others[-1], dict) else others[1:2]
        _check_size(
            (_size(value) + 1) * max(1, _size(largest[0] if isinstance(largest, list) and largest else largest))
        )
    elif name == "join" and others:
        between, parts = (value, others[0]) if isinstance(value, str) else (others[0], value)
        _check_size(_size(between) * _size(parts))
    elif name in ("format", "format_map") and isinstance(value, str):
        _check_format(value)


def _check_format(text: str) -> None:
    """Check the widths in a format."""
    digits = "".join(sign if sign.isdigit() else " " for sign in text)
    if any(len(number) > 5 for number in digits.split()) or "*" in text:
        raise TemplateLimitError(f"formats a text to a width of more than {_WIDEST:,}, or to one that it computes")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 1
