"""Updates of the learner: several per batch, importance weights, out-of-memory retries, and what runs report."""

import copy
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.test_adapters import needs_peft
from tests.ops.cases import DEVICE
from tests.small_models import small_model
from tests.train.test_trainer import SMALL, assert_same_weights, even_is_good, make_trainer, metrics, training_rows
from tests.train.test_trainer import weights as saved_weights
from toolx_kernels import ToolExpanderConfig
from toolx_kernels.errors import InputError
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.models.adapters import add_adapter
from toolx_kernels.models.bridge import head_of, toolx_attention
from toolx_kernels.models.config import config_of
from toolx_kernels.models.load import latest_checkpoint, load_model
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob
from toolx_kernels.reference import linear_grpo_loss as naive_loss
from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.train import reporter
from toolx_kernels.train.groups import RAW, GroupPlan, ScoredGroup
from toolx_kernels.train.memory import flops as flops_module
from toolx_kernels.train.memory.flops import Flops
from toolx_kernels.train.phases import Phases
from toolx_kernels.train.policies.loss import ClippedLoss
from toolx_kernels.train.trainer import ToolExpanderTrainer
from toolx_kernels.train.update.batch import pack
from toolx_kernels.train.update.learner import Learner, packed
from toolx_kernels.train.update.reference_model import ReferenceModel

# The models are float64, but transformers computes norms in fp32, so results differ by 1e-8.
RATE = 3e-2


def model():
    return small_model("llama").double().to(DEVICE)


def log_probs(of, groups):
    """Log-probs of all completions, by group, completion and token."""
    with torch.no_grad(), toolx_attention(of):
        batch = pack([packed(group) for group in groups], DEVICE)
        flat = iter(linear_logprob(batch.hidden(of), targets=batch.targets, **head_of(of)).logprobs.tolist())
    return [[[next(flat) for _ in rollout.ids] for rollout in group.rollouts] for group in groups]


def some_groups(of, shift=0.0):
    """Three groups: one has tool tokens, one equal rewards. Sampler log-probs are the model's minus ``shift``."""
    generator = torch.Generator().manual_seed(7)

    def ids(n):
        return torch.randint(3, 131, (n,), generator=generator).tolist()

    groups = []
    for number, advantages in enumerate(([1.2, -0.4, -0.8], [0.0, 0.0, 0.0], [-1.0, 1.0, 0.0])):
        rollouts = [Rollout(ids(n), [0.0] * n, [0.0] * n, None, "", [], "stop") for n in (5, 3, 7)]
        rollouts[0].mask = [True, False, False, True, True] if number == 0 else None
        groups.append(
            ScoredGroup(GroupPlan(number), ids(6 + number), rollouts, [RAW] * 3, [False] * 3, advantages=advantages)
        )
    for group, of_group in zip(groups, log_probs(of, groups), strict=True):
        for rollout, logprobs in zip(group.rollouts, of_group, strict=True):
            mask = rollout.mask or [True] * len(logprobs)
            rollout.logprobs = [p - shift if ours else 0.0 for p, ours in zip(logprobs, mask, strict=True)]
    return groups


def learner_of(of, **settings):
    args = ToolExpanderConfig(
        temperature=1.0,
        learning_rate=RATE,
        max_grad_norm=1e9,
        min_reward_std=0.0,
        **{"micro_batch_tokens": 24, "epsilon": 0.2, "epsilon_high": 0.2, "hard_sampling": "none", **settings},
    )
    return Learner(of, args, ClippedLoss(args.loss), Phases(of.device))


def naive_gradient(of, groups, old, config, sampler=None):
    """Gradient norm and output of the reference loss; each completion is a separate row with its prompt."""
    of.zero_grad()
    hidden, targets, bounds, mask, flat_old, flat_sampler, advantages = [], [], [0], [], [], [], []
    for g, group in enumerate(groups):
        for r, rollout in enumerate(group.rollouts):
            row = torch.tensor([[*group.prompt, *rollout.ids[:-1]]], device=DEVICE)
            hidden.append(
                of.get_decoder()(input_ids=row, use_cache=False).last_hidden_state[0, len(group.prompt) - 1 :]
            )
            targets += rollout.ids
            bounds.append(len(targets))
            mask += rollout.mask or [True] * len(rollout.ids)
            flat_old += old[g][r] if old else []
            flat_sampler += rollout.logprobs
            advantages.append(group.advantages[r])
    to = dict(device=DEVICE, dtype=torch.float64)
    out = naive_loss(
        torch.cat(hidden),
        of.get_output_embeddings().weight,
        torch.tensor(targets, device=DEVICE),
        cu_seqlens=torch.tensor(bounds, device=DEVICE, dtype=torch.int32),
        advantages=torch.tensor(advantages, **to),
        old_logprobs=torch.tensor(flat_old, **to) if old else None,
        mask=torch.tensor(mask, device=DEVICE),
        sampler_logprobs=torch.tensor(flat_sampler, **to) if sampler else None,
        config=config,
    )
    out.loss.backward()
    return float(torch.stack([p.grad.norm() for p in of.parameters()]).norm()), out


def test_a_second_update_is_clipped_against_the_policy_before_the_first():
    """Old log-probs come from the first update's forward; in float64, compared with the reference row by row."""
    trained = model()
    groups, config = some_groups(trained), GRPOLossConfig(epsilon=0.2, epsilon_high=0.2)
    old, before = log_probs(trained, groups), copy.deepcopy(trained)
    learner, norms = learner_of(trained, num_iterations=2), []
    apply = learner.optimizer.apply
    learner.optimizer.apply = lambda *args: norms.append(apply(*args))
    with pytest.raises(TypeError):  # the spy returns no norm, so ``improve`` fails after the first update
        learner.improve(groups, 0)
    first, _ = naive_gradient(before, groups, None, config)
    assert norms[0] == pytest.approx(first, rel=1e-6)

    second, out = naive_gradient(copy.deepcopy(trained), groups, old, config)
    assert not math.isclose(second, naive_gradient(copy.deepcopy(trained), groups, None, config)[0], rel_tol=1e-3)
    trained = copy.deepcopy(before)
    learner, norms = learner_of(trained, num_iterations=2), []
    apply = learner.optimizer.apply
    learner.optimizer.apply = lambda *args: norms.append(apply(*args)) or norms[-1]
    told = learner.improve(groups, 0)
    assert norms == pytest.approx([first, second], rel=1e-6)
    assert told["ratio"] != 1 and told["clip_low"] + told["clip_high"] > 0
    assert told["grad_norm"] == norms[0] and told["trained_tokens"] == 2 * sum(packed(g).n_tokens for g in groups[::2])


@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_ratios_may_start_from_what_the_sampler_reported(shift):
    trained = model()
    groups, config = some_groups(trained, shift), GRPOLossConfig(epsilon=0.2, epsilon_high=0.2)
    sampled = [[rollout.logprobs for rollout in group.rollouts] for group in groups]
    expected, _ = naive_gradient(copy.deepcopy(trained), groups, sampled, config)
    learner = learner_of(trained, num_iterations=2, old_logprobs="sampler")
    told = learner.improve(groups, 0)
    assert told["grad_norm"] == pytest.approx(expected, rel=1e-6)
    assert told["logp_difference"] == pytest.approx(0.3) == told["logp_difference_mean"]


@pytest.mark.parametrize(
    ("mode", "shift", "factor"),
    [
        ("token_truncate", 0.4, math.exp(0.4)),
        ("token_truncate", 1.5, 2.0),
        ("token_mask", 1.5, 0.0),
        ("none", 1.5, 1.0),
    ],
)
def test_importance_weights_are_cut_or_left_out_beyond_the_cap(mode, shift, factor):
    trained = model()
    groups = some_groups(trained, shift)
    plain = learner_of(copy.deepcopy(trained)).improve(groups, 0)["grad_norm"]
    weighted = learner_of(trained, importance_sampling_mode=mode, importance_sampling_cap=2.0).improve(groups, 0)
    assert weighted["grad_norm"] == pytest.approx(factor * plain, rel=1e-6)


def test_distilled_rollouts_have_no_ratio_to_their_sampler():
    for settings in ({"importance_sampling_mode": "token_mask"}, {"num_iterations": 2, "old_logprobs": "sampler"}):
        with pytest.raises(InputError, match="hard_sampling=distill learns on another prompt"):
            ToolExpanderConfig(hard_sampling="distill", **settings)
    ToolExpanderConfig(hard_sampling="distill", old_logprobs="sampler")  # without a second update it has no effect


def test_ratios_to_the_sampler_need_no_weights():
    with pytest.raises(InputError, match="token_mask corrects for .* ratios of old_logprobs=sampler contain already"):
        ToolExpanderConfig(
            hard_sampling="none", num_iterations=2, old_logprobs="sampler", importance_sampling_mode="token_mask"
        )


def fail_above(learner, tokens, message="CUDA out of memory. Tried to allocate 2.00 GiB."):
    """Makes backward passes of more than ``tokens`` tokens run out of memory after they have left gradients."""
    whole = Learner._backward

    def backward(groups, loss_of):
        told = whole(learner, groups, loss_of)
        if sum(group.n_tokens for group in groups) > tokens:
            raise torch.OutOfMemoryError(message)
        return told

    learner._backward = backward


def test_an_update_that_runs_out_of_memory_is_repeated_in_smaller_parts():
    gradients = []

    def spied(learner):
        apply = learner.optimizer.apply

        def spy(*args):
            gradients.append([p.grad.clone() for p in learner.model.parameters()])
            return apply(*args)

        learner.optimizer.apply = spy
        return learner

    groups = some_groups(model())
    expected = spied(learner_of(model(), micro_batch_tokens=1000)).improve(groups, 0)
    learner = spied(learner_of(model(), micro_batch_tokens=1000))
    fail_above(learner, 15)
    with pytest.warns(UserWarning, match="Memory ran out with 38 tokens in a micro-batch; .*--micro_batch_tokens 19"):
        told = learner.improve(groups, 0)
    assert learner.token_budget < 20
    assert told["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning comes once, and the smaller micro-batches stay
        learner.improve(groups, 1)


def test_what_rollouts_keep_goes_before_micro_batches_shrink():
    """Every later update frees it up front, so that none fails first."""
    released = []

    def make_room():
        released.append(True)
        learner._backward = whole  # with that memory everything fits
        return True

    expected = learner_of(model(), micro_batch_tokens=1000).improve(some_groups(model()), 0)
    learner = learner_of(model(), micro_batch_tokens=1000)
    groups, whole = some_groups(learner.model), learner._backward
    learner.make_room = make_room
    fail_above(learner, 15)
    with pytest.warns(UserWarning, match="from here on each update first frees the KV pool of the rollouts"):
        told = learner.improve(groups, 0)
    assert told["grad_norm"] == expected["grad_norm"] and learner.token_budget == 1000 and len(released) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.improve(groups, 1)
    assert len(released) == 2


def test_memory_that_runs_out_in_the_optimizer_is_named():
    learner = learner_of(model())
    groups = some_groups(learner.model)

    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    learner.optimizer._update = runs_out
    with pytest.raises(InputError, match="in the optimizer's update .*2.00 GiB.*adamw_8bit or adamw_offload"):
        learner.improve(groups, 0)


def test_the_reference_is_asked_once_for_a_batch(monkeypatch):
    """Also if later updates are cut differently; the result equals that of asking at each update."""

    def improved(ask_again):
        trained = model()
        learner = learner_of(trained, num_iterations=3, beta=0.5)
        learner.reference = ReferenceModel.__new__(ReferenceModel)
        learner.reference._is_adapter = False
        learner.reference.model = small_model("llama", seed=1).double().to(DEVICE)
        asked, whole, accumulate = [], learner._reference_logprobs, learner._accumulate
        groups, budgets = some_groups(trained), iter((24, 34, 44))

        def spied(batch):
            asked.append(len(batch.targets))
            return whole(batch)

        def again(work):
            learner.token_budget = next(budgets)
            if ask_again:
                work = [([replace(group, ref_logprobs=()) for group in of], loss) for of, loss in work]
            return accumulate(work)

        learner._reference_logprobs, learner._accumulate = spied, again
        told = learner.improve(groups, 0)
        return told, asked, [p.detach().clone() for p in trained.parameters()]

    (once, asked, weights), (each_time, asked_again, expected) = improved(False), improved(True)
    assert sum(asked_again) == 3 * sum(asked) and once["kl"] > 0
    assert once["ratio"] == pytest.approx(each_time["ratio"], rel=1e-6)
    for mine, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


def test_memory_that_does_not_hold_one_completion_ends_the_run():
    trained = model()
    before = [parameter.clone() for parameter in trained.parameters()]
    learner = learner_of(trained)
    fail_above(learner, 3)
    with pytest.warns(UserWarning, match="Memory ran out"), pytest.raises(InputError, match="one completion at a time"):
        learner.improve(some_groups(trained), 0)
    assert all(map(torch.equal, before, trained.parameters()))
    other = learner_of(model())
    fail_above(other, 3, message="something else")
    other._backward = lambda *_: (_ for _ in ()).throw(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        other.improve(some_groups(other.model), 0)


def groups_of(*lengths):
    """Groups from (length of the prompt, lengths of the completions)."""
    return [
        ScoredGroup(
            GroupPlan(0), [5] * prompt, [Rollout([7] * n, [], [], None, "", [], "stop") for n in completions], []
        )
        for prompt, completions in lengths
    ]


def linear_flops(of, groups, targets):
    """FLOPs that torch counts in the decoder's linear layers and in a head over all targets.

    Attention is not counted: its matrix products have three dimensions.
    """
    of.enable_input_require_grads()  # else the first layer of a frozen model computes no input gradient
    with FlopCounterMode(display=False) as counter, toolx_attention(of):
        hidden = pack([packed(group) for group in groups], DEVICE).hidden(of)
        of.get_output_embeddings()(hidden[:targets]).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=needs_peft)])
def test_flops_are_those_of_the_matrix_products(adapter):
    of = small_model("llama", tied=False).to(DEVICE)
    if adapter:
        add_adapter(of, rank=4, alpha=32)
    groups = groups_of((9, [4, 7]), (5, [1]))
    tokens, targets = 9 + 3 + 6 + 5, 12
    pairs = 9 * 10 // 2 + (3 * 9 + 4 * 3 // 2) + (6 * 9 + 7 * 6 // 2) + 5 * 6 // 2
    counted = Flops(of)
    attention = 4 * 3 * 64 * pairs  # three layers with four heads of size 16
    seen = linear_flops(of, groups, targets)
    assert counted.trained(groups, 1, reference=False) - 3 * attention == seen
    forward = (
        2
        * tokens
        * sum(
            m.weight.numel()
            for name, m in of.named_modules()
            if isinstance(m, torch.nn.Linear) and hasattr(m, "weight") and "lm_head" not in name
        )
        + 2 * targets * 64 * of.config.vocab_size
        + attention
    )
    assert counted.sampled(groups) == forward
    assert counted.trained(groups, 3, reference=True) == 3 * (seen + 3 * attention) + forward


# ---- whole runs


def test_a_run_tells_where_its_time_and_memory_went(tmp_path):
    summary = make_trainer(tmp_path / "run", max_steps=2, profile_step=2).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].index("plan") < [line["event"] for line in lines].index("step")
    timings = [line["timing"] for line in lines if line["event"] == "step"]
    between = [{"probe", "evaluation"} & timing["phases"].keys() for timing in timings]
    assert between == [{"probe", "evaluation"}, set()], "what came before a step is told with it"
    for timing in timings:
        assert {"rollout", "reward", "forward", "backward", "optimizer"} <= timing["phases"].keys()
        own = sum(spent for name, spent in timing["phases"].items() if name not in ("probe", "evaluation"))
        assert 0.5 * timing["seconds"] < own <= timing["seconds"]
        assert 0 < timing["flop_share"] < 1
    assert {"probe", "evaluation"} <= summary["phases"].keys()
    told = sum(timing["phases"]["rollout"] for timing in timings)
    assert summary["phases"]["rollout"] == pytest.approx(told, abs=0.06)
    for name in ("rollout", "forward", "backward", "optimizer", "peak"):
        of_phase = summary["memory"][name]
        assert of_phase["planned"] > 0 and of_phase["measured"] > 0
    names = {event.get("name") for event in json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]}
    assert any("toolx::linear_grpo" in str(name) for name in names)


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adamw_8bit"},
        {"optim": "adamw_offload", "gradient_checkpointing": True},
        {"optim": "adamw_stochastic", "dtype": "bfloat16"},
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.soak),  # as adamw_stochastic, with master weights
        {"use_peft": True, "lora_r": 4, "beta": 0.01, "learning_rate": 3e-2},
        {"num_iterations": 2, "importance_sampling_mode": "token_truncate"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_every_way_of_updating_resumes_exactly(tmp_path, monkeypatch, settings):
    """One step, resumed for one more, equals two steps in weights and logs.

    A round is one step of all four rows, because a run that ends within a round probes fewer.
    """
    # measuring takes seconds in bf16 on a CPU without bf16 instructions
    monkeypatch.setattr("toolx_kernels.train.reporter.gemm_speed", lambda *_: 1e9)
    if settings.get("optim") == "adamw_8bit":
        pytest.importorskip("torchao")
    if "use_peft" in settings:
        pytest.importorskip("peft")

    def train(folder, **more):
        args = ToolExpanderConfig(output_dir=str(folder), **SMALL | settings | more)
        rows = training_rows()[:4], builtin.heldout_rows(4, 0, ("easy",))
        return ToolExpanderTrainer("tiny", even_is_good, args, *rows).train()

    train(tmp_path / "whole", max_steps=2)
    train(tmp_path / "parts", max_steps=1)
    train(tmp_path / "parts", max_steps=2, resume=True)
    whole, parts = (latest_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    steps = metrics(tmp_path / "whole", ["step"])
    assert steps == metrics(tmp_path / "parts", ["step"])
    assert any(step["grad_norm"] > 0 for step in steps)
    for file in ("optimizer.safetensors", *(["adapter_model.safetensors"] if "use_peft" in settings else ())):
        assert (whole / file).read_bytes() == (parts / file).read_bytes()
    if "use_peft" not in settings:
        assert_same_weights(saved_weights(tmp_path / "whole", 2), saved_weights(tmp_path / "parts", 2))


def test_only_memory_that_ran_out_keeps_micro_batches_small(tmp_path):
    settings = dict(cold_start_steps=0, eval_on_start=False)
    make_trainer(tmp_path / "run", max_steps=1, micro_batch_tokens=300, **settings).train()
    trainer = make_trainer(tmp_path / "run", max_steps=2, micro_batch_tokens=900, resume=True, **settings)
    trainer.train()
    assert trainer.learner.token_budget == 900
    trainer = make_trainer(tmp_path / "run", max_steps=3, micro_batch_tokens=900, resume=True, **settings)
    trainer.learner.token_budget = 100  # as if memory had run out before the checkpoint of step 3
    restore = trainer._resume

    def restored():
        found = restore()
        trainer.learner.token_budget = 100
        return found

    trainer._resume = restored
    trainer.train()
    trainer = make_trainer(tmp_path / "run", max_steps=4, micro_batch_tokens=900, resume=True, **settings)
    trainer.train()
    assert trainer.learner.token_budget == 100


def test_a_profile_of_a_step_that_never_comes_is_refused(tmp_path):
    with pytest.raises(InputError, match="profile_step=9 is beyond this run of 2 steps: choose one of those"):
        make_trainer(tmp_path / "run", max_steps=2, profile_step=9).train()


def test_a_run_whose_model_cannot_be_planned_for_goes_on_without(tmp_path, monkeypatch):
    def refuses(*_, **__):
        raise InputError("cannot be planned for")

    monkeypatch.setattr(reporter, "plan_of", refuses)
    summary = make_trainer(tmp_path / "run", max_steps=1, cold_start_steps=0, eval_on_start=False).train()
    assert summary["memory"] is None and not metrics(tmp_path / "run", ["plan"])


def test_without_memory_for_a_gemm_no_share_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(flops_module, "SIDE", {"cpu": 1 << 24})
    make_trainer(tmp_path / "run", max_steps=1, cold_start_steps=0, eval_on_start=False).train()
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().split('"event": "step"')[1:]
    assert '"flop_share": null' in line


def test_the_run_folder_of_an_adapter_is_evaluated_and_planned_for_and_not_trained_on(tmp_path):
    pytest.importorskip("peft")
    args = ToolExpanderConfig(
        output_dir=str(tmp_path / "run"), model="tiny", use_peft=True, lora_r=2, max_steps=1, **SMALL
    )
    ToolExpanderTrainer("tiny", even_is_good, args, training_rows(), training_rows()).train()
    model, _ = load_model(str(tmp_path / "run"))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert config_of(str(tmp_path / "run")).hidden_size == model.config.hidden_size
    for use_peft in (False, True):
        args = ToolExpanderConfig(
            output_dir=str(tmp_path / "more"), model=str(tmp_path / "run"), use_peft=use_peft, **SMALL
        )
        with pytest.raises(InputError, match="is an adapter: name its base model with use_peft"):
            ToolExpanderTrainer(args.model, even_is_good, args, training_rows(), training_rows())
    path = tmp_path / "run" / "checkpoint-1" / "adapter_config.json"
    for damage, named in (("{", "no readable adapter_config.json"), ('{"peft_type": "LORA"}', "names no base model")):
        path.write_text(damage)
        with pytest.raises(InputError, match=named):
            load_model(str(tmp_path / "run"))
