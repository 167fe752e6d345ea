"""Arguments of the wrong type or size: one sentence that names them, from each function on hidden states."""

import numpy as np
import pytest
import torch

from toolx_kernels import group_advantages, linear_grpo_loss, linear_logprob, sample
from toolx_kernels.errors import InputError

N, D, V = 6, 4, 9
HEAD = {"hidden": torch.ones(N, D), "weight": torch.ones(V, D)}
TOKENS = HEAD | {"targets": torch.arange(N)}
REWARDED = {"rewards": torch.tensor([0.0, 1.0]), "group_size": 2}
CALLS = {
    linear_logprob: TOKENS | dict.fromkeys(("bias", "softcap", "shard")) | {"temperature": 1.0, "entropy": False},
    linear_grpo_loss: TOKENS
    | REWARDED
    | dict.fromkeys(("bias", "softcap", "shard", "mask", "denominator", "old_logprobs", "sampler_logprobs", "config"))
    | {"cu_seqlens": torch.tensor([0, 2, N], dtype=torch.int32), "temperature": 1.0},
    sample: HEAD
    | dict.fromkeys(("bias", "softcap"))
    | {"streams": torch.zeros(N, 5, dtype=torch.int64), "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    group_advantages: REWARDED | {"scale": "group", "eps": 1e-4, "min_std": 0.0, "check_finite": True},
}
WRONG = ["a", [1.0], {}, 1j, np.ones(N), 10**5000, float("nan"), -1, torch.zeros(N, 5, dtype=torch.int64).to_sparse()]


@pytest.mark.parametrize(
    "function, name",
    [(function, name) for function, usual in CALLS.items() for name in usual],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_no_wrong_argument_ends_in_a_raw_error(function, name):
    usual = {key: value for key, value in CALLS[function].items() if value is not None}
    for value in WRONG:
        with pytest.raises(InputError, match=name) as error:
            function(**usual | {name: value})
        assert "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("temperature", [1e-300, 1e300, 10**31])
def test_temperatures_that_fp32_cannot_hold_are_refused(temperature):
    with pytest.raises(InputError, match=r"temperature=1\S+ must be positive and finite, from 1e-30 to 1e\+30"):
        linear_logprob(**TOKENS, temperature=temperature)


def test_group_ids_must_be_integers_in_a_tensor():
    for ids in ("a", [0, 0], torch.zeros(2), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(InputError, match="group_ids"):
            group_advantages(REWARDED["rewards"], group_ids=ids)


def test_more_rows_than_int32_bounds_can_name_are_refused():
    hidden, targets = torch.ones(1, D).expand(2**31, D), torch.zeros(1, dtype=torch.int64).expand(2**31)
    with pytest.raises(InputError, match="hidden has 2,147,483,648 rows: give at most 2,147,483,647"):
        linear_logprob(hidden, HEAD["weight"], targets)


@pytest.mark.parametrize("denominator", [-1.0, 0.0, torch.nan, torch.inf, 1j, True, [1.0, 2.0]], ids=str)
def test_a_denominator_in_a_tensor_is_checked_as_a_number_is(denominator):
    usual = {key: value for key, value in CALLS[linear_grpo_loss].items() if value is not None}
    with pytest.raises(InputError, match="denominator"):
        linear_grpo_loss(**usual | {"denominator": torch.tensor(denominator)})


def test_tensors_that_torch_cannot_compute_with_are_refused():
    usual = {key: value for key, value in CALLS[linear_grpo_loss].items() if value is not None}
    nested = torch.nested.nested_tensor([torch.ones(D)] * N)
    narrow = torch.ones(2).to(torch.float8_e4m3fn)
    for wrong in ({"hidden": nested}, {"rewards": narrow}, {"cu_seqlens": usual["cu_seqlens"].to(torch.uint64)}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            linear_grpo_loss(**usual | wrong)
    with pytest.raises(InputError, match="rewards is a torch.strided tensor of torch.float8_e4m3fn"):
        group_advantages(narrow, group_size=2)
