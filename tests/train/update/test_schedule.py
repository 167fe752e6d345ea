"""Exponential decay of the learning rate."""

import pytest
import torch

from toolx_kernels import ToolExpanderConfig
from toolx_kernels.errors import InputError
from toolx_kernels.train.update.schedule import ExponentialDecay


def optimizer(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def test_the_rate_falls_by_the_factor_at_every_step_down_to_the_floor():
    updates = optimizer(1.0, 0.5)
    schedule = ExponentialDecay(updates, 0.8, floor=0.5)
    seen = []
    for _ in range(6):
        seen.append([group["lr"] for group in updates.param_groups])
        assert seen[-1] == schedule.get_last_lr()
        schedule.step()
    first = [rates[0] for rates in seen]
    assert first == [1.0, 0.8, 0.8**2, 0.8**3, 0.5, 0.5]
    assert [rates[1] for rates in seen] == [rate / 2 for rate in first]


def test_without_a_floor_it_is_the_closed_form_and_not_a_running_product():
    updates = optimizer(3e-4)
    schedule = ExponentialDecay(updates, 0.8)
    for _ in range(200):
        schedule.step()
    assert updates.param_groups[0]["lr"] == 3e-4 * 0.8**200


def test_it_resumes_to_the_last_bit():
    whole, first, second = optimizer(7e-4), optimizer(7e-4), optimizer(1.0)
    straight, before = ExponentialDecay(whole, 0.8, 0.01), ExponentialDecay(first, 0.8, 0.01)
    for _ in range(7):
        straight.step()
    for _ in range(3):
        before.step()
    after = ExponentialDecay(second, 0.8, 0.01)
    after.load_state_dict(before.state_dict())
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"]
    for _ in range(4):
        after.step()
    assert second.param_groups[0]["lr"] == whole.param_groups[0]["lr"]


@pytest.mark.parametrize("factor, floor", [(0.0, 0.0), (1.1, 0.0), (float("nan"), 0.0), (0.8, -0.1), (0.8, 1.5)])
def test_what_is_no_decay_is_refused(factor, floor):
    with pytest.raises(InputError, match="lr_decay|min_lr_rate"):
        ToolExpanderConfig(lr_decay=factor, min_lr_rate=floor)


def test_a_state_of_something_else_is_refused():
    with pytest.raises(InputError, match="does not fit this learning-rate schedule"):
        ExponentialDecay(optimizer(1.0), 0.8).load_state_dict({"count": 2, "base_lrs": [1.0, 2.0]})
