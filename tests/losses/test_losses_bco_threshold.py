import pytest
import torch
import torch.nn.functional as F
from loss_batches import one_token_pairs

from prlhf_lightning.losses import BCOLoss, PreferenceLoss


def step(loss: PreferenceLoss, chosen, rejected):
    """Call the loss on pairs with these log-ratios, which at beta 1 are the rewards."""
    zero = one_token_pairs([0.0] * len(chosen), [0.0] * len(chosen))
    return loss(one_token_pairs(chosen, rejected), zero).losses


def test_the_first_threshold_is_the_first_batchs_mean_reward():
    loss = BCOLoss(1.0)
    step(loss, [-1.0, -2.0], [-3.0, -6.0])
    assert loss.shift.item() == pytest.approx(-3.0)


def test_a_batch_is_judged_by_the_threshold_of_earlier_ones():
    loss = BCOLoss(1.0)
    step(loss, [-1.0], [-3.0])
    expected = -F.logsigmoid(torch.tensor(-1.0 + 2)) - F.logsigmoid(torch.tensor(-2 + 7.0))
    torch.testing.assert_close(step(loss, [-1.0], [-7.0]), expected[None])


def test_the_threshold_is_a_plain_exponential_mean_of_pairs():
    loss, rewards = BCOLoss(1.0, window=4), [-1.0, -5.0, -2.0, -8.0]
    total = weight = 0.0
    for reward in rewards:
        step(loss, [reward], [reward])
        total, weight = 0.75 * total + 0.25 * reward, 0.75 * weight + 0.25
    assert loss.shift.item() == pytest.approx(total / weight, rel=1e-5)


def test_micro_batches_hardly_move_the_threshold():
    rewards = -10 * torch.rand(512, generator=torch.Generator().manual_seed(0))
    shifts = []
    for size in (1, 4, 32):
        loss = BCOLoss(1.0)
        for batch in rewards.split(size):
            step(loss, batch, batch)
        shifts.append(loss.shift.item())
    assert max(shifts) - min(shifts) < 0.02 * rewards.std().item()


def test_a_micro_batch_weighs_as_many_pairs_as_it_holds():
    whole, split = BCOLoss(1.0), BCOLoss(1.0)
    step(whole, [-1.0] * 8, [-1.0] * 8)
    step(whole, [-3.0] * 8, [-3.0] * 8)
    for reward, sizes in ((-1.0, (5, 3)), (-3.0, (1, 7))):
        for size in sizes:
            step(split, [reward] * size, [reward] * size)
    torch.testing.assert_close(split.shift, whole.shift)


def test_evaluation_leaves_the_threshold_alone():
    loss = BCOLoss(1.0)
    step(loss, [-1.0], [-3.0])
    step(loss.eval(), [-9.0], [-9.0])
    assert loss.shift.item() == pytest.approx(-2.0)


def test_an_empty_batch_leaves_the_threshold_alone():
    loss = BCOLoss(1.0)
    step(loss, [], [])
    assert loss.shift.item() == 0
    step(loss, [-1.0], [-3.0])
    step(loss, [], [])
    assert loss.shift.item() == pytest.approx(-2.0)


def test_the_threshold_is_saved_and_restored():
    loss, restored = BCOLoss(1.0, window=8), BCOLoss(1.0, window=8)
    step(loss, [-1.0, -2.0], [-3.0, -6.0])
    restored.load_state_dict(loss.state_dict())
    torch.testing.assert_close(step(restored, [-4.0], [-5.0]), step(loss, [-4.0], [-5.0]))
    torch.testing.assert_close(restored.shift, loss.shift)


def test_the_threshold_stays_float32_in_a_bfloat16_model():
    loss = BCOLoss(1.0).to(torch.bfloat16)
    step(loss, [-1.0], [-1.0])
    for _ in range(50):
        step(loss, [-1.01], [-1.01])
    assert loss.shift.dtype == torch.float32
    assert loss.shift.item() == pytest.approx(-1.0098, abs=2e-4)


def distributed_worker(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/init", rank=rank, world_size=2)
    loss = BCOLoss(1.0)
    step(loss, [-1.0] * (1 + rank), [-1.0 - 6 * rank] * (1 + rank))  # mean rewards -1, and -4 twice
    torch.save(loss.shift, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_share_one_threshold_that_weighs_pairs_alike(tmp_path):
    torch.multiprocessing.spawn(distributed_worker, args=(str(tmp_path),), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt").item() for rank in (0, 1)] == pytest.approx([-3.0, -3.0])
