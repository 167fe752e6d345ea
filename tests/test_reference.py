"""``reference.py``, the definitions of the objectives, against TRL, verl's dual clip and numerical derivatives."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from toolx_kernels import reference
from toolx_kernels.errors import InputError
from toolx_kernels.loss_config import LOSS_TYPES, GRPOLossConfig

LENGTHS = [3, 0, 4, 2, 3]
MASKED = 5
ADVANTAGES = [0.7, 1.0, -0.9, 0.0, 1.3]
TOKEN_ADVANTAGES = [0.7, 0.0, -1.1, 0.4, 0.0, -2.0, 0.9, 0.0, 0.0, -0.3, 1.3, 0.0]
INPUTS = ("old_logprobs", "ref_logprobs", "sampler_logprobs")


def numbers(*shape, seed):
    """Irregular numbers in [-1, 1] that are the same in every version of torch."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(n * 12.9898 + seed * 78.233).mul(43.5).frac().reshape(shape)


def make_case(**changes):
    n, dim, vocab = sum(LENGTHS), 4, 7
    case = {"hidden": numbers(n, dim, seed=1), "weight": 2 * numbers(vocab, dim, seed=2)}
    case["targets"] = torch.arange(n) * 5 % vocab
    own = reference.linear_logprob(case["hidden"], case["weight"], case["targets"]).logprobs
    case |= {name: own + 0.6 * numbers(n, seed=3 + i) for i, name in enumerate(INPUTS)}
    case["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    case["advantages"] = torch.tensor(ADVANTAGES, dtype=torch.float64)
    case["mask"] = torch.arange(n) != MASKED
    return case | changes


def config_of(**settings):
    needed = {"dr_grpo": {"max_completion_length": 6}, "cispo": {"epsilon_high": 1.2}, "vespo": {}}
    return GRPOLossConfig(**needed.get(settings.get("loss_type"), {}) | settings)


def loss_and_grads(case, config, *names):
    leaves = {name: case[name].clone().requires_grad_() for name in names}
    output = reference.linear_grpo_loss(**(case | leaves), config=config)
    return output, torch.autograd.grad(output.loss, leaves.values())


@pytest.mark.parametrize(
    "settings",
    [{"loss_type": name} for name in LOSS_TYPES]
    + [{"importance_sampling_level": "sequence", "loss_type": name} for name in ("grpo", "luspo", "cispo", "sapo")]
    + [{"beta": 0.3, "kl_estimator": name} for name in ("k1", "k2", "k3")]
    + [{"beta": 0.3, "use_bias_correction_kl": True}, {"delta": 1.4}]
    + [{"entropy_coef": 0.2, "top_entropy_quantile": 0.5, "beta": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("by_token", [False, True], ids=["by completion", "by token"])
def test_gradients_are_those_of_the_loss(settings, by_token):
    """cispo and vespo detach a weight that depends on the log-probs, so their gradient is not the derivative of their
    value. They are checked where ratio and sampler's weight are 1, against a loss with that constant weight."""
    config = config_of(**settings)
    weighted = config.loss_type in ("cispo", "vespo")
    owner = torch.repeat_interleave(torch.tensor(LENGTHS))
    advantages = torch.tensor(TOKEN_ADVANTAGES if by_token else ADVANTAGES, dtype=torch.float64)
    case = make_case(bias=numbers(7, seed=8), advantages=advantages) | {"softcap": 3.0}
    if weighted:
        case |= dict.fromkeys(INPUTS)
    names = ("hidden", "weight", "bias")

    def loss(*leaves):
        return reference.linear_grpo_loss(**(case | dict(zip(names, leaves, strict=True))), config=config).loss

    leaves = [case[name].clone().requires_grad_() for name in names]
    if not weighted:
        assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
        return
    # with weight 1, the loss is the mean of -A logp over the tokens
    given = torch.autograd.grad(loss(*leaves), leaves)
    logprobs = reference.linear_logprob(leaves[0], leaves[1], case["targets"], bias=leaves[2], softcap=3.0).logprobs
    plain = -((advantages if by_token else advantages[owner]) * logprobs)[case["mask"]].sum() / case["mask"].sum()
    torch.testing.assert_close(given, torch.autograd.grad(plain, leaves))


# ---- TRL

TRL_SETTINGS = {
    "grpo": {},
    "two-sided": {"epsilon_high": 0.3, "delta": 1.4},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "beta": 0.2},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 0.03, "beta": 0.2},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.1},
    "luspo by token": {"loss_type": "luspo", "beta": 0.2},
    "cispo": {"loss_type": "cispo"},
    "cispo by sequence": {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.05},
    # TRL rounds the temperatures to fp32; these are exact in fp32
    "sapo": {"loss_type": "sapo", "sapo_temperature_neg": 1.25, "sapo_temperature_pos": 0.75},
    "sapo by sequence": {"loss_type": "sapo", "importance_sampling_level": "sequence", "sapo_temperature_neg": 1.0},
    "vespo": {"loss_type": "vespo"},
    "vespo masked": {"loss_type": "vespo", "importance_sampling_mode": "token_mask", "importance_sampling_cap": 1.3},
    "corrected KL": {"beta": 0.2, "use_bias_correction_kl": True},
    "corrected KL by sequence": {
        "beta": 0.2, "use_bias_correction_kl": True, "importance_sampling_level": "sequence", "epsilon": 0.03,
    },
    "top entropy": {"top_entropy_quantile": 0.4, "beta": 0.2},
    "token_mask": {"importance_sampling_mode": "token_mask", "importance_sampling_cap": 1.3, "beta": 0.2},
    "sequence_mask": {"importance_sampling_mode": "sequence_mask", "importance_sampling_cap": 1.3},
    "sequence_truncate": {"importance_sampling_mode": "sequence_truncate", "importance_sampling_cap": 1.3},
}  # fmt: skip

# Loss, and sum of numbers(N, D, seed=11) * d loss / d hidden, of TRL 1.16.0's GRPOTrainer._compute_loss on make_case().
# To print them again, with trl installed: python -m tests.test_reference
TRL_VALUES = {
    "grpo": (-0.1733395533953957, 0.21588252354335985),
    "two-sided": (-0.1882252551739197, 0.2042430592225166),
    "bnpo": (-0.23637211826644877, 0.2943852593773088),
    "dr_grpo": (-0.08666977669769788, 0.10794126177167992),
    "dapo": (-0.2228254080234592, 0.296115976329643),
    "gspo": (-0.21118690351900232, 0.16051809012364748),
    "luspo": (-0.6670010517743888, 0.501575886279324),
    "luspo by token": (-0.49021589765161033, 0.6514551479252143),
    "cispo": (0.6221168516857871, 0.23682476910617375),
    "cispo by sequence": (0.7612090999994973, 0.30531796695520597),
    "sapo": (-0.9557499709943773, 0.18709095633503764),
    "sapo by sequence": (-0.5605277754151413, 0.16040407449003746),
    "vespo": (0.24184875162780992, -0.19047329917074435),
    "vespo masked": (0.6582559269928571, -0.4774285757008494),
    "corrected KL": (-0.15964147697425662, 0.20112633268185368),
    "corrected KL by sequence": (-0.2093851940909764, 0.1664319880640148),
    "top entropy": (-0.26668552208780294, 0.23238071865741106),
    "token_mask": (-0.00732421584718336, 0.01583645461114326),
    "sequence_mask": (0.12361943949120602, -0.07275987108177531),
    "sequence_truncate": (-0.1855527192124776, 0.07660531733839057),
}


def summary(loss, hidden_grad):
    return loss.item(), float((numbers(*hidden_grad.shape, seed=11) * hidden_grad).sum())


@pytest.mark.parametrize("name", TRL_SETTINGS)
def test_agrees_with_trl(name):
    output, (hidden_grad,) = loss_and_grads(make_case(), config_of(**TRL_SETTINGS[name]), "hidden")
    assert summary(output.loss, hidden_grad) == pytest.approx(TRL_VALUES[name], rel=1e-9, abs=1e-12)


def trl_summary(config, case):
    """``summary`` of the loss that TRL's trainer computes from the same numbers, padded to (B, T)."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    hidden = case["hidden"].clone().requires_grad_()
    stats = reference.linear_logprob(hidden, case["weight"], case["targets"], entropy=True)
    width = max(LENGTHS)
    owner = torch.repeat_interleave(torch.tensor(LENGTHS))
    column = torch.arange(len(owner)) - case["cu_seqlens"][:-1][owner]

    def pad(values):
        return values.new_zeros(len(LENGTHS), width).index_put((owner, column), values)

    mask = pad(case["mask"].to(hidden.dtype))
    old, ref, sampler = (pad(case[key]) for key in INPUTS)
    gap = (old - sampler) * mask
    gap = gap.sum(-1, keepdim=True) if config.importance_sampling_mode.startswith("sequence") else gap
    weight = gap.exp()
    if config.importance_sampling_mode.endswith("truncate"):
        weight = weight.clamp(max=config.importance_sampling_cap)
    else:
        weight = weight.masked_fill(weight > config.importance_sampling_cap, 0)
    accelerator = SimpleNamespace(
        num_processes=1,
        pad_across_processes=lambda x, **_: x,
        gather=lambda x: x,
        reduce=lambda x, **_: x,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (pad(stats.logprobs), pad(stats.entropy.detach()), None),
        accelerator=accelerator,
        model=torch.nn.Identity(),
        args=config,
        aux_loss_enabled=False,
        off_policy_mask_threshold=None,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        loss_type=config.loss_type,
        beta=config.beta,
        importance_sampling_level=config.importance_sampling_level,
        epsilon_low=config.epsilon,
        epsilon_high=config.clip_high,
        top_entropy_quantile=config.top_entropy_quantile,
        max_completion_length=config.max_completion_length,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.model.eval()
    trainer.get_high_entropy_mask = GRPOTrainer.get_high_entropy_mask.__get__(trainer)
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": case["advantages"], "old_per_token_logps": old, "ref_per_token_logps": ref,
        "importance_sampling_ratio": weight, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return summary(loss, *torch.autograd.grad(loss, hidden))


# ---- properties without a counterpart in TRL


def test_delta_is_dual_clip():
    """verl's form is max(-A r, -A clip(r)), bounded by -A c where A < 0."""
    ratio = torch.tensor([0.1, 0.7, 0.95, 1.0, 1.15, 1.25, 1.5, 2.9, 3.1, 9.0], dtype=torch.float64)
    config = GRPOLossConfig(epsilon=0.2, epsilon_high=0.28, delta=3.0)
    for advantage in (-1.7, 0.6):
        expected = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
        if advantage < 0:
            expected = torch.minimum(torch.tensor(-advantage * 3.0, dtype=torch.float64), expected)
        actual = reference.completion_losses(
            ratio.log(),
            torch.zeros_like(ratio),
            torch.tensor(advantage, dtype=torch.float64),
            config,
            old=torch.zeros_like(ratio),
        )
        torch.testing.assert_close(actual.losses, expected)


def test_the_entropy_bonus_has_the_weights_of_the_tokens():
    case = make_case()
    entropy = reference.linear_logprob(case["hidden"], case["weight"], case["targets"], entropy=True).entropy
    with_bonus = reference.linear_grpo_loss(**case, config=GRPOLossConfig(entropy_coef=0.1))
    without = reference.linear_grpo_loss(**case, config=GRPOLossConfig())
    entropy[MASKED] = 0
    means = [part.sum() / max(len(part) - (b == 2), 1) for b, part in enumerate(entropy.split(LENGTHS))]
    torch.testing.assert_close(without.loss - with_bonus.loss, 0.1 * sum(means) / len(LENGTHS))
    assert with_bonus.stats["live_tokens"] == sum(LENGTHS) - 1  # those with zero advantage too


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_of_the_kl(estimator):
    case = make_case(advantages=torch.zeros(len(LENGTHS), dtype=torch.float64), sampler_logprobs=None)
    settings = {"beta": 0.3, "kl_estimator": estimator}

    def run(case=case, **more):
        output, (grad,) = loss_and_grads(case, GRPOLossConfig(**settings | more), "hidden")
        return output.loss, grad

    own, straight = run(), run(kl_gradient="straight_through")
    torch.testing.assert_close(own[0], straight[0])
    torch.testing.assert_close(straight[1], run(kl_estimator="k2")[1])
    if estimator == "k3":
        # r k3 and k2 times a constant ratio both have the gradient of the reverse KL
        corrected = run(use_bias_correction_kl=True)
        constant = run(use_bias_correction_kl=True, kl_gradient="straight_through")
        torch.testing.assert_close(corrected, constant)
        assert not torch.allclose(corrected[1], straight[1])
    # on-policy, it is the policy gradient with advantage -beta kl
    case = case | {"old_logprobs": None}
    hidden = case["hidden"].clone().requires_grad_()
    logprobs = reference.linear_logprob(hidden, case["weight"], case["targets"]).logprobs
    gap = case["ref_logprobs"] - logprobs.detach()
    kl = {"k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - gap - 1}[estimator]
    owner = torch.repeat_interleave(torch.tensor(LENGTHS))
    tokens = torch.bincount(owner[case["mask"]], minlength=len(LENGTHS))
    plain = (0.3 * kl * logprobs / tokens[owner])[case["mask"]].sum() / len(LENGTHS)
    torch.testing.assert_close(run(case, kl_gradient="none")[1], *torch.autograd.grad(plain, hidden))


@pytest.mark.parametrize("loss_type, level", [(t, "token") for t in LOSS_TYPES] + [("luspo", "sequence")])
@pytest.mark.parametrize("broken", ["hidden", *INPUTS])
def test_rows_that_are_not_finite_are_dropped_and_counted(loss_type, broken, level):
    """The loss is that of the other rows, whose weights stay: dropped rows still count in the normalizer."""
    config = config_of(loss_type=loss_type, beta=0.1, importance_sampling_level=level)
    case = make_case()
    rows = [1, 4]
    case[broken] = case[broken].clone()
    case[broken][rows[0]] = torch.nan
    case[broken][rows[1]] = torch.nan if broken == "hidden" else -torch.inf
    output, grads = loss_and_grads(case, config, "hidden", "weight")
    assert output.stats["nonfinite"] == 2
    assert output.loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert (grads[0][rows] == 0).all() and grads[0].abs().sum() > 0
    assert all(value.isfinite() for value in output.stats.values())

    left_out = make_case()
    left_out["mask"][rows] = False
    tokens = sum(LENGTHS) - 1
    if loss_type in ("grpo", "sapo"):
        return  # masking them would change the denominator of each completion's mean
    denominator = {"dr_grpo": 5 * 6, "luspo": 5}.get(loss_type, tokens)
    expected, same_grads = loss_and_grads(left_out | {"denominator": denominator}, config, "hidden", "weight")
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(grads, same_grads)
    for name in ("entropy", "ratio", "clip_low", "clip_high", "kl"):
        torch.testing.assert_close(output.stats[name], expected.stats[name])


@pytest.mark.parametrize("gap", [-1e30, -200.0, 200.0, 1e30])
@pytest.mark.parametrize("broken", [*INPUTS, "both"])
@pytest.mark.parametrize("settings", [{"use_bias_correction_kl": True}, {"kl_gradient": "none"}], ids=str)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_huge_log_ratios_stay_finite_in_fp32(loss_type, settings, broken, gap):
    case = {k: v.float() if v.is_floating_point() else v for k, v in make_case().items()}
    if broken == "both":  # ratio and KL are multiplied
        case |= {"old_logprobs": case["old_logprobs"] - gap, "ref_logprobs": case["ref_logprobs"] + gap}
    else:
        case[broken] = case[broken] + gap
    output, grads = loss_and_grads(case, config_of(loss_type=loss_type, beta=0.1, **settings), "hidden", "weight")
    assert output.stats["nonfinite"] == 0
    assert output.loss.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_nothing_finite_gives_a_zero_loss_that_backward_accepts():
    case = make_case(hidden=torch.full((sum(LENGTHS), 4), torch.nan, dtype=torch.float64))
    output, grads = loss_and_grads(case, GRPOLossConfig(beta=0.1, top_entropy_quantile=0.5), "hidden", "weight")
    assert output.loss == 0 and all((grad == 0).all() for grad in grads)
    assert output.stats["nonfinite"] == output.stats["live_tokens"] == sum(LENGTHS) - 1


# ---- the config


def test_a_config_comes_back_from_its_key():
    config = GRPOLossConfig(loss_type="cispo", epsilon_high=5.0, beta=0.1, kl_estimator="k1", entropy_coef=1e-3)
    assert GRPOLossConfig.from_key(config.key) == config
    assert GRPOLossConfig.from_key(config.key) is GRPOLossConfig.from_key(config.key)
    assert config != GRPOLossConfig() and hash(config) == hash(GRPOLossConfig.from_key(config.key))
    assert "key" not in repr(config)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss_type": "ppo"}, "loss_type='ppo' is unknown: choose one of grpo, bnpo"),
        ({"loss_type": "gspo"}, "loss_type='gspo' is loss_type='grpo' with importance_sampling_level='sequence'"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4' is unknown: choose one of k1, k2, k3"),
        ({"kl_gradient": None}, "kl_gradient=None is unknown"),
        ({"importance_sampling_mode": "truncate"}, "importance_sampling_mode='truncate' is unknown"),
        ({"epsilon": "0.2"}, "epsilon='0.2' must be a number"),
        ({"beta": torch.tensor(0.1)}, r"beta=tensor\(0.1000\) must be a number"),
        ({"beta": True}, "beta=True must be a number"),
        ({"use_bias_correction_kl": 1}, "use_bias_correction_kl=1 must be True or False"),
        ({"epsilon": -0.1}, r"epsilon=-0.1 must lie in \[0, 1\)"),
        ({"epsilon": 1.0}, r"epsilon=1.0 must lie in \[0, 1\), as the lower clip"),
        ({"beta": float("nan")}, "beta=nan must lie in"),
        ({"beta": float("inf")}, "beta=inf must lie in"),
        ({"entropy_coef": -0.1}, "entropy_coef=-0.1 must lie in"),
        ({"sapo_temperature_neg": 0}, "sapo_temperature_neg=0 must be positive and finite"),
        ({"vespo_k_pos": -1.0}, "vespo_k_pos=-1.0 must lie in"),
        ({"vespo_lambda_neg": 0.0}, "vespo_lambda_neg=0.0 must be positive and finite"),
        ({"importance_sampling_cap": -1.0}, "importance_sampling_cap=-1.0 must be positive"),
        ({"temperature": 0}, "temperature=0 must be positive and finite"),
        ({"top_entropy_quantile": 1.5}, r"top_entropy_quantile=1.5 must lie in \[0, 1\]"),
        ({"max_completion_length": 0}, "max_completion_length=0 must be at least 1"),
        ({"max_completion_length": 2.5}, "max_completion_length=2.5 must be a whole number"),
        ({"loss_type": torch.zeros(2)}, r"loss_type=tensor\(\[0., 0.\]\) is unknown"),
        ({"temperature": 1e-300}, "temperature=1e-300 must be positive and finite, from 1e-30"),
        ({"beta": 10**400}, "beta=10+... must lie in"),
        ({"workspace_mib": 10**30}, "workspace_mib=10+ must be at least 1 and at most 1,048,576"),
        ({"delta": 1.1}, "delta=1.1 must exceed 1 \\+ epsilon_high = 1.2"),
        ({"loss_type": "sapo", "delta": 3.0}, "delta=3.0 bounds a clipped ratio: leave it out for loss_type='sapo'"),
        ({"loss_type": "dr_grpo"}, "divides by max_completion_length: set it"),
        ({"loss_type": "cispo"}, "caps the ratio at epsilon_high, not at"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "leave importance_sampling_level at 'token'"),
        ({"loss_type": "vespo", "importance_sampling_mode": "sequence_mask"}, "not 'sequence_mask'"),
        ({"use_bias_correction_kl": True, "kl_gradient": "none", "beta": 0.1}, "leave one of them out"),
    ],
)
def test_a_config_that_cannot_work_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        GRPOLossConfig(**settings)


if __name__ == "__main__":
    for name, settings in TRL_SETTINGS.items():
        print(f"    {name!r}: {trl_summary(config_of(**settings), make_case())},")
