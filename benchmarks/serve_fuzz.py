"""Holds a server against its own OpenAPI document with schemathesis: thousands of right and wrong requests.

    python benchmarks/serve_fuzz.py --model last.ckpt --examples 400

All of schemathesis' checks count: no 5xx, only documented statuses, headers and bodies, wrong requests refused, keys
asked for, unknown methods refused. Right requests must be taken, but for what no schema can say, which this file adds
as a check of its own: a prompt that is too long for the model, that has no token, or that is an answer already.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from tempfile import TemporaryDirectory

import httpx
import schemathesis
from schemathesis import CheckContext, Response
from serve_processes import server

KEY = "a-key-for-the-fuzz-test"
BEYOND_SCHEMAS = {"refused", "no_chat_template", "prompt_ends_with_answer"}


@schemathesis.check
def right_requests_are_taken(ctx: CheckContext, response: Response, case: schemathesis.Case) -> None:
    """Fail where a request that fits the document is refused as if it did not."""
    if case.meta and case.meta.generation.mode.is_positive and response.status_code in (400, 413, 422):
        code = response.json()["error"]["code"]
        assert code in BEYOND_SCHEMAS, f"refused with {response.status_code} {code}"


def statuses(metrics: str) -> dict[str, int]:
    """Return how many requests the server answered with each status, and in all."""
    counts: Counter[str] = Counter()
    for status, number in re.findall(r'^prlhf_http_requests_total{.*status="(\d+)"} (\S+)$', metrics, re.MULTILINE):
        counts[status] += round(float(number))
    return {**dict(sorted(counts.items())), "requests": counts.total()}


def main() -> None:
    """Start a server, run schemathesis on it, and print how many requests got which status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--examples", type=int, default=400, help="requests of each kind for each operation")
    args, more = parser.parse_known_args()  # what else is given goes to schemathesis
    os.environ["PRLHF_API_KEY"] = KEY
    options = ["--max_new_tokens", "4", "--adapt", str(args.model.endswith(".ckpt")).lower(), "--feedback_log"]
    with TemporaryDirectory() as folder, server(args.model, *options, f"{folder}/feedback.db") as (url, _):
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
        command += ["-H", f"Authorization: Bearer {KEY}", "--max-examples", str(args.examples), "--checks", "all"]
        command += ["--exclude-checks", "positive_data_acceptance", "--continue-on-failure", *more]
        environment = os.environ | {"SCHEMATHESIS_HOOKS": "serve_fuzz", "PYTHONPATH": _path()}
        code = subprocess.run(command, env=environment, check=False).returncode
        print(json.dumps(statuses(httpx.get(f"{url}/metrics").text), indent=2))
    raise SystemExit(code)


def _path() -> str:
    return os.pathsep.join([os.path.dirname(os.path.abspath(__file__)), os.environ.get("PYTHONPATH", "")])


if __name__ == "__main__":
    main()
