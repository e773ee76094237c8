"""Policy of a Hugging Face causal language model."""

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
from prlhf_lightning.policies.loading import (
    avoid_cudnn_attention,
    base_identity,
    check_vocabulary,
    load_lm,
    refuse_kernels,
    unused_ids,
)
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
# Scoring merges adapters with at least this share of the adapted weights; the merged copy takes at most 512 MB.
_MIN_ADAPTER_SHARE = 0.05
_MAX_MERGED_PARAMETERS = 1 << 27
_MAX_EMBEDDINGS = 8192  # embeddings to initialize soft prompts from: only their scale matters


class CausalLMPolicy(Policy):
    """A Hugging Face causal LM, trained with LoRA or in full.

    With LoRA the reference is the same model with the adapters disabled; in full fine-tuning it is a frozen copy. The
    backbone's own dropout is disabled: it would add noise to the reference and the generic term.

    Args:
        model: Folder or hub name for `from_pretrained`, or `builtin:style-lm` for the small model in this package.
        lora: Adapters to train, or null to train all weights.
        dtype: Data type of the weights; `auto` is that of the model files. Adapters are kept in float32.
        random_init: Seed of a random initialization from the model's configuration, instead of its trained weights.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time. On a
            GPU without `packing`, the prompt is then computed twice, for the chosen and for the rejected completion.
        torch_compile: Compile the model with `torch.compile`: faster steps, equal up to rounding, after some minutes of
            compiling. Generation is not compiled, because its length changes with each token.
        packing: On a GPU, pack the prompts of a batch, each with its completions, into rows without padding, and
            compute them in one pass with FlexAttention. It works with `gradient_checkpointing` and sharding. Not
            measured on a GPU yet. On other devices it has no effect. See docs/performance.md.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; null is the default of transformers.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run code that comes with the model. Only for sources that you trust. When a checkpoint, an
            exported folder or a run's configuration is opened, its value of this setting is ignored.
        router_aux_loss_coef: Weight of a mixture of experts' load-balancing loss, which is added to the preference
            loss. Null takes the weight in `config.json` if that sets `output_router_logits: true`; 0 disables the loss.
            With this loss, completions do not share the computation of their prompt.
    """

    def __init__(
        self,
        model: str,
        lora: LoRA | None = LoRA(),  # noqa: B008 - frozen, so it is safe to share
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
                f"policy.model is {model!r}; built-in models are {', '.join(_BUILTIN + name for name in shipped)}."
            )
        if packing and torch_compile:
            raise ConfigurationError(
                "policy.packing and policy.torch_compile are both true, which is not tested; set one of them to false."
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
        self._is_checked = False  # checksums of the files
        self._has_warned = False
        trusts = trust_remote_code and allows_remote_code()
        self._hub_args: dict[str, Any] = {"revision": revision, "trust_remote_code": trusts}

    @property
    def path(self) -> str:
        """Folder or hub name of the weights and the tokenizer."""
        if not self.name.startswith(_BUILTIN):
            return str(Path(self.name).expanduser()) if self.name.startswith("~") else self.name
        return str(ASSETS / self.name.removeprefix(_BUILTIN))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with the model's end tokens, and with EOS as padding token if it has none."""
        self._check_files()
        with self._loading("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.path, **self._hub_args)
            tokenizer.decode(tokenizer("x")["input_ids"])  # some broken tokenizers load and fail only here
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        with suppress(ConfigurationError):  # loading the weights rejects an incomplete folder
            remember_end_tokens(tokenizer, self.generation_config)
        if hasattr(self, "model"):
            self._check_vocabulary(tokenizer, self.lm)
        return tokenizer

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The base model's generation config; does not load the weights."""
        with self._loading("config"):
            return load_generation_config(self.path, **self._hub_args)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer, from tokenizer, generation config and chat template."""
        tokenizer = self.tokenizer
        with self._loading("config"):
            return end_token_ids(tokenizer, self.generation_config)

    def _check_files(self) -> None:
        """Verify, once, the checksums of a built-in or exported model."""
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
            "give a folder written by `save_pretrained` (with the tokenizer), or a hub name that this machine can "
            "reach."
        )
        return loading(self.path, what, f"policy.model: the {what} of {self.name!r}", fix)

    def build(self, with_reference: bool = True) -> None:
        """Load the weights, add adapters, and keep a frozen copy if the reference needs one."""
        self._refuse_adapters((Path(self.path) / "adapter_config.json").is_file())
        self._check_files()
        with self._loading("weights" if self.random_init is None else "config"):
            lm = self._load_lm()
        self._refuse_adapters(getattr(lm, "_hf_peft_config_loaded", False))
        self._check_quantized(lm)
        if "tokenizer" in vars(self):  # otherwise the property checks it on first access
            self._check_vocabulary(self.tokenizer, lm)
            _ = self.end_token_ids  # raises before training instead of at the first generation
        lm.train()  # from_pretrained returns eval mode, and Lightning would warn
        _switch_off_dropout(lm)
        lm.config.use_cache = False  # generate enables the cache itself
        if self.gradient_checkpointing:
            # Renamed within transformers 5; the supported versions have either name.
            enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._base = base_identity(lm)
        if not is_causal(lm):
            raise ConfigurationError(
                f"policy.model: {self.name!r} is a {type(lm).__name__} whose tokens attend to later ones, so it can't "
                "score or generate text from left to right. Use a causal language model (an encoder becomes one with "
                "`is_decoder: true` in its config.json, but must be trained as one)."
            )
        self._router_coef = router_loss_coef(lm, self.router_aux_loss_coef)
        self._notes = [note] if (note := note_on_router_loss(lm, self.router_aux_loss_coef)) else []
        self._writes_in_batches = writes_in_batches(lm)
        found = find_capabilities(lm)
        # With activation checkpointing, layers keep no cache of the prompt.
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
                    # In place, to keep the names of the weights; dynamic, because lengths differ between batches.
                    compiled.base_model.compile(dynamic=True)

    def _load_lm(self) -> PreTrainedModel:
        """Load the weights, or draw random ones, on torch's default device."""
        options: dict[str, Any] = {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
        if self.random_init is None:
            return load_lm(self.path, **self._hub_args, **options)
        refuse_kernels(self.path, **self._hub_args, **options)
        avoid_cudnn_attention()
        config = AutoConfig.from_pretrained(self.path, **self._hub_args)
        options["dtype"] = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
        device = torch.get_default_device()  # Lightning sets it to the training device
        # The weights must be reproducible, because a checkpoint contains neither a frozen backbone nor the reference. A
        # GPU draws other random numbers than a CPU from the same seed.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.random_init)
            lm = AutoModelForCausalLM.from_config(
                config, trust_remote_code=self._hub_args["trust_remote_code"], **options
            )
        lm = lm.to(device)
        lm.generation_config = self.generation_config
        return lm

    def _check_quantized(self, lm: PreTrainedModel) -> None:
        """Reject quantized models that cannot be trained: without adapters, or without gradients for adapters."""
        if not getattr(lm, "is_quantized", False):
            return
        if self.lora is None:
            raise ConfigurationError(
                f"policy.model: {self.name!r} is quantized, and its weights can't be trained: with policy.lora null, "
                "only embeddings and norms would be trained. Train adapters (policy.lora), or the unquantized model."
            )
        quantizer = getattr(lm, "hf_quantizer", None)
        if quantizer is not None and not quantizer.is_trainable:
            method = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
            raise ConfigurationError(
                f"policy.model: {self.name!r} is quantized by {getattr(method, 'value', method)}, which passes no "
                "gradient to adapters. Use the unquantized model, or one quantized to 4 bits by bitsandbytes."
            )

    def _refuse_adapters(self, found: bool) -> None:
        if found:
            raise ConfigurationError(
                f"policy.model: {self.name!r} is an adapter, and the reference would not have it. Merge it into its "
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
        # Sharing takes two passes through the layers and is decided for each batch, so processes might differ.
        self.shortcuts = replace(self.shortcuts, shared_prompt=False)
        models = [self.lm] if self.reference_model is None else [self.lm, self.reference_model]
        names = {name for model in models for name in model._no_split_modules or ()}
        return [module for model in models for module in model.modules() if type(module).__name__ in names]

    def merged(self) -> PreTrainedModel:
        """Return the trained model without peft, to save or to serve.

        Adapters are merged into a copy. Without adapters, the returned model shares its weights with this policy.
        """
        lora = isinstance(self.model, PeftModel)
        self.check_can_merge()
        lm = merge(copy.deepcopy(self.model)) if lora else copy.copy(self.model)
        lm.config = copy.deepcopy(lm.config)  # the policy's config must not change if the weights are shared
        lm.config.use_cache = True
        return lm

    def check_can_merge(self) -> None:
        """Raise if merging would round the adapters to the precision of quantized weights; see `merged`."""
        if isinstance(self.model, PeftModel) and self.is_quantized:
            raise ConfigurationError(
                f"policy.model: {self.name!r} is quantized, and adapters merged into its weights would be rounded: "
                "the result would not be the trained model. Export the adapters instead: `--adapters true`."
            )

    @property
    def is_quantized(self) -> bool:
        """Whether the weights have 4 or 8 bits; needs a built policy."""
        return bool(getattr(self.lm, "is_quantized", False))

    def merged_for_scoring(self) -> CausalLMPolicy:
        """Return a copy with merged adapters if the model is small; see `Policy.merged_for_scoring`."""
        adapted = [module for module in self.lm.modules() if isinstance(module, LoraLayer)]
        if any(
            isinstance(module, ParamWrapper) for module in adapted
        ):  # adapters of experts; each token uses few of them
            return self
        if self.is_quantized:
            return self
        own = sum(
            part.weight.numel() for module in adapted for part in (*module.lora_A.values(), *module.lora_B.values())
        )
        weights = sum(module.get_base_layer().weight.numel() for module in adapted)
        # With large weights, adapters cost little time and a copy much memory; in 16 bits, merging would round.
        is_large = self.lm.num_parameters() > _MAX_MERGED_PARAMETERS
        if own < _MIN_ADAPTER_SHARE * weights or is_large or self.lm.dtype != torch.float32 or not adapted:
            return self
        lm = self.merged().eval()
        lm.config.use_cache = False
        merged = copy.copy(self)
        merged._modules = {"model": lm}
        return merged

    @property
    def max_positions(self) -> int | None:
        """`max_position_embeddings` of the model's configuration; None if it has no limit."""
        limit: int | None = getattr(self.lm.config.get_text_config(), "max_position_embeddings", None)
        return limit

    def token_embeddings(self) -> Tensor:
        """Return input embeddings sampled evenly from the vocabulary, `[n, d]`."""
        table = self.lm.get_input_embeddings()
        ids = torch.arange(table.weight.shape[0], device=table.weight.device)
        with torch.no_grad():
            # Call the module instead of reading its weight: some models (Gemma) scale the embeddings.
            vectors: Tensor = table(ids[:: max(1, len(ids) // _MAX_EMBEDDINGS)])
        return vectors

    def embed(self, tokens: Tokens, reference: bool = False) -> SoftPrompt:
        """Return the input embeddings of tokens as vectors, `[B, L, d]`; see `Policy.embed`."""
        if not reference:
            return embed(self.lm, tokens)
        with self._reference_lm() as lm:
            return embed(lm, tokens)

    def log_probs(
        self,
        prompt: Tokens,
        completions: Sequence[Tokens],
        soft_prompt: SoftPrompt | None = None,
        temperature: float = 1.0,
    ) -> tuple[LogProbs, ...]:
        """Score completions under the policy; see `Policy.log_probs`."""
        if not (self._router_coef and self.training and torch.is_grad_enabled()):
            return self._score(self.lm, prompt, completions, soft_prompt, temperature)
        losses: list[Tensor] = []
        scores = self._score(self.lm, prompt, completions, soft_prompt, temperature, losses)
        self._auxiliary_loss = self._router_coef * torch.stack(losses).sum()
        return scores

    def auxiliary_loss(self) -> Tensor | None:
        """Return the weighted load-balancing loss of a mixture of experts; see `Policy.auxiliary_loss`."""
        loss, self._auxiliary_loss = self._auxiliary_loss, None
        return loss

    def training_notes(self) -> Sequence[str]:
        """Return a note if a mixture of experts trains without its load-balancing loss; see `Policy.training_notes`."""
        return self._notes

    @torch.no_grad()
    def reference_log_probs(
        self,
        prompt: Tokens,
        completions: Sequence[Tokens],
        soft_prompt: SoftPrompt | None = None,
        temperature: float = 1.0,
    ) -> tuple[LogProbs, ...]:
        """Score completions with adapters disabled or by the frozen copy; see `Policy.reference_log_probs`."""
        with self._reference_lm() as lm:
            return self._score(lm, prompt, completions, soft_prompt, temperature)

    @property
    def shares_prompts(self) -> bool:
        """Whether the model continues from the key-value cache of a prompt, on a CPU; see `Policy.shares_prompts`.

        On a GPU the host would have to wait for the device to learn what rows share.
        """
        possible = self.shortcuts.shared_prompt and not self._router_coef and self._packing is None
        return possible and self.lm.device.type == "cpu"

    def grouped_log_probs(
        self,
        prompt: Tokens,
        completions: Tokens,
        prompt_of: Tensor,
        soft_prompt: SoftPrompt | None = None,
        reference: bool = False,
        batch_size: int = 64,
    ) -> LogProbs:
        """Score any number of completions of each prompt; see `Policy.grouped_log_probs`."""
        with_gradient = torch.is_grad_enabled() and not reference
        with self._reference_lm() if reference else nullcontext(self.lm) as lm, torch.set_grad_enabled(with_gradient):
            before = self._segments(lm, prompt, soft_prompt)
            self._check_completions(before, completions, prompt_of)
            return grouped_score(lm, before, completions, prompt_of, self.shortcuts, batch_size)

    def reference_identity(self) -> dict[str, str]:
        """Return the digest of the loaded weights, and everything else that may change log-probs."""
        return {
            "weights": self._base["weights"],
            "config": self.lm.config.to_json_string(use_diff=False),
            "device": self.lm.device.type,
            "transformers": transformers.__version__,
        }

    def base_identity(self) -> dict[str, str]:
        """Return digests of the loaded weights and settings; see `Policy.base_identity`."""
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
        temperature: float,
        router_losses: list[Tensor] | None = None,
    ) -> tuple[LogProbs, ...]:
        before = self._segments(lm, prompt, soft_prompt)
        for part in completions:
            self._check_completions(before, part)
        packed = self._packing is not None and self._packing.applies(lm, prompt.ids.device)
        return self._scores(lm, before, completions, packed, router_losses, temperature)

    def _scores(
        self,
        lm: PreTrainedModel,
        before: Sequence[SoftPrompt],
        completions: Sequence[Tokens],
        packed: bool,
        router_losses: list[Tensor] | None,
        temperature: float,
    ) -> tuple[LogProbs, ...]:
        return score(lm, before, completions, self.shortcuts, packed, router_losses, temperature)

    def _segments(self, lm: PreTrainedModel, prompt: Tokens, soft_prompt: SoftPrompt | None) -> list[SoftPrompt]:
        return segments(lm, self.tokenizer.bos_token_id, prompt, soft_prompt)

    def _check_completions(
        self, before: Sequence[SoftPrompt], completions: Tokens, prompt_of: Tensor | None = None
    ) -> None:
        limit, masks = self.max_positions, [*(part.mask for part in before), completions.mask]
        if limit is None or sum(mask.shape[1] for mask in masks) <= limit:
            return  # padded widths suffice, and need no device sync
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
                f"policy.model: {self.name!r} is a {type(lm).__name__}, which generates one text at a time, so "
                "processes that share the model would deadlock. Set collapse.prompts to 0, and generate with the "
                "trained model in one process."
            )

    @torch.no_grad()
    def generate(
        self, prompt: Tokens, soft_prompt: SoftPrompt | None, sampling: Sampling, reference: bool = False
    ) -> Tokens:
        """Generate a completion for each prompt; see `Policy.generate`."""
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
        with eval_mode(self):  # gradient checkpointing, active in training mode, excludes a key-value cache
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
                    synced_gpus=self._is_sharded,  # finished processes keep calling the model for the others
                )
        ends = torch.isin(ids, torch.tensor(self.end_token_ids, device=ids.device)).long()
        return Tokens(ids, ends.cumsum(1) - ends == 0)  # up to and including the first end token

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn_of_not_applied(self.generation_config, self.name)


def _switch_off_dropout(model: PreTrainedModel) -> None:
    # Models store dropout rates in dropout modules, in attributes of attention layers, or in the configuration.
    for holder in (*model.modules(), model.config):
        for name, value in list(vars(holder).items()):
            is_rate = isinstance(value, float) and ("drop" in name or (isinstance(holder, _Dropout) and name == "p"))
            if is_rate:
                setattr(holder, name, 0.0)
