"""Prompts without judgments, from the configuration to the file of predictions."""

from __future__ import annotations

import json

from original_files import write_koala, write_psoups

from prlhf_lightning.cli.main import main


def test_each_koala_prompt_is_answered_for_all_six_users(model_path, repo_root, tmp_path):
    koala = write_koala(tmp_path / "koala_eval_50.json")
    options = ["--config", repo_root / "configs/paper/psoups_individual.yaml", "--data.source.folder",
               write_psoups(tmp_path), "--data.source.koala", koala, "--model.policy.model", model_path,
               "--model.policy.dtype", "float32", "--trainer.accelerator", "cpu", "--trainer.default_root_dir",
               tmp_path / "runs", "--trainer.enable_progress_bar", "false"]  # fmt: skip
    main(["predict", *map(str, options)])
    (path,) = (tmp_path / "runs").rglob("predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["user_id"] for row in rows] == [*"123456"] * 3
    assert len({row["prompt"] for row in rows}) == 3
