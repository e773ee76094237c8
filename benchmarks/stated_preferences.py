"""What it is worth that users say what they like: true utility of answers for seen and for unseen users.

    python benchmarks/quickstart_seeds.py --configs text "text and individual"
    python benchmarks/stated_preferences.py --runs runs/quickstart_seeds

Of each run of those two configurations: what the model writes for the users it was trained on and for users it has
never met, all of whom state their three strongest tastes; and what it writes with its adapters off, which is prompting
the language model with that text. Writes a Markdown table.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

import yaml
from reporting import about, tell

from prlhf_lightning.cli.models import load_module
from prlhf_lightning.data import PreferenceDataModule, SimulatedSource
from prlhf_lightning.reports.comparison import Contender, judge


def measure(run: Path) -> dict[str, float]:
    """Return the mean utility of what a run's model writes, by whom it writes for and how."""
    model = load_module(run / "checkpoints/last.ckpt", "runs").eval()
    settings = yaml.safe_load((run / "config.yaml").read_text())["data"]["source"]["init_args"]
    source = SimulatedSource(**settings)
    data = PreferenceDataModule(source, model.policy.tokenizer, max_prompt_length=64, max_completion_length=64)
    contender = Contender(model, {})
    found = {"seen users": judge(contender, data, source)["utility"]}
    if type(model.user_model).__name__ == "TextUserModel":
        with model.policy.model.disable_adapter():
            found["prompting, no training"] = judge(contender, data, source)["utility"]
    source.seen_users = source.unseen_users  # whose answers are judged
    return found | {"unseen users": judge(contender, data, source)["utility"]}


def main() -> None:
    """Measure every run of users with texts, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="the folder of benchmarks/quickstart_seeds.py")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in sorted(args.runs.glob("text*/version_0")):
        name = run.parent.name.rsplit("-", 2)[0].replace("_", " ")
        for who, utility in measure(run).items():
            found[name, who].append(utility)
    lines = ["| user model | | true utility (range over seeds) |", "|---|---|---|"]
    lines += [
        f"| {name} | {who} | {mean(values):.3f} ({min(values):.3f} to {max(values):.3f}) |"
        for (name, who), values in found.items()
    ]
    tell(f"{about()}.\n\n" + "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
