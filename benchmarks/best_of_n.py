r"""Best-of-n and iterative P-DPO on simulated users, whose true utility of every text is known.

    python benchmarks/best_of_n.py --seeds 0 1 2

For each seed: trains the quickstart's policies, with users and without (or takes those of `--folder`), a reward model
with users and one without on the same pairs, and runs two rounds of iterative P-DPO. Measures the true utility of
answers to the held-out prompts for all users, as a share of its range: 0 is the worst answer, 1 the best, and 0.5 the
mean of all styles. The same n answers are ranked by each reward model. Prints Markdown tables and, with `--out`, writes
them to a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import torch
from reporting import about, tell
from torch import Tensor

from prlhf_lightning.cli.models import open_writer
from prlhf_lightning.data import SimulatedSource
from prlhf_lightning.inference import GenerationRequest, Generator
from prlhf_lightning.inference.best_of import kl_bound, length_correlation, sample_candidates
from prlhf_lightning.training.reward_scorer import load_scorer
from prlhf_lightning.training.scorer import Scorer

USER_MODELS = {
    "personalized": ["LowRankUserModel", "--model.user_model.num_tokens", "1", "--model.user_model.rank", "8"],
    "without users": ["UniformUserModel", "--model.user_model.num_tokens", "1"],
}
SCORERS = ["personalized reward", "reward without users", "true utility"]
#: With the quickstart's own rates, a round unlearns to write well-formed answers.
GENTLY = ["--model.optim.lr", "2e-4", "--model.optim.user_lr", "2e-3", "--model.loss.sft_weight", "1.0"]
TOKENS = 40


class TrueUtility:
    """Scores answers by the simulated users' true utility, as a share of its range."""

    def __init__(self, source: SimulatedSource) -> None:
        self.source = source

    def score(
        self, users: Sequence[str], prompts: Sequence[str], answers: Sequence[str], texts: object = None
    ) -> Tensor:
        """Return the utilities in [0, 1]."""
        judged = [self.source.judge(*row).utility for row in zip(users, prompts, answers, strict=True)]
        return (torch.tensor(judged, dtype=torch.float64) + 1) / 2


def prlhf(*words: object) -> None:
    """Run a command."""
    command = [sys.executable, "-m", "prlhf_lightning", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def fit(folder: Path, *words: object) -> Path:
    """Train, if this is not done yet; return the folder of the run."""
    if not list(folder.glob("version_*/checkpoints/last.ckpt")):
        prlhf("fit", *words, "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", folder)
    return sorted(folder.glob("version_*"))[-1]


def measured(
    writer: Generator, source: SimulatedSource, scorers: dict[str, Scorer], n: int, temperature: float
) -> dict[str, dict[str, float]]:
    """Return utility, share of well-formed answers and tokens of answers, by how they are chosen."""
    truth = TrueUtility(source)
    asked = [
        GenerationRequest(prompt, user.user_id, max_new_tokens=TOKENS, temperature=temperature, seed=0)
        for user in source.seen_users
        for prompt in source.eval_prompts()
    ]
    groups = [group for _, group in sorted(sample_candidates(writer, truth, asked, n), key=lambda one: one[0])]
    utilities = torch.stack([group.rewards.nan_to_num(0.0) for group in groups])
    lengths = torch.stack([group.lengths for group in groups]).double()
    lengths = torch.stack([group.lengths for group in groups]).double()
    rows = [(group.request.user, group.request.prompt, one.text) for group in groups for one in group.answers]
    formed = torch.tensor([float(source.judge(*row).well_formed) for row in rows]).view(len(groups), n)
    found = {
        "one sample": _means(utilities, formed, lengths, lambda values: values.mean(1)),
        f"best of {n} by true utility": _at(utilities, formed, lengths, utilities),
    }
    for name, scorer in scorers.items():
        rewards = _rewards(scorer, rows).view(len(groups), n)
        found[f"best of {n} by {name}"] = _at(utilities, formed, lengths, rewards) | {
            "correlation": length_correlation(rewards, lengths)
        }
    greedy = [GenerationRequest(one.prompt, one.user, max_new_tokens=TOKENS) for one in asked]
    answers = writer.generate(greedy)
    judged = [source.judge(one.user, one.prompt, answer.text) for one, answer in zip(greedy, answers, strict=True)]
    found["greedy answer"] = {
        "utility": statistics.mean((one.utility + 1) / 2 for one in judged),
        "well-formed": statistics.mean(one.well_formed for one in judged),
        "tokens": statistics.mean(answer.completion_tokens for answer in answers),
    }
    return found


def _rewards(scorer: Scorer, rows: Sequence[tuple[str, str, str]]) -> Tensor:
    rewards = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    kept = [place for place, row in enumerate(rows) if row[2].strip()]
    rewards[kept] = scorer.score(*map(list, zip(*(rows[place] for place in kept), strict=True))).double()
    return rewards


def _means(utilities: Tensor, formed: Tensor, lengths: Tensor, of: Callable[[Tensor], Tensor]) -> dict[str, float]:
    names = ("utility", "well-formed", "tokens")
    return {name: float(of(values).mean()) for name, values in zip(names, (utilities, formed, lengths), strict=True)}


def _at(utilities: Tensor, formed: Tensor, lengths: Tensor, rewards: Tensor) -> dict[str, float]:
    best = rewards.nan_to_num(-torch.inf).argmax(1, keepdim=True)
    return _means(utilities, formed, lengths, lambda values: values.gather(1, best))


def rounds(
    folder: Path, start: Path, pairs_by: list[object], settings: Sequence[str], seed: int, count: int
) -> list[Path]:
    """Return the runs of rounds of iterative P-DPO, each on pairs that the model before wrote."""
    found = [start]
    for number in range(1, count + 1):
        pairs = folder / f"round-{number}.jsonl"
        if not pairs.is_file():
            prlhf("make-pairs", "--model", found[-1], *pairs_by, "--seed", number, "--output", pairs)
        source = ["--data.source", "FileSource", "--data.source.train", pairs]
        words = ["--config", "configs/quickstart.yaml", "--train_baseline", "false", "--seed_everything", seed]
        found.append(fit(folder / f"round-{number}", *words, *settings, "--init_from", found[-1], *source))
    return found[1:]


def run(seed: int, given: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Return what is measured of each policy of a seed."""
    folder, n, heat = given.folder, given.n, given.temperature
    source = SimulatedSource(20, 450, 40, 20, seed=seed)
    seeds = ["--seed_everything", seed, "--data.source.seed", seed]
    start = fit(folder / f"policy-{seed}", "--config", "configs/quickstart.yaml", *seeds)
    paths = {}
    for name, user_model in USER_MODELS.items():
        words = ["--config", "configs/reward.yaml", *seeds, "--data.source.pairs_per_user", 450]
        paths[name] = fit(folder / f"reward-{_slug(name)}-{seed}", *words, "--model.user_model", *user_model)
    policies = {"vanilla DPO": start / "baseline" / "last.ckpt", "P-DPO": start}
    asked = {"--source": "SimulatedSource", "--source.pairs_per_user": 450, "--source.seed": seed, "--device": "cpu"}
    asked |= {"--num_answers": n, "--temperature": heat, "--max_new_tokens": TOKENS}
    asked["--prompts_per_user"] = given.prompts
    options = list(chain.from_iterable(asked.items()))
    by = {
        "personalized reward": ["--reward_model", paths["personalized"], *options],
        "reward without users": ["--reward_model", paths["without users"], *options],
        "true utility": ["--judge", "UtilityJudge", *options],
    }
    for scorer in given.by:
        name = f"{scorer}, quickstart's rates" if given.quickstart_rates else scorer
        settings = [] if given.quickstart_rates else GENTLY
        place = folder / f"rounds-{_slug(name)}-{seed}-{heat:g}"
        for number, path in enumerate(rounds(place, start, by[scorer], settings, seed, given.rounds), start=1):
            policies[f"P-DPO, round {number} by {name}"] = path
    found = {}
    for name, path in policies.items():
        done = folder / f"measured-{seed}-{heat:g}" / f"{_slug(name)}.json"
        if not done.is_file():
            models = {f"reward model, {kind}": model for kind, model in paths.items()}
            models |= {"implicit reward of P-DPO": start, "implicit reward of vanilla DPO": policies["vanilla DPO"]}
            scorers = {kind: load_scorer(model) for kind, model in models.items()}
            values = measured(open_writer(path), source, scorers, n, heat)
            done.parent.mkdir(exist_ok=True)
            done.write_text(json.dumps(values))
        found[name] = json.loads(done.read_text())
    return found


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def table(results: list[dict[str, dict[str, dict[str, float]]]], policies: Sequence[str]) -> str:
    """Lay out means over seeds, with their range for the utility."""
    lines = [
        "| policy | answer | true utility | well-formed | tokens | reward and length |",
        "|---|---|---|---|---|---|",
    ]
    for policy in policies:
        for answer in results[0][policy]:
            values: dict[str, list[float]] = defaultdict(list)
            for result in results:
                for key, value in result[policy][answer].items():
                    values[key].append(value)
            mean = {key: statistics.mean(each) for key, each in values.items()}
            cells = [
                f"{mean['utility']:.3f} ({min(values['utility']):.3f} to {max(values['utility']):.3f})",
                f"{mean['well-formed']:.3f}",
                f"{mean['tokens']:.1f}",
                f"{mean['correlation']:.2f}" if "correlation" in mean else "",
            ]
            lines.append(f"| {policy} | {answer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/best_of_n"), help="where runs and results are kept")
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.7, help="of sampled answers")
    parser.add_argument("--prompts", type=int, default=40, help="of each user, in a round")
    parser.add_argument("--rounds", type=int, default=2, help="of iterative P-DPO")
    parser.add_argument("--quickstart_rates", action="store_true", help="in rounds, in place of lower ones")
    parser.add_argument("--by", nargs="*", default=SCORERS, choices=SCORERS, help="who scores the answers of rounds")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results = [run(seed, given) for seed in given.seeds]
    text = (
        f"Means over seeds {', '.join(map(str, given.seeds))} (and range); best of {given.n} is at most "
        f"{kl_bound(given.n):.2f} nats from its policy; {about()}.\n\n{table(results, list(results[0]))}"
    )
    tell(text, given.out)


if __name__ == "__main__":
    main()
