"""Many streaming clients at once, each for somebody else: throughput, latencies, errors, and whose text comes back.

    python benchmarks/serve_load.py --model last.ckpt --clients 64 --minutes 5

Before the load, each request is made alone; under load its answer must be the same, letter by letter. Every client has
its own prompts, its own blend of users and its own seeds, so an answer that reaches the wrong client is told by its
text: `foreign` counts those that another client should have got. `changed` counts those that nobody should have got,
such as a rounding that tipped a choice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
from rich.progress import Progress
from serve_processes import server

from prlhf_lightning.simulation.grammar import PROMPTS


@dataclass
class Tally:
    """What happened."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    problems: Counter[str] = field(default_factory=Counter)


def cases(client: int, users: list[str], count: int) -> list[dict[str, Any]]:
    """Return the requests of a client: no other client has any of them."""
    draw = Random(client)
    a, b = draw.sample(users, 2)
    return [
        {
            "prompt": draw.choice(PROMPTS),
            "blend": {a: 1.0, b: round(draw.uniform(0.05, 0.5), 3)},
            "strength": draw.choice([1.0, 1.0, 1.5]),
            "seed": 1000 * client + number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for number in range(count)
    ]


async def ask(client: httpx.AsyncClient, case: dict[str, Any], tally: Tally) -> str | None:
    """Return the text of a streamed answer, or None where there is none."""
    started, text, first, usage = time.monotonic(), "", 0.0, None
    try:
        async with client.stream("POST", "/v1/completions", json=case) as response:
            if response.status_code != 200:
                tally.problems[f"status {response.status_code}"] += 1
                return None
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    tally.problems["error in stream"] += 1
                    return None
                if event["choices"]:
                    first = first or time.monotonic() - started
                    text += event["choices"][0]["text"]
                usage = event.get("usage") or usage
    except httpx.HTTPError as error:
        tally.problems[type(error).__name__] += 1
        return None
    if usage is None:
        tally.problems["cut off"] += 1
        return None
    tally.first.append(first)
    tally.whole.append(time.monotonic() - started)
    tally.tokens += usage["completion_tokens"]
    return text


async def load(url: str, clients: int, seconds: float, count: int) -> dict[str, Any]:
    """Run the clients and return the figures."""
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        users = [user["id"] for user in (await client.get("/v1/users")).json()["data"]]
        asked = [[case | {"model": model} for case in cases(i, users, count)] for i in range(clients)]
        with Progress() as bar:
            alone = bar.add_task("Each request alone", total=clients * count)
            expected = []
            for own in asked:
                expected.append([await ask(client, case, Tally()) for case in own])
                bar.advance(alone, count)
            whose = {text: i for i, own in enumerate(expected) for text in own}
            tally, started = Tally(), time.monotonic()

            async def talk(i: int) -> None:
                turn = 0
                while time.monotonic() < started + seconds:
                    text, right = await ask(client, asked[i][turn % count], tally), expected[i][turn % count]
                    if text is not None and text != right:
                        tally.problems["foreign" if whose.get(text, i) != i else "changed"] += 1
                    turn += 1

            async def tell() -> None:
                task = bar.add_task(f"{clients} clients", total=seconds)
                while (gone := time.monotonic() - started) < seconds:
                    bar.update(task, completed=gone)
                    await asyncio.sleep(0.5)

            await asyncio.gather(tell(), *(talk(i) for i in range(clients)))
            took = time.monotonic() - started
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "answers": len(tally.whole),
        "different answers expected": len(whose),
        "answers a second": round(len(tally.whole) / took, 1),
        "tokens a second": round(tally.tokens / took),
        "first text, ms": percentiles(tally.first),
        "whole answer, ms": percentiles(tally.whole),
        "problems": dict(tally.problems),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the median and two high percentiles in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
    return {f"p{p}": round(1000 * cuts[p - 1], 1) for p in (50, 95, 99)} if cuts else {}


def main() -> None:
    """Start a server, load it, print the figures as JSON; exit with 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or checkpoint of a model of the simulated users")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--cases", type=int, default=8, help="different requests of each client")
    args = parser.parse_args()
    with server(args.model, "--feedback_log", "none") as (url, _):
        figures = asyncio.run(load(url, args.clients, 60 * args.minutes, args.cases))
    print(json.dumps(figures, indent=2))
    raise SystemExit(1 if figures["problems"] else 0)


if __name__ == "__main__":
    main()
