"""A sharded policy, in two processes, against the same policy in one."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.policies import CausalLMPolicy, LoRA, Sampling
from prlhf_lightning.training.callbacks.outputs import SaveOnInterrupt
from prlhf_lightning.training.distributed import average_dense_gradients
from prlhf_lightning.training.fsdp import FSDP1Strategy
from prlhf_lightning.training.optim import clip_gradients, gradient_norm
from prlhf_lightning.training.sharding import FSDP2Strategy, check_strategy, is_sharded, shard
from prlhf_lightning.types import SoftPrompt, Tokens

MAX_NORM = 0.1
PROMPT = Tokens.from_lists([[1, 5, 6], [1, 7, 8, 9]])
COMPLETIONS = [Tokens.from_lists([[10, 2], [11, 12, 2]]), Tokens.from_lists([[13, 14, 15, 2], [16, 2]])]


class _Local(FSDP2Strategy):
    """The strategy without a Trainer."""

    root_device = torch.device("cpu")

    @cached_property
    def device_mesh(self) -> Any:
        return init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))


def use_policy(model: str, lora: LoRA | None, strategy: FSDP2Strategy | None, tokens: int = 8) -> dict[str, Any]:
    """Build a policy with adapters that do something, and do with it all that there is to do."""
    torch.manual_seed(0)
    policy = CausalLMPolicy(model, lora)
    policy.build()
    for name, param in policy.named_parameters():
        if param.requires_grad and (lora is None or "lora_B" in name):
            param.data += 0.1 * torch.randn_like(param)
    torch.manual_seed(0)
    vectors = torch.randn(2, 3, policy.token_embeddings().shape[1], requires_grad=True)
    user = SoftPrompt.full(vectors)
    shard(policy, strategy)
    assert is_sharded(policy) == (strategy is not None)
    # The reference first, as in a training step: what is gathered then must be trained all the same.
    reference = policy.reference_log_probs(PROMPT, COMPLETIONS)
    scores = policy.log_probs(PROMPT, COMPLETIONS, user)
    torch.stack([part.sum.sum() for part in scores]).sum().backward()
    grads = {name: param.grad for name, param in policy.named_parameters() if param.grad is not None}
    written = policy.generate(PROMPT, user, Sampling(max_new_tokens=tokens, temperature=0.0))
    return {
        "reference": [part.tokens for part in reference],
        "scores": [part.tokens.detach() for part in scores],
        "written": written.ids,
        "grads": {name: getattr(grad, "full_tensor", lambda grad=grad: grad)() for name, grad in grads.items()},
        "vectors": vectors.grad,
    }


def with_gradients(mesh: Any = None) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return parameters with gradients: a sparse table and a vector, and a layer whose 3 rows two processes share."""
    torch.manual_seed(0)
    layer, table = nn.Linear(4, 3), nn.Embedding(5, 4, sparse=True)
    vector = nn.Parameter(torch.randn(4))
    if mesh is not None:
        fully_shard(layer, mesh=mesh)
    layer(table(torch.tensor([1, 1, 3])) + vector).square().sum().backward()
    return [table.weight, vector], list(layer.parameters())


def whole_gradients(*params: nn.Parameter) -> list[torch.Tensor]:
    grads = [param.grad.to_dense() if param.grad.is_sparse else param.grad for param in params]
    return [getattr(grad, "full_tensor", lambda grad=grad: grad)() for grad in grads]


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(tensor)
    return tensor


def worker(rank: int, folder: str, model: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name, lora in (("lora", LoRA(rank=2)), ("full", None)):
        results[name] = use_policy(model, lora, _Local(), tokens=4 + 4 * rank)
    whole, sharded = with_gradients(_Local().device_mesh["data_parallel"])
    norm = gradient_norm(whole, sharded, add_up)
    results["norm"] = clip_gradients([*whole, *sharded], MAX_NORM, norm)
    results["clipped"] = whole_gradients(*whole, *sharded)
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(()))]
    params[0].grad = torch.full((2,), 1.0 + rank)
    if rank == 1:
        params[1].grad = torch.full((3,), 8.0)
    for _ in range(2):  # a second time changes nothing
        average_dense_gradients(params, lambda tensor: add_up(tensor) / 2)
    results["means"] = [param.grad for param in params]
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, args=(str(folder), model_path), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module", params=["lora", "full"])
def case(request: pytest.FixtureRequest, results: list[dict[str, Any]], model_path: str) -> tuple[Any, Any]:
    """What a sharded policy gave in each process, and what a whole one gives."""
    lora = LoRA(rank=2) if request.param == "lora" else None
    return [result[request.param] for result in results], use_policy(model_path, lora, None)


@pytest.mark.parametrize("what", ["reference", "scores", "grads", "vectors"])
def test_a_sharded_policy_does_what_a_whole_one_does(case, what):
    sharded, whole = case
    for result in sharded:
        torch.testing.assert_close(result[what], whole[what], rtol=1e-4, atol=1e-5)


def test_a_process_that_wrote_its_last_token_serves_the_others(case):
    sharded, whole = case
    assert whole["written"].shape == (2, 8)
    assert [result["written"].tolist() for result in sharded] == [whole["written"][:, :n].tolist() for n in (4, 8)]


def test_a_sharded_reference_is_the_model_without_adapters(results, model_path):
    base = CausalLMPolicy(model_path, lora=None)
    base.build()
    expected = [part.tokens.detach() for part in base.log_probs(PROMPT, COMPLETIONS)]
    for result in results:
        torch.testing.assert_close(result["lora"]["reference"], expected, rtol=1e-4, atol=1e-5)
        assert (result["lora"]["scores"][0] - expected[0]).abs().max() > 0.1


def test_every_adapter_has_a_gradient(results):
    grads = results[0]["lora"]["grads"]
    assert len(grads) == 2 * 7 * 2  # A and B of seven linear layers in each of two blocks
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_gradients_are_clipped_by_the_norm_over_all_processes(results):
    whole, layer = with_gradients()
    norm = clip_gradients([*whole, *layer], MAX_NORM)
    assert norm > 10 * MAX_NORM
    for result in results:
        torch.testing.assert_close(result["norm"], norm)
        torch.testing.assert_close(result["clipped"], whole_gradients(*whole, *layer))


def test_dense_gradients_are_averaged_and_unused_ones_stay_none(results):
    for result in results:
        assert result["means"][0].tolist() == [1.5, 1.5]
        assert result["means"][1].tolist() == [4.0, 4.0, 4.0]  # the first process has none, which counts as zero
        assert result["means"][2] is None


@pytest.mark.parametrize("strategy", [ModelParallelStrategy(), FSDPStrategy()], ids=lambda s: type(s).__name__)
def test_lightnings_sharded_strategies_are_refused_with_advice(strategy):
    with pytest.raises(ConfigurationError, match=r"trainer.strategy is .*class_path: prlhf_lightning.FSDP"):
        check_strategy(strategy)


def test_an_error_of_one_process_saves_no_joint_checkpoint(monkeypatch):
    monkeypatch.setattr("prlhf_lightning.training.callbacks.outputs.is_sharded", lambda policy: True)
    trainer = Mock(
        global_step=3, validating=False, fast_dev_run=False, loggers=[], log_dir="runs", world_size=2, optimizers=[]
    )
    trainer.state.fn = TrainerFn.FITTING
    trainer.strategy.reduce = lambda tensor, reduce_op: tensor
    module = Mock(device=torch.device("cpu"))
    module.named_parameters.side_effect = lambda: [("weight", nn.Parameter(torch.zeros(1)))]
    module.named_buffers.side_effect = lambda: []
    callback = SaveOnInterrupt()
    callback.on_fit_start(trainer, module)
    with pytest.warns(UserWarning, match="did not stop together"):
        callback.on_exception(trainer, module, KeyboardInterrupt())
    trainer.save_checkpoint.assert_not_called()
    callback.on_exception(trainer, module, SIGTERMException())  # raised after the same batch everywhere
    trainer.save_checkpoint.assert_called_once()


def test_fsdp1_refuses_to_train_weights_stored_in_two_places(model_paths):
    policy = CausalLMPolicy(model_paths["qwen"], lora=None)
    policy.build()
    with pytest.raises(ConfigurationError, match=r"FSDP1Strategy.*FSDP2Strategy"):
        FSDP1Strategy()._wrapped(policy)
