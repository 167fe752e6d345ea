"""The loss on the pretended GPU, compared with the CPU; ``test_pretended_gpu`` runs this file.

It is a separate file because it needs no transformers, which takes seconds to import.
"""

import pytest
import torch

from tests.ops.cases import EXTRAS, assert_agrees, assert_equal_gradients, make_case, run_loss, without_logprobs
from tests.without_gpu.pretended_gpu import log, on_cpu, waits_before_a_product
from toolx_kernels import GRPOLossConfig, linear_grpo_loss

WAITS_BEFORE_A_PRODUCT = 1  # in a call of the loss, before its first matrix product
OTHERS = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
FORMS = {
    "grpo": {},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 9},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "gspo": {"importance_sampling_level": "sequence"},
    "entropy": {"entropy_coef": 0.02},
    "kl": {"beta": 0.1},
    "recompute": {"recompute": True},
    "by token": {},
    "by token, gspo": {"importance_sampling_level": "sequence"},
}


@pytest.mark.parametrize(
    "form, extras, others, frozen",
    [
        *((form, (), OTHERS, ()) for form in FORMS),
        *(("grpo", (extra,), (), ()) for extra in ("bias", "softcap")),
        ("entropy", EXTRAS, OTHERS, ()),
        ("gspo", EXTRAS, OTHERS, ()),
        ("recompute", EXTRAS, OTHERS, ()),
        ("grpo", (), (), ("weight",)),
    ],
)
def test_a_loss_is_the_cpus(form, extras, others, frozen):
    config = GRPOLossConfig(**FORMS[form])
    case = without_logprobs(make_case((2, 1, 4, 3, 0, 2, 3, 1), vocab=70, extras=extras, masked=(3, 4)), *others)
    if form.startswith("by token"):
        advantages = torch.tensor([0, 0, 0.5, 0, 1, 0, -2, 0, 0, 0, 0, 1.5, -1, 0, 0, 1], device=case["hidden"].device)
        case = {name: case[name] for name in case.keys() - {"rewards", "group_size"}} | {"advantages": advantages}
    theirs, their_gradients = run_loss(linear_grpo_loss, on_cpu(case), config, frozen)
    log.clear()
    ours, gradients = run_loss(linear_grpo_loss, case, config, frozen)
    assert len(waits_before_a_product()) <= WAITS_BEFORE_A_PRODUCT, log
    assert_agrees(on_cpu(ours), theirs, 1e-5)
    assert_equal_gradients(on_cpu(gradients), their_gradients, 1e-5)
