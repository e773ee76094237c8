"""Time and memory of a step of online RL, ours beside TRL's GRPOTrainer: generate, score, update.

    OMP_NUM_THREADS=1 python benchmarks/online_step.py
    OMP_NUM_THREADS=1 python benchmarks/online_step.py --shapes 0 --repeats 2

Each contender trains in a process of its own, with its whole trainer, and they take turns step by step. All have the
same model of random weights, LoRA, prompts, number and length of answers, reward function and GRPO loss without a
reference, and none recomputes activations. An end token has a chance of 1 in 32,000, so nearly all answers have the
full length. A time is the CPU time of the process, which other programs on the machine disturb least. Memory is the
peak of the resident memory of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from contenders import MODELS, RANK, environment
from peft import LoraConfig
from reporting import tell
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from prlhf_lightning.data import FileSource
from prlhf_lightning.losses import GRPOLoss
from prlhf_lightning.online import Reward
from prlhf_lightning.policies import CausalLMPolicy, LoRA, Sampling
from prlhf_lightning.training import OnlineDataModule, OnlineRL, Optim
from prlhf_lightning.user_models import IndividualUserModel, UniformUserModel

SHAPES = [(64, 64), (256, 32), (16, 64)]  # tokens of a prompt, and of an answer
CONTENDERS = ("TRL", "ours, unpersonalized", "ours, 10 vectors a user")
PARTS = ("generate", "score", "log-probs", "backward", "optimizer")
LR = 1e-5


def even(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Reward the share of tokens with an even id."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def save(model: str, prompt_length: int, prompts: int, folder: Path) -> None:
    """Write a model's configuration, a tokenizer that knows all its tokens, and rows of users."""
    sizes = dict(MODELS[model])
    heads, vocab = sizes.pop("heads"), sizes["vocab_size"]
    LlamaConfig(
        **sizes, num_attention_heads=heads, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{number}" for number in range(4, vocab))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(64 * prompts):
            prompt = " ".join(draw.choices(words[4:], k=prompt_length - 1))  # <bos> is the first token
            row = {"user_id": f"user-{number % prompts}", "prompt": prompt, "chosen": "w4", "rejected": "w5"}
            file.write(json.dumps(row) + "\n")


# ---- a contender, in a process of its own


class Clock:
    """Waits for its turn before a step, and tells the time of the step and of its parts after it."""

    def __init__(self) -> None:
        """Keep standard output for the figures."""
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._parts: dict[str, float] = defaultdict(float)
        self._start, self._open = 0.0, False

    def start(self) -> None:
        """Wait for the turn; of the updates of a step, only the first waits."""
        if self._open:
            return
        self._say({"ready": True})
        sys.stdin.readline()
        self._parts.clear()
        self._open, self._start = True, time.process_time()

    def stop(self) -> None:
        """Tell what the step took."""
        seconds = time.process_time() - self._start
        status = Path("/proc/self/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
        self._say({"step": seconds, **self._parts, "peak": int(peak) / 2**10})
        self._open = False

    def _say(self, values: dict[str, Any]) -> None:
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count the time of a method as that of a part."""
        original: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                self._parts[part] += time.process_time() - begin

        setattr(owner, name, call)


def ours(folder: Path, args: argparse.Namespace, personal: bool) -> None:
    """Train with `OnlineRL`."""
    clock = Clock()
    torch.manual_seed(0)
    user_model = IndividualUserModel(10) if personal else UniformUserModel(0)
    module = OnlineRL(
        user_model,
        CausalLMPolicy(str(folder), random_init=0, lora=LoRA(rank=RANK, alpha=2 * RANK)),
        GRPOLoss(),
        [Reward(even)],
        advantages="group",
        answers_per_prompt=args.answers,
        updates=args.updates,
        micro_batch_size=args.micro_prompts,
        optim=Optim(lr=LR, warmup_steps=0),
        sampling=Sampling(max_new_tokens=args.new),
    )
    clock.watch(module, "_answers", "generate")
    clock.watch(module, "_judged", "score")
    clock.watch(module, "_log_probs", "log-probs")
    clock.watch(module, "manual_backward", "backward")
    clock.watch(module, "configure_gradient_clipping", "optimizer")

    class Turns(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
            clock.watch(trainer.optimizers[0], "step", "optimizer")

        def on_train_batch_start(self, *args: Any) -> None:
            clock.start()

        def on_train_batch_end(self, *args: Any) -> None:
            clock.stop()

    rows = FileSource(str(folder / "rows.jsonl"))
    data = OnlineDataModule(
        rows, tokenizer=str(folder), batch_size=args.prompts, validation_fraction=0, cache_dir=str(folder / "cache")
    )
    trainer = pl.Trainer(
        max_steps=(args.repeats + 1) * args.updates, max_epochs=-1, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[Turns()],
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data)


def trls(folder: Path, args: argparse.Namespace) -> None:
    """Train with TRL's GRPOTrainer."""
    import trl
    from datasets import load_dataset

    clock = Clock()
    torch.manual_seed(0)
    passes = args.prompts // args.micro_prompts

    class Turns(transformers.TrainerCallback):
        done = 0

        def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            clock.watch(optimizer, "step", "optimizer")

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            self.done += 1
            if self.done % args.updates == 0:
                clock.stop()

    trainer = trl.GRPOTrainer(
        AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder), dtype=torch.float32),
        reward_funcs=even,
        args=trl.GRPOConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=args.micro_prompts * args.answers,
            gradient_accumulation_steps=passes, num_generations=args.answers, max_completion_length=args.new,
            num_iterations=args.updates, beta=0.0, loss_type="grpo", temperature=1.0, learning_rate=LR,
            max_steps=(args.repeats + 1) * args.updates, bf16=False, use_cpu=True, gradient_checkpointing=False,
            report_to=[], disable_tqdm=True, logging_steps=10**6, save_strategy="no", max_grad_norm=1.0,
        ),
        train_dataset=load_dataset("json", data_files=str(folder / "rows.jsonl"), cache_dir=str(folder / "datasets"))[
            "train"
        ].select_columns(["prompt"]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", lora_dropout=0.0),
        callbacks=[Turns()],
    )  # fmt: skip
    clock.watch(trainer, "_generate_single_turn", "generate")
    clock.watch(trainer, "_calculate_rewards", "score")
    clock.watch(trainer, "_get_per_token_logps_and_entropies", "log-probs")
    clock.watch(trainer.accelerator, "backward", "backward")
    clock.watch(trainer.accelerator, "clip_grad_norm_", "optimizer")
    trainer.train()


def contend(name: str, folder: Path, args: argparse.Namespace) -> None:
    """Be a contender."""
    if name == "TRL":
        trls(folder, args)
    else:
        ours(folder, args, personal=name != CONTENDERS[1])


# ---- all of them


def measure(names: list[str], folder: Path, repeats: int, options: list[str]) -> dict[str, list[dict[str, float]]]:
    """Let contenders take turns; return the figures of each step but the first."""
    found: dict[str, list[dict[str, float]]] = {}
    processes = {}
    for name in names:
        command = [sys.executable, __file__, "--contender", name, "--folder", str(folder), *options]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes[name], found[name] = process, []
        process.stdout.readline()  # it is ready, and waits while others prepare
    for turn in range(repeats + 1):
        for name, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            found[name].append(json.loads(process.stdout.readline()))
            if turn < repeats:
                process.stdout.readline()
    for process in processes.values():
        if process.wait():
            sys.exit(process.returncode)
    return {name: steps[1:] for name, steps in found.items()}


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return the rows of a table."""
    lines = [
        "| | seconds a step | ratio | " + " | ".join(PARTS) + " | other | peak MiB |",
        "|---|---:|---:|" + "---:|" * (len(PARTS) + 2),
    ]
    base = statistics.median(step["step"] for step in next(iter(found.values())))
    for name, steps in found.items():
        low, middle, high = statistics.quantiles([step["step"] for step in steps], n=4)
        parts = [statistics.median(step.get(part, 0.0) for step in steps) for part in PARTS]
        other = statistics.median(step["step"] - sum(step.get(part, 0.0) for part in PARTS) for step in steps)
        cells = [f"{value:.2f}" for value in (*parts, other)]
        lines.append(
            f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {middle / base:.2f} | {' | '.join(cells)} | "
            f"{max(step['peak'] for step in steps):,.0f} |"
        )
    return lines


def main() -> None:
    """Measure every model and shape that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["20m"], choices=MODELS)
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(SHAPES)), help="indices of the shapes")
    parser.add_argument("--prompts", type=int, default=4, help="prompts in a step")
    parser.add_argument("--answers", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--micro-prompts", type=int, default=2, help="prompts in a pass, with their answers")
    parser.add_argument("--updates", type=int, default=1, help="optimizer steps on the answers of a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # what this process is
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--new", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if args.contender:
        contend(args.contender, args.folder, args)
        return
    sizes = ("prompts", "answers", "micro_prompts", "updates", "repeats")
    options = [word for name in sizes for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    args.device, args.dtype = "cpu", "float32"
    lines = [
        f"`python benchmarks/online_step.py {' '.join(sys.argv[1:])}` on {environment(args)}. {args.prompts} prompts, "
        f"{args.answers} answers each, {args.micro_prompts} prompts in a pass, {args.updates} update(s); "
        f"{args.repeats} repeats in turns.",
        "",
        "CPU seconds, median (quartiles).",
    ]
    for model in args.models:
        for prompt, new in (SHAPES[index] for index in args.shapes):
            with tempfile.TemporaryDirectory() as folder:
                save(model, prompt, args.prompts, Path(folder))
                found = measure(args.only, Path(folder), args.repeats, [*options, "--new", str(new)])
            lines += ["", f"**{model}, prompts of {prompt} tokens, answers of {new}**", "", *table(found)]
            tell("\n".join(lines), args.out)


if __name__ == "__main__":
    main()
