"""Step time and memory of P-DPO as the number of users grows.

    python benchmarks/users.py

All sizes are in one process and take turns. A step is forward, loss, backward, clipping and the optimizer, on the same
pairs with a cached reference; each step meets other users. The longest column of memory is exact: bytes of the user
table and of the optimiser's state for it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from contenders import MODELS, RANK, descend, environment, make_batch, save_model
from reporting import tell

from prlhf_lightning.data import UserVocabulary
from prlhf_lightning.losses import DPOLoss
from prlhf_lightning.policies import CausalLMPolicy, LoRA
from prlhf_lightning.training import PersonalizedLM, RowwiseAdamW
from prlhf_lightning.user_models import IndividualUserModel


def make(path: Path, users: int, args: argparse.Namespace) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return a step, and what tells the MiB of the user table and of the optimiser's state for it."""
    torch.manual_seed(0)
    policy = CausalLMPolicy(str(path), lora=LoRA(rank=RANK, alpha=2 * RANK), dtype=args.dtype, random_init=0)
    module = PersonalizedLM(IndividualUserModel(args.num_tokens), policy, DPOLoss(), alpha=0.5)
    module.vocabulary = UserVocabulary([f"user-{i}" for i in range(users)])
    module.configure_model()
    module.to(args.device).train()
    batch = make_batch(tuple(args.shape), args.pairs, args.device)
    batch = replace(batch, reference=module.reference_log_probs(batch))
    groups = [{"params": [p for p in module.parameters() if p.requires_grad]}]
    optimizer = RowwiseAdamW(groups, lr=1e-5)
    (table,) = module.user_model.row_tables()
    draw = torch.Generator().manual_seed(0)

    def step() -> float:
        ids = tuple(f"user-{i}" for i in torch.randint(users, (args.pairs,), generator=draw).tolist())
        return descend(module.objective(replace(batch, user_ids=ids))[0].mean(), optimizer)

    def memory() -> float:
        state = [value for value in optimizer.state[table].values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in [table, *state]) / 2**20

    return step, memory


def main() -> None:
    """Measure every size and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", nargs="+", type=int, default=[10, 1_000, 100_000, 1_000_000])
    parser.add_argument("--num_tokens", type=int, default=2, help="soft-prompt vectors a user")
    parser.add_argument("--model", default="20m", choices=MODELS)
    parser.add_argument("--shape", nargs=3, type=int, default=[128, 64, 64], help="prompt, chosen, rejected")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(args.model, Path(folder))
        runs = {users: make(path, users, args) for users in args.users}
        times: dict[int, list[float]] = {users: [] for users in runs}
        for turn in range(args.repeats + 2):
            for users, (step, _) in runs.items():
                start = time.perf_counter()
                step()
                if args.device == "cuda":
                    torch.cuda.synchronize()
                if turn > 1:  # the first steps allocate the optimiser's state
                    times[users].append(1e3 * (time.perf_counter() - start))
    base = statistics.median(times[args.users[0]])
    lines = [
        f"`python benchmarks/users.py` on {environment(args)}. {args.model} parameters, LoRA, "
        f"{args.num_tokens} vectors a user, {args.pairs} pairs, prompt {args.shape[0]}, completions {args.shape[1]}.",
        "",
        f"| users | ms a step, median (quartiles) of {args.repeats} | ratio | MiB of table and optimizer state |",
        "|---:|---:|---:|---:|",
    ]
    for users, (_, memory) in runs.items():
        low, middle, high = statistics.quantiles(times[users], n=4)
        lines.append(f"| {users:,} | {middle:.0f} ({low:.0f} to {high:.0f}) | {middle / base:.2f} | {memory():,.1f} |")
    tell("\n".join(lines), args.out)


if __name__ == "__main__":
    main()
