"""User tables under DDP, in two processes that see different users."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prlhf_lightning.training.distributed import average_sparse_gradients, exclude_from_ddp, sparse_tables
from prlhf_lightning.user_models import ClusterUserModel, CompositeUserModel, IndividualUserModel, UserModel

ROWS = 6


class Tables(UserModel):
    """A user model whose loss uses any of its tables, or none of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Parameter(torch.ones(3))
        self.users = nn.Embedding(ROWS, 3, sparse=True)
        self.votes = nn.ModuleList([nn.Embedding(ROWS, 2, sparse=True)])
        self.unused = nn.Embedding(ROWS, 3, sparse=True)
        self.dense = nn.Embedding(ROWS, 3)

    def build(self, num_rows, token_embeddings) -> None:
        pass

    def row_tables(self) -> list[torch.Tensor]:
        return [self.users.weight, self.votes[0].weight, self.unused.weight, self.dense.weight]

    def forward(self, users: list[int], votes: list[int], dense: list[int]) -> torch.Tensor:
        loss = self.shared.square().sum()
        for table, rows in ((self.users, users), (self.votes[0], votes), (self.dense, dense)):
            if rows:
                loss = loss + (table(torch.tensor(rows)) + 1).pow(3).sum()
        return loss


# Of each process, two micro-batches: rows of `users` (uneven, overlapping), of `votes` (only the second process has
# any), and of `dense`.
BATCHES = [
    [([1, 1, 2], [], [4]), ([5], [], [4])],
    [([2], [3, 3], [1]), ([], [0], [2])],
]


def gradients(model: Tables) -> list[torch.Tensor | None]:
    params = [model.shared, *model.row_tables()]
    grads = [p.grad.to_dense() if p.grad is not None and p.grad.is_sparse else p.grad for p in params]
    return [None if grad is None else grad.clone() for grad in grads]


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(2)]
    torch.distributed.all_gather(parts, tensor)
    return torch.stack(parts)


def worker(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/init", rank=rank, world_size=2)
    model = Tables()
    model.unused.weight.data += rank
    model.dense.weight.data += rank
    exclude_from_ddp(model, sparse_tables(model))
    ddp = DistributedDataParallel(model)
    first, second = BATCHES[rank]
    with ddp.no_sync():
        ddp(*first).backward()
    ddp(*second).backward()
    average_sparse_gradients(sparse_tables(model), all_gather)
    users = model.users.weight.grad
    result = {
        "grads": gradients(model),
        "rows": (users.coalesce().indices().tolist(), users._nnz()) if users.is_sparse else None,
        "weights": {name: param.detach() for name, param in model.named_parameters()},
    }
    torch.save(result, f"{path}/{rank}.pt")
    del ddp  # now and then it waits for ever where its process group has gone before it
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, args=(str(path),), nprocs=2)
    return [torch.load(path / f"{rank}.pt") for rank in (0, 1)]


def test_every_process_has_the_mean_gradient_of_all_pairs(results):
    alone = Tables()
    for batches in BATCHES:
        for batch in batches:
            (alone(*batch) / 2).backward()
    for result in results:
        for grad, expected in zip(result["grads"], gradients(alone), strict=True):
            torch.testing.assert_close(grad, expected)


def test_a_sparse_gradient_holds_each_present_user_once(results):
    assert [result["rows"] for result in results] == [([[1, 2, 5]], 3)] * 2


def test_ddp_looks_after_dense_tables_only(results):
    sparse, dense = ([result["weights"][f"{name}.weight"] for result in results] for name in ("unused", "dense"))
    assert not torch.equal(*sparse)
    assert torch.equal(*dense)


def test_the_tables_of_our_user_models_are_sparse():
    model = CompositeUserModel([ClusterUserModel(2, 1), IndividualUserModel(2)])
    model.build(ROWS, torch.randn(5, 4))
    assert [id(table) for table in sparse_tables(model)] == [id(table) for table in model.row_tables()]
