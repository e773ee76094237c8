"""What the limits on chat templates cost for each conversation.

    OMP_NUM_THREADS=1 python benchmarks/template_limits.py

The same conversation is rendered in turns with the limits and with Jinja's sandbox as transformers uses it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from reporting import about, tell

from prlhf_lightning.utils.template_limits import LimitedEnvironment

CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [about(), "", "| messages | µs without limits | with limits | ratio |", "|---:|---:|---:|---:|"]
    for count in args.messages:
        messages = [
            {"role": "user" if n % 2 else "assistant", "content": "a sentence or two. " * 9} for n in range(count)
        ]
        times: dict[type, list[float]] = {ImmutableSandboxedEnvironment: [], LimitedEnvironment: []}
        made = {kind: kind(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]) for kind in times}
        templates = {kind: environment.from_string(CHATML) for kind, environment in made.items()}
        for _ in range(args.repeats):
            for kind, template in templates.items():
                start = time.thread_time()
                for _ in range(100):
                    template.render(messages=messages, add_generation_prompt=True)
                times[kind].append(1e4 * (time.thread_time() - start))
        plain, limited = map(statistics.median, times.values())
        lines.append(f"| {count} | {plain:.0f} | {limited:.0f} | {limited / plain:.2f} |")
    tell("\n".join(lines), args.out)


if __name__ == "__main__":
    main()
