"""Kills a server (kill -9) while clients hand in feedback, and counts what was acknowledged and is not in the log.

    python benchmarks/serve_kill.py --model last.ckpt --kills 20

Each server is killed at a random moment and the next one goes on with the same log. Every client hands in again, with
the same id, what was not acknowledged, so each judgment must be there exactly once at the end. A last server is ended
by SIGTERM while it writes an answer, which must come to its end, and while clients hand in feedback.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from rich.progress import track
from serve_processes import server

from prlhf_lightning.data.feedback_log import FeedbackLog

CLIENTS = 8


def hand_in(url: str, client: int, acknowledged: set[str], pending: dict[int, str]) -> None:
    """Hand in one judgment after another until the server is gone."""
    with httpx.Client(base_url=url, timeout=10) as http:
        while True:
            name = pending.setdefault(client, f"{client}-{len(acknowledged)}-{random.random()}")
            body = {"id": name, "user": f"user-{client}", "prompt": "p", "chosen": name, "rejected": "no"}
            try:
                http.post("/v1/feedback", json=body).raise_for_status()
            except httpx.TransportError:
                return
            acknowledged.add(name)
            del pending[client]


def clients(url: str, acknowledged: set[str], pending: dict[int, str]) -> list[threading.Thread]:
    """Start clients who hand in feedback."""
    threads = [threading.Thread(target=hand_in, args=(url, client, acknowledged, pending)) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    return threads


def main() -> None:
    """Kill servers; print the figures as JSON; exit with 1 if anything was lost or is there twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    acknowledged: set[str] = set()
    pending: dict[int, str] = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "feedback.db"
        options = ("--feedback_log", f"sqlite:///{path}")
        for _ in track(range(args.kills), "Killing servers"):
            with server(args.model, *options) as (url, process):
                threads = clients(url, acknowledged, pending)
                time.sleep(random.uniform(0.05, 2))
                process.send_signal(signal.SIGKILL)
                for thread in threads:
                    thread.join()
        with server(args.model, *options) as (url, process):
            model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
            asked = {"model": model, "prompt": "What helps to sleep better?", "max_tokens": 60, "stream": True}
            threads = clients(url, acknowledged, pending)
            with httpx.stream("POST", f"{url}/v1/completions", json=asked) as response:
                process.terminate()
                finished = response.read().endswith(b"data: [DONE]\n\n")
            code = process.wait()
            for thread in threads:
                thread.join()
        kept = [row["chosen"] for _, row in FeedbackLog(str(path)).pairs()]
    figures = {
        "kills": args.kills,
        "acknowledged": len(acknowledged),
        "lost": len(acknowledged - set(kept)),
        "twice": len(kept) - len(set(kept)),
        "SIGTERM: answer finished": finished,
        "SIGTERM: exit code": code,
    }
    print(json.dumps(figures, indent=2))
    raise SystemExit(0 if finished and not (figures["lost"] or figures["twice"] or code) else 1)


if __name__ == "__main__":
    main()
