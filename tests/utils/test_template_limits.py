"""Chat templates of other people end, and write what they wrote before there were limits."""

import time

import pytest
from conftest import make_tokenizer
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prlhf_lightning.utils.chat_tokens import rendered
from prlhf_lightning.utils.template_limits import LimitedEnvironment, TemplateLimitError

ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(64) }}",
    "shadowed": "{% set rounds = 1 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}
HUGE = {
    "doubled": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "added": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "multiplied": "{{ 'x' * 10**11 }}",
    "a list": "{{ (10**10 * [1]) | length }}",
    "a power": "{{ (10**7) ** (10**6) }}",
    "a width": "{{ '%09999999999d' % 1 }}",
    "a computed width": "{{ '%*d' % (10**10, 1) }}",
    "a format": "{{ '{:>9999999999}'.format('x') }}",
    "a filter": "{{ 'x' | center(10**10) }}",
    "a filter by its name": "{{ ['x'] | map('center', 10**10) | list }}",
    "a method": "{{ 'x'.ljust(10**10) }}",
    "replaced": "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
    "joined": "{{ range(99999) | join('y' * 99999) }}",
    "written": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "text": "x" * 1_000_001,
}
ORDINARY = (
    "{% for m in messages %}{{ loop.index ~ '/' ~ loop.length ~ (': ' ~ m.role) }}{{ loop.last }}{% endfor %}"
    "{% for key, value in {'a': 1}.items() %}{{ key }}{{ value }}{% else %}none{% endfor %}"
    "{% for i in [1, 2, 3] if i > 1 %}{{ i }}{% endfor %}{% for one in missing %}x{% else %}none{% endfor %}"
    "{% for m in [[1, [2]], 3] recursive %}{{ loop(m) if m is iterable else m }}{% endfor %}"
    "{{ messages | map(attribute='content') | join(', ') }}{{ '%5d' % 3 }}{{ '{:>5}'.format('x') }}{{ 2 ** 10 * 3 }}"
    "{{ 'a,b'.split(',') + ['c'] }}{{ 'x' * 3 }}{{ {'maximum': 10000000} | tojson }}{{ 'a-b'.replace('-', '+') }}"
)
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bye"}]


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_template_is_refused_within_seconds(template, monkeypatch):
    monkeypatch.setattr("prlhf_lightning.utils.template_limits.SECONDS", 0.2)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    start = time.thread_time()
    with pytest.raises(TemplateLimitError, match=r"chat_template.jinja.* computes for more than 0.2 seconds"):
        rendered(tokenizer, MESSAGES)
    assert time.thread_time() - start < 2


@pytest.mark.parametrize("template", HUGE.values(), ids=HUGE)
def test_what_would_be_huge_is_refused_before_it_is_made(template):
    tokenizer = make_tokenizer()
    with pytest.raises(TemplateLimitError):
        tokenizer.apply_chat_template(MESSAGES, chat_template=template, tokenize=False)


def test_an_ordinary_template_writes_the_same_with_limits():
    limited, plain = (
        environment().from_string(ORDINARY).render(messages=MESSAGES)
        for environment in (LimitedEnvironment, ImmutableSandboxedEnvironment)
    )
    assert limited == plain


def test_the_time_is_counted_for_each_conversation(monkeypatch):
    monkeypatch.setattr("prlhf_lightning.utils.template_limits.SECONDS", 0.3)
    template = LimitedEnvironment().from_string("{% for i in range(999) %}{{ i }}{% endfor %}")
    start = time.thread_time()
    while time.thread_time() - start < 0.5:
        template.render()


def test_half_a_surrogate_pair_is_no_text():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ '\\ud800' }}"
    with pytest.raises(TemplateLimitError, match=r"U\+D800, half of a surrogate pair"):
        rendered(tokenizer, MESSAGES)
