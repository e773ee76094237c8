"""Any Hugging Face causal language model as a policy."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd as _Dropout
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies.base import Policy, Sampling
from prlhf_lightning.policies.capabilities import Packing, find_capabilities, is_causal
from prlhf_lightning.policies.continuation import write, writes_in_batches
from prlhf_lightning.policies.generation_settings import (
    as_generation_config,
    in_place_of_own,
    load_generation_config,
    warn_of_not_applied,
)
from prlhf_lightning.policies.loading import base_identity, check_vocabulary, load_lm, refuse_kernels, unused_ids
from prlhf_lightning.policies.lora import LoRA, add_adapters, merge
from prlhf_lightning.policies.moe import note_on_router_loss, router_loss_coef
from prlhf_lightning.policies.scoring import embed, grouped_score, score, segments, writing_inputs
from prlhf_lightning.policies.sequences import join
from prlhf_lightning.types import LogProbs, SoftPrompt, Tokens
from prlhf_lightning.utils.chat_tokens import end_token_ids, remember_end_tokens
from prlhf_lightning.utils.hashing import SETTINGS, check_folder
from prlhf_lightning.utils.hub import loading
from prlhf_lightning.utils.modes import eval_mode
from prlhf_lightning.utils.shipped import ASSETS, check_shipped
from prlhf_lightning.utils.trust import allows_remote_code

_BUILTIN = "builtin:"
# Adapters of at least this share of the weights that they adapt are merged for scoring, into a copy of up to 512 MB.
_WORTH_MERGING = 0.05
_MOST_COPIED = 1 << 27
_WORDS = 8192  # words to start soft prompts from: the scale is what matters


class CausalLMPolicy(Policy):
    """A Hugging Face causal LM with LoRA, or trained in full.

    With LoRA the reference is the same weights with the adapters off; trained in full, a frozen copy. The backbone's
    own dropout is switched off: it would make the reference, and the generic term, differ by chance alone.

    Args:
        model: Folder or hub name for `from_pretrained`, or `builtin:style-lm` for the small model that is shipped.
        lora: Adapters to train, or null to train all weights.
        dtype: Data type of the weights; `auto` takes the checkpoint's. Adapters are kept in float32.
        random_init: Seed of random weights of the model's configuration to start from, instead of its trained ones.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time. On a
            GPU, the prompt is then computed for the chosen and the rejected completion each, without `packing`.
        torch_compile: Compile the model with `torch.compile`: quicker steps, equal but for rounding, after some minutes
            of compiling. Writing stays uncompiled, since its length changes with each token.
        packing: On a GPU, lay out the prompts of a batch, each with its completions as its branches, in one row
            without padding, and pass once through the layers with FlexAttention; also with `gradient_checkpointing`,
            and sharded. Not measured on a GPU yet. Elsewhere it changes nothing. See docs/performance.md.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; null leaves the choice to transformers.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run code that comes with the model. Only for sources that you trust. What a checkpoint, an
            exported folder or a run's configuration says of it does not count when it is opened.
        router_aux_loss_coef: Of a mixture of experts, the weight of its own load-balancing loss, which is added to the
            preference loss; null takes that of `config.json` where it says `output_router_logits: true`, and 0 adds
            none. Each row is then computed whole: a prompt is not shared by its completions.
    """

    def __init__(
        self,
        model: str,
        lora: LoRA | None = LoRA(),  # noqa: B008 - frozen, hence safe to share
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        random_init: int | None = None,
        gradient_checkpointing: bool = False,
        torch_compile: bool = False,
        packing: bool = False,
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        router_aux_loss_coef: float | None = None,
    ) -> None:
        super().__init__()
        shipped = sorted(folder.name for folder in ASSETS.iterdir() if folder.is_dir())
        if model.startswith(_BUILTIN) and model.removeprefix(_BUILTIN) not in shipped:
            raise ConfigurationError(
                f"policy.model is {model!r}; these are shipped: {', '.join(_BUILTIN + name for name in shipped)}."
            )
        if packing and torch_compile:
            raise ConfigurationError(
                "policy.packing is true, with which policy.torch_compile has not been tried; set one of them to false."
            )
        self.name = model
        self.lora = lora
        self.dtype = dtype
        self.random_init = random_init
        self.gradient_checkpointing = gradient_checkpointing
        self.torch_compile = torch_compile
        self.packing = packing
        self.attn_implementation = attn_implementation
        self.revision = revision
        self.router_aux_loss_coef = router_aux_loss_coef
        if router_aux_loss_coef is not None and not 0 <= router_aux_loss_coef < math.inf:
            raise ConfigurationError(f"policy.router_aux_loss_coef is {router_aux_loss_coef}; it must be 0 or more.")
        self._auxiliary_loss: Tensor | None = None
        self._is_sharded = False
        self._is_checked = False  # whether its files were
        self._has_warned = False
        trusts = trust_remote_code and allows_remote_code()
        self._hub_args: dict[str, Any] = {"revision": revision, "trust_remote_code": trusts}

    @property
    def path(self) -> str:
        """Where the weights and the tokenizer are: a folder, or a hub name."""
        if not self.name.startswith(_BUILTIN):
            return str(Path(self.name).expanduser()) if self.name.startswith("~") else self.name
        return str(ASSETS / self.name.removeprefix(_BUILTIN))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, with EOS for padding where it has no padding token, and the model's end tokens."""
        self._check_files()
        with self._loading("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.path, **self._hub_args)
            tokenizer.decode(tokenizer("x")["input_ids"])  # where odd ones fail that can be loaded
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        with suppress(ConfigurationError):  # a folder that is not whole is refused when its weights are loaded
            remember_end_tokens(tokenizer, self.generation_config)
        if hasattr(self, "model"):
            self._check_vocabulary(tokenizer, self.lm)
        return tokenizer

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The base model's own generation config, which is read without the weights."""
        with self._loading("config"):
            return load_generation_config(self.path, **self._hub_args)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: those of the tokenizer, the generation config and the chat template."""
        tokenizer = self.tokenizer
        with self._loading("config"):
            return end_token_ids(tokenizer, self.generation_config)

    def _check_files(self) -> None:
        """Check, once, the files of a model that comes with checksums: one that is shipped, or was exported."""
        if self._is_checked:
            return
        if self.name.startswith(_BUILTIN):
            check_shipped(Path(self.path))
        elif (Path(self.path) / SETTINGS).is_file():
            try:
                check_folder(Path(self.path))
            except ConfigurationError as error:
                raise ConfigurationError(f"policy.model: {error}") from error
        self._is_checked = True

    def _check_vocabulary(self, tokenizer: PreTrainedTokenizerBase, lm: PreTrainedModel) -> None:
        with self._loading("tokenizer"):
            check_vocabulary(tokenizer, lm)

    def _loading(self, what: Literal["weights", "config", "tokenizer"]) -> AbstractContextManager[None]:
        fix = (
            "give a folder that `save_pretrained` wrote (the tokenizer's too), or a hub name that this machine can "
            "reach."
        )
        return loading(self.path, what, f"policy.model: the {what} of {self.name!r}", fix)

    def build(self, with_reference: bool = True) -> None:
        """Load the weights, add adapters, and keep a frozen copy where the reference needs one."""
        self._refuse_adapters((Path(self.path) / "adapter_config.json").is_file())
        self._check_files()
        with self._loading("weights" if self.random_init is None else "config"):
            options: dict[str, Any] = {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
            if self.random_init is not None:
                refuse_kernels(self.path, **self._hub_args, **options)
                config = AutoConfig.from_pretrained(self.path, **self._hub_args)
                options["dtype"] = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
                place = torch.get_default_device()  # which Lightning sets to where the model is trained
                # Always the same weights, since a checkpoint holds neither a frozen backbone nor the reference. A GPU
                # draws other numbers from a seed than a CPU does.
                with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                    torch.default_generator.manual_seed(self.random_init)
                    lm = AutoModelForCausalLM.from_config(
                        config, trust_remote_code=self._hub_args["trust_remote_code"], **options
                    )
                lm = lm.to(place)
                lm.generation_config = self.generation_config
            else:
                lm = load_lm(self.path, **self._hub_args, **options)
        self._refuse_adapters(getattr(lm, "_hf_peft_config_loaded", False))
        self._check_quantized(lm)
        if "tokenizer" in vars(self):  # else when it is asked for
            self._check_vocabulary(self.tokenizer, lm)
            _ = self.end_token_ids  # refused before training, and not when something is written
        lm.train()  # from_pretrained leaves it in eval mode, about which Lightning would warn
        _switch_off_dropout(lm)
        lm.config.use_cache = False  # generate asks for its cache itself
        if self.gradient_checkpointing:
            # transformers renamed it within version 5; both names are in the range that is supported.
            enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._base = base_identity(lm)
        if not is_causal(lm):
            raise ConfigurationError(
                f"policy.model: {self.name!r} is a {type(lm).__name__} whose tokens see later ones, so that it can't "
                "score or write text from left to right. Use a causal language model (an encoder becomes one with "
                "`is_decoder: true` in its config.json, but has to be trained as one)."
            )
        self._router_coef = router_loss_coef(lm, self.router_aux_loss_coef)
        self._notes = [note] if (note := note_on_router_loss(lm, self.router_aux_loss_coef)) else []
        self._writes_in_batches = writes_in_batches(lm)
        found = find_capabilities(lm)
        # Layers that are recomputed in backward keep no cache to continue a prompt from.
        self.shortcuts = replace(found, shared_prompt=found.shared_prompt and not self.gradient_checkpointing)
        self._packing = Packing(lm, self.name, found) if self.packing else None
        self.model: PreTrainedModel | PeftModel = lm
        self.reference_model: PreTrainedModel | None = None
        if self.lora is not None:
            self.model = add_adapters(lm, self.lora)
        elif with_reference:
            self.reference_model = copy.deepcopy(lm).requires_grad_(False)
        if self.torch_compile:
            for compiled in (lm, self.reference_model):
                if compiled is not None:
                    # In place, which keeps the names of the weights; dynamic, since each batch has other lengths.
                    compiled.base_model.compile(dynamic=True)

    def _check_quantized(self, lm: PreTrainedModel) -> None:
        """Refuse to train what is quantized, and what can't be trained beside it."""
        if not getattr(lm, "is_quantized", False):
            return
        if self.lora is None:
            raise ConfigurationError(
                f"policy.model: {self.name!r} is quantized, and its weights can't be trained: with policy.lora null "
                "only its embeddings and norms would be. Train adapters (policy.lora), or the unquantized model."
            )
        quantizer = getattr(lm, "hf_quantizer", None)
        if quantizer is not None and not quantizer.is_trainable:
            method = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
            raise ConfigurationError(
                f"policy.model: {self.name!r} is quantized by {getattr(method, 'value', method)}, through which no "
                "gradient comes back to adapters. Use the model before quantization, or one in 4 bits by bitsandbytes."
            )

    def _refuse_adapters(self, found: bool) -> None:
        if found:
            raise ConfigurationError(
                f"policy.model: {self.name!r} is an adapter, which the reference would be without. Merge it into its "
                "base first: `m = peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()`, "
                "`m.save_pretrained(merged)`, save the tokenizer there too, and train on that folder."
            )

    @property
    def lm(self) -> PreTrainedModel:
        """The Hugging Face model, adapters included."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def prepare_for_sharding(self) -> list[nn.Module]:
        """Return the layers; see `Policy.prepare_for_sharding`."""
        if self.torch_compile:
            raise ConfigurationError("policy.torch_compile: a sharded policy can't be compiled; set it to false.")
        self._is_sharded = True
        # Whether sharing pays is decided batch by batch, and takes two passes through the layers instead of one.
        self.shortcuts = replace(self.shortcuts, shared_prompt=False)
        models = [self.lm] if self.reference_model is None else [self.lm, self.reference_model]
        names = {name for model in models for name in model._no_split_modules or ()}
        return [module for model in models for module in model.modules() if type(module).__name__ in names]

    def merged(self) -> PreTrainedModel:
        """Return the trained model without peft, to save or to serve.

        Adapters are merged into a copy. Without adapters the weights are this policy's own, and are not copied.
        """
        lora = isinstance(self.model, PeftModel)
        self.check_can_merge()
        lm = merge(copy.deepcopy(self.model)) if lora else copy.copy(self.model)
        lm.config = copy.deepcopy(lm.config)  # where weights are shared, the policy's own must stay as it is
        lm.config.use_cache = True
        return lm

    def check_can_merge(self) -> None:
        """Refuse to merge adapters into weights that would round them; see `merged`."""
        if isinstance(self.model, PeftModel) and self.is_quantized:
            raise ConfigurationError(
                f"policy.model: {self.name!r} is quantized, and adapters merged into its weights would be rounded with "
                "them, to another model than was trained. Export the adapters instead: `--adapters true`."
            )

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are kept in 4 or 8 bits, once the policy is built."""
        return bool(getattr(self.lm, "is_quantized", False))

    def settled(self) -> CausalLMPolicy:
        """Return a copy with the adapters in the weights where they are small; see `Policy.settled`."""
        adapted = [module for module in self.lm.modules() if isinstance(module, LoraLayer)]
        if any(isinstance(module, ParamWrapper) for module in adapted):  # of experts, of which each token uses few
            return self
        if self.is_quantized:
            return self
        own = sum(
            part.weight.numel() for module in adapted for part in (*module.lora_A.values(), *module.lora_B.values())
        )
        weights = sum(module.get_base_layer().weight.numel() for module in adapted)
        # Beside large weights adapters take little time, and a copy much memory; in 16 bits merging would round.
        is_large = self.lm.num_parameters() > _MOST_COPIED
        if own < _WORTH_MERGING * weights or is_large or self.lm.dtype != torch.float32 or not adapted:
            return self
        lm = self.merged().eval()
        lm.config.use_cache = False
        settled = copy.copy(self)
        settled._modules = {"model": lm}
        return settled

    @property
    def max_positions(self) -> int | None:
        """The positions of the model's configuration, if it limits them."""
        limit: int | None = getattr(self.lm.config.get_text_config(), "max_position_embeddings", None)
        return limit

    def token_embeddings(self) -> Tensor:
        """Return the input embeddings of words spread over the vocabulary, `[n, d]`."""
        table = self.lm.get_input_embeddings()
        ids = torch.arange(table.weight.shape[0], device=table.weight.device)
        with torch.no_grad():
            # Through the module and not from its weight: some models (Gemma) scale what they look up.
            vectors: Tensor = table(ids[:: max(1, len(ids) // _WORDS)])
        return vectors

    def embed(self, tokens: Tokens, reference: bool = False) -> SoftPrompt:
        """Return the input embeddings of tokens as vectors, `[B, L, d]`; see `Policy.embed`."""
        if not reference:
            return embed(self.lm, tokens)
        with self._reference_lm() as lm:
            return embed(lm, tokens)

    def log_probs(
        self, prompt: Tokens, completions: Sequence[Tokens], soft_prompt: SoftPrompt | None = None
    ) -> tuple[LogProbs, ...]:
        """Score completions under the policy; see `Policy.log_probs`."""
        if not (self._router_coef and self.training and torch.is_grad_enabled()):
            return self._score(self.lm, prompt, completions, soft_prompt)
        losses: list[Tensor] = []
        scores = self._score(self.lm, prompt, completions, soft_prompt, losses)
        self._auxiliary_loss = self._router_coef * torch.stack(losses).sum()
        return scores

    def auxiliary_loss(self) -> Tensor | None:
        """Return the weighted load-balancing loss of a mixture of experts; see `Policy.auxiliary_loss`."""
        loss, self._auxiliary_loss = self._auxiliary_loss, None
        return loss

    def training_notes(self) -> Sequence[str]:
        """Tell of a mixture of experts that is trained without its load-balancing loss; see `Policy.training_notes`."""
        return self._notes

    @torch.no_grad()
    def reference_log_probs(
        self, prompt: Tokens, completions: Sequence[Tokens], soft_prompt: SoftPrompt | None = None
    ) -> tuple[LogProbs, ...]:
        """Score completions with the adapters off, or under the frozen copy; see `Policy.reference_log_probs`."""
        with self._reference_lm() as lm:
            return self._score(lm, prompt, completions, soft_prompt)

    def grouped_log_probs(
        self,
        prompt: Tokens,
        completions: Tokens,
        prompt_of: Tensor,
        soft_prompt: SoftPrompt | None = None,
        reference: bool = False,
        batch_size: int = 64,
    ) -> LogProbs:
        """Score any number of completions of each prompt; see `Policy.log_probs_of_each`."""
        with self._reference_lm() if reference else nullcontext(self.lm) as lm:
            before = self._segments(lm, prompt, soft_prompt)
            self._check_completions(before, completions, prompt_of)
            return grouped_score(lm, before, completions, prompt_of, self.shortcuts, batch_size)

    def reference_identity(self) -> dict[str, str]:
        """Return the digest of the weights that were loaded, and what else may change a number."""
        return {
            "weights": self._base["weights"],
            "config": self.lm.config.to_json_string(use_diff=False),
            "device": self.lm.device.type,
            "transformers": transformers.__version__,
        }

    def base_identity(self) -> dict[str, str]:
        """Return the digest of the weights that were loaded; see `Policy.base_identity`."""
        return self._base

    @contextmanager
    def _reference_lm(self) -> Iterator[PreTrainedModel]:
        if isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.lm
        elif self.reference_model is not None:
            yield self.reference_model
        else:
            raise ConfigurationError("The policy was built without a reference: call build(with_reference=True).")

    def _score(
        self,
        lm: PreTrainedModel,
        prompt: Tokens,
        completions: Sequence[Tokens],
        soft_prompt: SoftPrompt | None,
        router_losses: list[Tensor] | None = None,
    ) -> tuple[LogProbs, ...]:
        before = self._segments(lm, prompt, soft_prompt)
        for part in completions:
            self._check_completions(before, part)
        packed = self._packing is not None and self._packing.applies(lm, prompt.ids.device)
        return score(lm, before, completions, self.shortcuts, packed, router_losses)

    def _segments(self, lm: PreTrainedModel, prompt: Tokens, soft_prompt: SoftPrompt | None) -> list[SoftPrompt]:
        return segments(lm, self.tokenizer.bos_token_id, prompt, soft_prompt)

    def _check_completions(
        self, before: Sequence[SoftPrompt], completions: Tokens, prompt_of: Tensor | None = None
    ) -> None:
        limit, masks = self.max_positions, [*(part.mask for part in before), completions.mask]
        if limit is None or sum(mask.shape[1] for mask in masks) <= limit:
            return  # by their padding alone, without waiting for a device to count
        width = torch.stack([part.mask.sum(1) for part in before]).sum(0)
        lengths = completions.mask.sum(1) + (width if prompt_of is None else width[prompt_of])
        self._check_length(int(lengths.max()), "data.max_completion_length")

    def _check_length(self, length: int, limit_of_completions: str) -> None:
        limit = self.max_positions
        if limit is not None and length > limit:
            raise ConfigurationError(
                f"A sequence of {length} positions (soft prompt, user text, prompt and completion) exceeds the "
                f"{limit} positions of {self.name!r}. Lower {limit_of_completions}, data.max_prompt_length or "
                f"the user model's num_tokens."
            )

    @cached_property
    def _unused_ids(self) -> list[int]:
        return unused_ids(self.tokenizer, self.lm)

    def _check_not_sharded(self, lm: PreTrainedModel) -> None:
        if self._is_sharded:
            raise ConfigurationError(
                f"policy.model: {self.name!r} is a {type(lm).__name__}, which writes one text at a time, so that the "
                "processes that share it would wait for one another. Set collapse.prompts to 0, and write with the "
                "trained model in one process."
            )

    @torch.no_grad()
    def generate(
        self, prompt: Tokens, soft_prompt: SoftPrompt | None, sampling: Sampling, reference: bool = False
    ) -> Tokens:
        """Write a completion for each prompt; see `Policy.generate`."""
        if not reference:
            return self._generate(self.lm, prompt, soft_prompt, sampling)
        with self._reference_lm() as lm:
            return self._generate(lm, prompt, soft_prompt, sampling)

    def _generate(
        self, lm: PreTrainedModel, prompt: Tokens, soft_prompt: SoftPrompt | None, sampling: Sampling
    ) -> Tokens:
        sequence = join(self._segments(lm, prompt, soft_prompt), align="right")
        self._check_length(sequence.mask.shape[1] + sampling.max_new_tokens, "sampling.max_new_tokens")
        self._warn_once()
        with eval_mode(self):  # a key-value cache and gradient checkpointing exclude one another
            if not self._writes_in_batches:
                self._check_not_sharded(lm)
                return write(lm, sequence, sampling, self.end_token_ids, self._unused_ids)
            how = as_generation_config(sampling, self.tokenizer, self.end_token_ids, self._unused_ids)
            with torch.compiler.set_stance("force_eager"), in_place_of_own(lm, how):
                ids = lm.generate(
                    inputs_embeds=sequence.vectors,
                    attention_mask=sequence.mask.long(),
                    generation_config=how,
                    **writing_inputs(lm),
                    synced_gpus=self._is_sharded,  # a process that has written its last token goes on for the others
                )
        ends = torch.isin(ids, torch.tensor(self.end_token_ids, device=ids.device)).long()
        return Tokens(ids, ends.cumsum(1) - ends == 0)  # up to the first end, which is included

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn_of_not_applied(self.generation_config, self.name)


def _switch_off_dropout(model: PreTrainedModel) -> None:
    # Models keep their rates in dropout modules, in attributes of attention layers, or in the configuration.
    for holder in (*model.modules(), model.config):
        for name, value in list(vars(holder).items()):
            is_rate = isinstance(value, float) and ("drop" in name or (isinstance(holder, _Dropout) and name == "p"))
            if is_rate:
                setattr(holder, name, 0.0)
