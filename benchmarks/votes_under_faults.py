"""Hands in votes while the feedback log is damaged in one way after the other; counts what was acknowledged and lost.

    python benchmarks/votes_under_faults.py --model MODEL --votes 1000

Each fault meets a server of its own with a new log, while 8 clients hand in pairs and thumbs, a third of them twice,
one asks for completions, and one asks whether the server is ready. A vote that is not acknowledged is handed in again
with the same id until it is. Faults of SQLite that need a mount are left out, and so said, unless root runs this; those
of PostgreSQL where it is not installed. `--only PATTERN` takes the faults whose names match.

`lost` counts votes that were acknowledged and are not in the log. Where a fault takes the log away with the votes in
it (it is deleted, replaced or dropped), those acknowledged before are `gone with it`, and lost are only those that were
sent once it had happened. `ready though not` is how long after the fault the server still said that it was ready,
though it took no vote any more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import log_faults
from postgres_cluster import Cluster, binaries, running_cluster

from prlhf_lightning.cli import main as cli
from prlhf_lightning.data import FeedbackLogSource
from prlhf_lightning.data.records import parse_record
from prlhf_lightning.errors import FeedbackFormatError

CLIENTS = 8
GIVE_UP = 90  # seconds after the fault's end


# Servers are forked from a process that has imported what they need, or most of the time would go into imports.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["prlhf_lightning.cli.fit", "prlhf_lightning.serving.server", "prlhf_lightning.cli.main"])


def serve(arguments: list[str], log: Path) -> None:
    """Be `python -m prlhf_lightning serve`."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["prlhf_lightning"]
    cli.main(["serve", *arguments])


class Server:
    """A server process, on a port that stays the same when it is started again."""

    def __init__(self, model: str, url: str, log: Path, port: int = 0) -> None:
        begin = log.stat().st_size if log.exists() else 0
        arguments = [f"--model={model}", f"--port={port}", f"--feedback_log={url}"]
        self.process = FORKS.Process(target=serve, args=(arguments, log))
        self.process.start()
        while True:
            said = log.read_text()[begin:] if log.exists() else ""
            found = re.search(r"Serving .* at http://\S+:(\d+)", said)
            if found and "startup complete" in said:
                self.port = int(found[1])
                return
            if self.process.exitcode is not None:
                raise RuntimeError(f"The server did not start:\n{said}")
            time.sleep(0.05)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it, and wait for it."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, how)
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
            raise RuntimeError("SIGTERM did not end the server within 60 seconds")


class Trial:
    """One fault: a server, its clients, and what they saw."""

    def __init__(self, model: str, votes: int, folder: Path, url: str, seed: int) -> None:
        self.model, self.votes, self.folder, self.url = model, votes, folder, url
        self.path = folder / "feedback.db"
        self.draw = random.Random(seed)
        self.said = folder.with_name(f"{folder.name}.log")
        self.servers = [Server(model, url, self.said)]
        self.queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(votes):
            self.queue.put(number)
        self.sent: dict[str, tuple[float, float]] = {}  # when each vote was sent that was then acknowledged, and when
        self.answers: Counter[str] = Counter()
        self.ready: list[tuple[float, float, bool]] = []  # asked, answered, whether ready
        self.completions: list[float] = []
        self.failed_completions = 0
        self.copies: list[tuple[set[str], str]] = []
        self.over = threading.Event()
        self.deadline = float("inf")
        self.restarting = threading.Event()

    # What faults do.

    def acknowledged(self) -> set[str]:
        """Return the ids of the votes that were acknowledged up to now."""
        return set(self.sent)

    def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the first server and start another on its port."""
        self.restarting.set()
        port = self.servers[0].port
        self.servers[0].end(how)
        self.servers[0] = Server(self.model, self.url, self.said, port)
        self.restarting.clear()

    def second_server(self) -> None:
        """Start another server; half of the clients go on with it."""
        self.servers.append(Server(self.model, self.url, self.said))

    def expect(self, kept: set[str], url: str) -> None:
        """Note what must be in another log."""
        self.copies.append((kept, url))

    # What clients do.

    def _vote(self, client: int) -> None:
        draw = random.Random(client)
        with httpx.Client(timeout=30) as http:
            while not self.over.is_set():
                try:
                    number = self.queue.get_nowait()
                except queue.Empty:
                    return
                name = f"vote-{number}"
                body: dict[str, Any] = {"id": name, "user": f"ann {number % 7}", "prompt": "Which is better? é 李"}
                if number % 2:
                    body |= {"chosen": f"{name} good", "rejected": "bad " * draw.randrange(1, 200)}
                else:
                    body |= {"completion": f"{name} text", "label": draw.choice(["up", "down"])}
                for _ in range(2 if number % 3 == 0 else 1):
                    while not self._hand_in(http, client, name, body):
                        if time.monotonic() > self.deadline:
                            return
                        time.sleep(draw.uniform(0.1, 0.4))
                time.sleep(draw.uniform(0, 0.05))

    def _hand_in(self, http: httpx.Client, client: int, name: str, body: dict[str, Any]) -> bool:
        started = time.monotonic()
        server = self.servers[client % len(self.servers)]
        try:
            status = http.post(f"http://127.0.0.1:{server.port}/v1/feedback", json=body).status_code
        except httpx.TimeoutException:
            self.answers["timeout"] += 1
            return False
        except httpx.TransportError:
            self.answers["no server"] += 1
            return False
        self.answers[str(status)] += 1
        if status in (200, 201):
            self.sent[name] = (started, time.monotonic())
        return status in (200, 201)

    def _ask(self, path: str, body: dict[str, Any] | None) -> Iterator[tuple[float, float, int]]:
        with httpx.Client(timeout=60) as http:
            while not self.over.is_set():
                started = time.monotonic()
                with suppress(httpx.TransportError):
                    url = f"http://127.0.0.1:{self.servers[0].port}{path}"
                    status = (http.post(url, json=body) if body else http.get(url)).status_code
                    yield started, time.monotonic(), status
                time.sleep(0.1)

    def _complete(self) -> None:
        name = httpx.get(f"http://127.0.0.1:{self.servers[0].port}/v1/models").json()["data"][0]["id"]
        for started, ended, status in self._ask("/v1/completions", {"model": name, "prompt": "Hi", "max_tokens": 5}):
            self.completions.append(ended - started)
            self.failed_completions += status != 200

    def _probe(self) -> None:
        for started, ended, status in self._ask("/readyz", None):
            self.ready.append((started, ended, status == 200))

    # What is found.

    def run(self, name: str, seconds: float) -> dict[str, Any]:
        """Bring a fault about, let the clients finish, and compare."""
        fault = (log_faults.SQLITE if self.url.startswith("sqlite") else log_faults.POSTGRES)[name]
        voters = [threading.Thread(target=self._vote, args=(client,)) for client in range(CLIENTS)]
        others = [threading.Thread(target=run) for run in (self._complete, self._probe)]
        for thread in voters + others:
            thread.start()
        try:
            while len(self.sent) < self.votes * self.draw.uniform(0.2, 0.6):
                time.sleep(0.01)
            began = time.monotonic()
            steps = fault(self, seconds)
            next(steps)
            happened = time.monotonic()
            time.sleep(seconds)
            ending = time.monotonic()
            next(steps, None)
            ended = time.monotonic()
            self.deadline = ended + GIVE_UP
            for thread in voters:
                thread.join()
        finally:
            self.over.set()
            self.deadline = 0
            for thread in voters + others:
                thread.join()
            for server in self.servers:
                with suppress(RuntimeError):
                    server.end()
        return self._figures(name, began, happened, ending, ended)

    def _figures(self, name: str, began: float, happened: float, ending: float, ended: float) -> dict[str, Any]:
        kept = Counter(found(self.url))
        missing = {vote for vote in self.sent if not kept[vote]}
        old = {vote for vote in missing if self.sent[vote][0] < happened} if name in log_faults.DESTROYS else set()
        lost = len(missing - old) + sum(len(ids - set(found(url))) for ids, url in self.copies)
        during = [at for at, until in self.sent.values() if at > happened and until < ending]
        untrue = [until - began for at, until, ready in self.ready if ready and began < until < ending]
        after = [until for _, until in self.sent.values() if until > ended]
        return {
            "fault": name,
            "acknowledged": len(self.sent),
            "during the fault": len(during),
            "lost": lost,
            "gone with it": len(old),
            "twice": sum(count > 1 for count in kept.values()),
            "ready though not, s": round(max(untrue, default=0.0), 1) if not during else None,
            "back after, s": round(min(after) - ended, 1) if after else None,
            "longest readyz, s": round(max(until - at for at, until, _ in self.ready), 1),
            "longest completion, s": round(max(self.completions), 1),
            "failed completions": self.failed_completions,
            "not handed in": self.votes - len(self.sent),
            "answers": dict(self.answers),
        }


def found(url: str) -> list[str]:
    """Return the ids of the votes that a log has, as training reads them."""
    names = []
    for thumbs in (False, True):
        with suppress(FeedbackFormatError):  # no rows of this kind
            for where, row in FeedbackLogSource(url, thumbs=thumbs).rows("train"):
                parse_record(row, where, feedback="thumbs" if thumbs else "pairs")
                names.append(row["completion" if thumbs else "chosen"].split()[0])
    return names


@contextmanager
def sqlite_place(root: Path, name: str) -> Iterator[tuple[Path, str]]:
    """Give a folder for a log, on a small file system of its own where the fault needs one."""
    folder = root / re.sub(r"\W+", "_", name)
    folder.mkdir()
    small = "full" in name
    if small:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=True)
    try:
        yield folder, f"sqlite:///{folder}/feedback.db"
    finally:
        if small:
            subprocess.run(["umount", folder], check=True)


@contextmanager
def postgres_place(root: Path, name: str) -> Iterator[tuple[Path, str, Cluster, log_faults.Proxy]]:
    """Give a database behind a proxy, and a small file system where the fault needs one."""
    folder = root / re.sub(r"\W+", "_", f"pg {name}")
    folder.mkdir()
    small = "tmpfs" in name
    with running_cluster() as cluster:
        if small:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=700,uid=65534", "tmpfs", folder], check=True)
            for parent in (root, *root.parents):
                parent.chmod(parent.stat().st_mode | 0o011)
        try:
            with log_faults.psycopg.connect(cluster.url(), autocommit=True) as admin:
                admin.execute("CREATE DATABASE votes")
            proxy = log_faults.Proxy(cluster.port)
            yield folder, cluster.url("votes", proxy.port), cluster, proxy
        finally:
            if small:
                subprocess.run(["umount", "-l", folder], check=True)


def main() -> None:
    """Try all faults; print figures as a line of JSON each; exit with 1 if anything was lost or is there twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint or an exported folder, as for serve")
    parser.add_argument("--votes", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=4, help="how long a fault lasts")
    parser.add_argument("--only", default="")
    parser.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    faults = [("sqlite", name) for name in log_faults.SQLITE] + [("postgresql", name) for name in log_faults.POSTGRES]
    good = True
    with TemporaryDirectory() as root:
        for database, name in faults:
            if not re.search(args.only, name) or args.database not in (database, "both"):
                continue
            needs_mount = "mount" in name or "tmpfs" in name
            if (needs_mount and os.geteuid()) or (database == "postgresql" and binaries() is None):
                why = "needs root, to mount" if needs_mount else "PostgreSQL is not installed"
                print(json.dumps({"database": database, "fault": name, "left out": why}), flush=True)
                continue
            with ExitStack() as stack:
                if database == "sqlite":
                    folder, url = stack.enter_context(sqlite_place(Path(root), name))
                    trial = Trial(args.model, args.votes, folder, url, args.seed)
                else:
                    folder, url, cluster, proxy = stack.enter_context(postgres_place(Path(root), name))
                    trial = Trial(args.model, args.votes, folder, url, args.seed)
                    trial.cluster, trial.proxy = cluster, proxy  # type: ignore[attr-defined]
                figures = trial.run(name, args.seconds)
            print(json.dumps({"database": database} | figures), flush=True)
            good &= not (figures["lost"] or figures["twice"] or figures["not handed in"])
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
