"""Fails unless the newest quickstart run learned what it promises, with room for one seed's luck."""

import json
from pathlib import Path

newest = max(Path("runs").glob("version_*/comparison.json"), key=lambda path: path.stat().st_mtime)
results = json.loads(newest.read_text())
ours, vanilla, best = results["personalized"], results["vanilla"], results["best possible"]
checks = {
    "seen users' accuracy, of the ceiling": ours["val/seen/accuracy"] / best["val/seen/accuracy"] >= 0.92,
    "well-formed": ours["well_formed"] >= 0.95,
    "utility": ours["utility"] >= 0.75,
    "vanilla DPO's utility": vanilla["utility"] < 0.3,
    "generic user against vanilla DPO": ours["val/seen/generic_accuracy"] >= vanilla["val/seen/accuracy"] - 0.04,
}
missed = [name for name, reached in checks.items() if not reached]
if missed:
    raise SystemExit(f"{newest}: missed {missed}; {results}")
