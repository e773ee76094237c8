"""Small data sets in exactly the schema of the original ones, made on the spot."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from conftest import WORDS

PROFILES = {  # the sentences of data/psoups_dataset.ipynb, github.com/HumainLab/Personalized_RLHF
    "P1A": "Generate a response that can be easily understood by an elementary school student.",
    "P1B": "Generate a response that only a PhD Student in that specific field could understand.",
    "P2A": "Generate a response that is concise and to the point without being verbose.",
    "P2B": "Generate a response that is very informative without missing any background information.",
    "P3A": "Generate a response that is friendly, witty, funny, and humorous, like a close friend.",
    "P3B": "Generate a response in an unfriendly manner.",
}
MODELS = ["beaver_7b", "gemma_2b", "gemma_7b", "llama3_sfairx", "mistral_raft", "mistral_ray", "mistral_weqweasdas",
          "oasst_deberta_v3", "oasst_pythia_1b", "oasst_pythia_7b"]  # fmt: skip


def words(number: int, count: int = 3) -> str:
    """Different words for different numbers, all of which the small tokenizer knows."""
    digits = [number // len(WORDS) ** place % len(WORDS) for place in range(count)]
    return " ".join(WORDS[digit] for digit in digits)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_hub_card(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    """Write the card by which `load_dataset` finds the files of each configuration's splits."""
    lines = ["---", "configs:"]
    for name, files in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split, file in files.items() for line in (f"  - split: {split}", f'    path: "{file}"')]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def comparison(number: int, worker: str, split: str = "train", **changes: object) -> dict:
    """A row of comparisons/batch*.json; the first summary is the longer one, and the second is chosen."""
    return {
        "info": {"id": f"t3_{number}", "post": words(number), "title": words(number, 1), "subreddit": "tifu"},
        "summaries": [
            {"text": " " + words(number, 5), "policy": "sup2", "note": "ok"},
            {"text": " " + words(number + 1, 2), "policy": "sup4_6b_t.7", "note": None},
        ],
        "choice": 1,
        "worker": worker,
        "batch": "batch9",
        "split": split,
        "extra": {"confidence": 8},
        **changes,
    }


def comparisons(counts: dict[str, int], split: str = "train", start: int = 0) -> list[dict]:
    """So many comparisons of each worker, taking turns."""
    rows = []
    for turn in range(max(counts.values())):
        for worker in (worker for worker, count in counts.items() if turn < count):
            rows.append(comparison(start + len(rows), worker, split))
    return rows


def write_psoups(folder: Path, per_user: int = 4) -> Path:
    """Six files of `per_user` comparisons, each written twice, and one more of equal completions."""
    for user, (profile, sentence) in enumerate(PROFILES.items()):
        rows = [
            {
                "user_input": f"{words(10 * user + i)} {sentence}",
                "completion_a": words(10 * user + i, 4),
                "completion_b": words(10 * user + i + 1, 4),
            }
            for i in range(per_user)
        ]
        rows = [*rows, {**rows[0], "completion_b": rows[0]["completion_a"]}, *rows]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{profile}.json").write_text(json.dumps(rows, indent=2))
    return folder


def write_koala(path: Path, count: int = 3) -> Path:
    path.write_text(json.dumps([{"id": str(i), "prompt": words(100 + i)} for i in range(count)]))
    return path


def respondent(user_id: str, dialogues: int = 1, **changes: object) -> dict:
    """A row of survey.jsonl."""
    names = ["values", "creativity", "fluency", "factuality", "diversity", "safety", "personalization", "helpfulness"]
    return {
        "user_id": user_id,
        "survey_only": not dialogues,
        "num_completed_conversations": dialogues,
        "consent": "Yes, I consent to take part",
        "self_description": f"{user_id} likes the sun",
        "system_string": "Be fast.",
        "age": "25-34 years old",
        "gender": "Female",
        "employment_status": "Working full-time",
        "education": "University Bachelors Degree",
        "marital_status": "Never been married",
        "english_proficiency": "Fluent",
        "stated_prefs": {name: 10 * place for place, name in enumerate(names)} | {"other": None},
        "order_stated_prefs": {name: place for place, name in enumerate(names, start=1)} | {"other": 9},
        **changes,
    }


def utterance(turn: int, role: str, content: str, chosen: bool | None = None, score: int | None = None) -> dict:
    by = None if role == "user" else "some"
    place = {"turn": turn, "within_turn_id": None if role == "user" else 0}
    judged = {"score": score, "if_chosen": chosen}
    return {**place, "role": role, "content": content, "model_name": by, "model_provider": by, **judged}


def dialogue(number: int, user_id: str, turns: int = 2, **changes: object) -> dict:
    """A row of conversations.jsonl: four replies to the first message and two to each later one."""
    history = []
    for turn in range(turns):
        history.append(utterance(turn, "user", words(10 * number + turn)))
        history += [
            utterance(turn, "model", words(10 * number + turn + 100 * reply, 4), reply == 0, 90 - reply)
            for reply in range(2 if turn else 4)
        ]
    return {
        "conversation_id": f"c{number}",
        "user_id": user_id,
        "conversation_type": "unguided",
        "opening_prompt": history[0]["content"],
        "conversation_turns": turns,
        "conversation_history": history,
        "open_feedback": "fine",
        **changes,
    }


def write_prism(folder: Path, users: int = 20, dialogues: int = 4) -> Path:
    """Users with 1 to `dialogues` dialogues in turn, and one who took the survey alone."""
    numbers = {f"user{i}": 1 + i % dialogues for i in range(users)}
    survey = [respondent(user, count) for user, count in numbers.items()]
    write_jsonl(folder / "survey.jsonl", [*survey[:3], respondent("shy", 0), *survey[3:]])
    owners = [user for user, count in numbers.items() for _ in range(count)]
    write_jsonl(folder / "conversations.jsonl", [dialogue(i, user) for i, user in enumerate(owners)])
    write_hub_card(folder, {name: {"train": f"{name}.jsonl"} for name in ("survey", "conversations")})
    return folder


def answers(number: int) -> dict:
    """A row of PersonalLLM: every reward model prefers the answer of the higher number."""
    row: dict = {"prompt": words(number), "subset": "hh", "prompt_id": number}
    for i in range(1, 9):
        row[f"response_{i}"] = words(number + i, 4)
        row[f"response_{i}_model"] = "some/model"
        row |= {f"response_{i}_{name}": float(i) for name in MODELS}
    return row


def write_ultrafeedback_p(folder: Path, rows: int = 3) -> Path:
    """Four folders; of the last row of each file all users think alike."""
    for user, subset in enumerate(("8", "4", "2", "1")):
        for split in ("train", "test"):
            pairs = []
            for i in range(rows):
                prompt, number = words(i), 10 * i + user
                pairs.append(
                    {
                        "Index": i,
                        "original_idx": i,
                        "prompt": prompt,
                        "chosen": f"Human: {prompt}\n\nAssistant: {words(number, 4)}",
                        "rejected": f"Human: {prompt}\n\nAssistant: {words(number + 1, 4)}",
                        "data_subset": subset,
                        "controversial": i < rows - 1,
                        "reversed": False,
                        "satisfied_subset": [subset],
                        "survey_options": True,
                    }
                )
            write_jsonl(folder / subset / f"{split}.jsonl", pairs)
    return folder


def transcripts(number: int) -> dict:
    """A row of HH-RLHF, of two turns."""
    head = f"\n\nHuman: {words(number)}\n\nAssistant: {words(number + 1)}\n\nHuman: {words(number + 2)}\n\nAssistant:"
    return {"chosen": f"{head} {words(number + 3, 4)}", "rejected": f"{head} {words(number + 4, 4)}"}


def write_hh(folder: Path, rows: int = 3) -> Path:
    for start, kind in ((0, "helpful-base"), (100, "harmless-base")):
        for split in ("train", "test"):
            write_jsonl(folder / kind / f"{split}.jsonl.gz", [transcripts(start + 10 * i) for i in range(rows)])
    return folder
