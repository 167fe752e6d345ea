"""Exactness of packing: shared prompts, cut steps and reordered groups give the same gradient as single rows."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.cases import DEVICE
from tests.small_models import ARCHITECTURES, VOCAB, small_model
from toolx_kernels.models.bridge import checkpointed, head_of, toolx_attention
from toolx_kernels.ops.lm_head.linear_grpo import linear_grpo_loss
from toolx_kernels.ops.lm_head.objective import GRPOLossConfig
from toolx_kernels.train.update.batch import PackedGroup, micro_batches, pack

SCORES = [[1.5, -0.5, 0.7, -1.1], [-2.0], [0.3, -0.9, 0.4]]  # advantages


def make_groups() -> list[PackedGroup]:
    """Three groups: one has several turns with masked tool outputs, and one completion is a single token."""
    g = torch.Generator().manual_seed(0)

    def tokens(n):
        return torch.randint(3, VOCAB, (n,), generator=g).tolist()

    turns = [[True] * 3 + [False] * 2 + [True] * 2, None, [True] * 4 + [False] * 5 + [True] * 4, None]
    return [
        PackedGroup(tokens(20), [tokens(7), tokens(1), tokens(13), tokens(5)], turns),
        PackedGroup(tokens(1), [tokens(4)]),
        PackedGroup(tokens(31), [tokens(2), tokens(12), tokens(2)]),
    ]


class InDouble(TorchFunctionMode):
    """Gives float64 where fp32 is requested: transformers computes norms and rotary tables in fp32 in every model."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double

        def wider(value):
            return torch.float64 if value is torch.float32 else value

        return function(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})


def gradients(model) -> dict[str, torch.Tensor]:
    """Returns the gradients by name and clears them in the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def packed_gradients(model, groups, scores=SCORES, budget=10**6):
    """Gradients through packing and the fused loss."""
    scored = [replace(group, advantages=of_group) for group, of_group in zip(groups, scores, strict=True)]
    for parts in micro_batches(scored, budget):
        batch = pack(parts, model.device, model.dtype)
        with toolx_attention(model):
            linear_grpo_loss(
                batch.hidden(model),
                targets=batch.targets,
                cu_seqlens=batch.cu_seqlens,
                mask=batch.mask,
                advantages=batch.advantages,
                denominator=sum(map(len, scores)),
                config=GRPOLossConfig(loss_type="grpo"),
                **head_of(model),
            ).loss.backward()
    return gradients(model)


def single_gradients(model, groups, scores=SCORES):
    """Gradients of the same loss in plain transformers and torch, one completion with its prompt at a time."""
    for group, advantages in zip(groups, scores, strict=True):
        masks = group.masks or [None] * len(group.completions)
        for ids, mask, advantage in zip(group.completions, masks, advantages, strict=True):
            rows = torch.tensor([[*group.prompt, *ids]], device=model.device)
            logits = model(input_ids=rows, use_cache=False).logits[0, len(group.prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(1, rows[0, len(group.prompt) :, None]).squeeze(1)
            ratio = (logprobs - logprobs.detach()).exp() * torch.tensor(advantage, dtype=logprobs.dtype)
            (-ratio[torch.tensor(mask or [True] * len(ids))].mean() / sum(map(len, scores))).backward()
    return gradients(model)


def assert_equal_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= tolerance * gradient.norm(), name


def model_of(architecture, tied, dtype):
    model = small_model(architecture, tied=tied).to(DEVICE, dtype)
    if architecture == "gemma3":  # as Gemma 2 has it; of transformers' attentions only "eager" applies it
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = 3.0
        model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_that_of_single_rows(architecture, tied):
    groups = make_groups()
    model = model_of(architecture, tied, torch.float64)
    with InDouble():
        truth = single_gradients(model, groups)
        assert_equal_gradients(packed_gradients(model, groups), truth, 1e-10)
    model = model_of(architecture, tied, torch.float32)
    assert_equal_gradients(packed_gradients(model, groups), single_gradients(model, groups), 1e-5)


def test_an_advantage_for_each_token():
    """Some completions have one per token, some tokens have zero; equal values in a completion act as one number."""
    groups, model = make_groups(), model_of("llama", False, torch.float64)
    scores = [
        [[1.0, 0.0, -2.0, 0.5, 0.5, 0.0, 3.0], -0.5, [0.0] * 6 + [1.0] * 7, [0.7, 0.0, 0.0, -1.0, 2.0]],
        [-2.0],
        [0.3, [0.1 * place for place in range(12)], [0.0, 0.4]],
    ]
    with InDouble():
        truth = single_gradients(model, groups, scores)
        assert_equal_gradients(packed_gradients(model, groups, scores), truth, 1e-10)
        assert_equal_gradients(packed_gradients(model, groups, scores, budget=43), truth, 1e-10)
    lengths = [[len(ids) for ids in group.completions] for group in groups]
    spread = [[[a] * n for a, n in zip(*pair, strict=True)] for pair in zip(SCORES, lengths, strict=True)]
    whole, same = packed_gradients(model, groups), packed_gradients(model, groups, spread)
    assert whole.keys() == same.keys() and all(same[name].equal(whole[name]) for name in whole)


@pytest.mark.parametrize("architecture, tied", [("llama", False), ("gemma3", True)])
def test_micro_batches_and_order_do_not_change_the_gradient(architecture, tied):
    groups, model = make_groups(), model_of(architecture, tied, torch.float64)
    cuts = {budget: micro_batches(groups, budget) for budget in range(20, 120)}
    with InDouble():
        whole = packed_gradients(model, groups)
        for count in (2, 3, 7):
            budget, batches = next(item for item in cuts.items() if len(item[1]) == count)
            assert count < 7 or len([part for parts in batches for part in parts]) > len(groups), "no group is cut"
            assert_equal_gradients(packed_gradients(model, groups, budget=budget), whole, 1e-10)
        for order in ([2, 0, 1], [1, 2, 0]):
            shuffled, scores = [], []
            for group in (groups[place] for place in order):
                inner = sorted(range(len(group.completions)), key=lambda k: (k * 7 + order[0]) % 5)
                masks = group.masks and [group.masks[k] for k in inner]
                shuffled.append(PackedGroup(group.prompt, [group.completions[k] for k in inner], masks))
                scores.append([SCORES[groups.index(group)][k] for k in inner])
            assert scores != [SCORES[place] for place in order]
            assert_equal_gradients(packed_gradients(model, shuffled, scores), whole, 1e-10)


def test_the_tokens_that_pass_are_those_that_sharing_promises():
    """A prompt of P tokens with G completions of L tokens takes P + G (L - 1) tokens, plus P for each cut."""
    groups, model, passed = make_groups(), small_model("llama").to(DEVICE), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: passed.append(args[0].shape[1]))
    packed_gradients(model, groups)
    prompts, completions = [20, 1, 31], [[7, 1, 13, 5], [4], [2, 12, 2]]
    promised = sum(prompts) + sum(length - 1 for lengths in completions for length in lengths)
    assert passed == [promised] and promised == sum(group.n_tokens for group in groups)
    passed.clear()
    packed_gradients(model, groups, budget=43)
    assert sum(len(parts) for parts in micro_batches(groups, 43)) == len(groups) + 1  # the prompt of 31 tokens twice
    assert sum(passed) == promised + 31 and max(passed) == 43


# ---- activation checkpointing


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter, as peft wraps it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 4, bias=False, device=linear.weight.device)
        self.up = nn.Linear(4, linear.out_features, bias=False, device=linear.weight.device)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def with_adapters(model):
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
    return model.eval()


def saved_bytes(function) -> int:
    """Bytes of the distinct storages that autograd saves for backward."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = function()
    del kept
    return sum(storages.values())


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_checkpointing_changes_memory_and_nothing_else(architecture, adapters):
    torch.manual_seed(0)
    model = small_model(architecture).to(DEVICE)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5  # must stay off
    model = with_adapters(model) if adapters else model
    groups, batch = make_groups(), pack(make_groups(), DEVICE)
    plain = packed_gradients(model, groups)
    modes = [module.training for module in model.modules()]
    forwards = [dict(vars(module)).get("forward") for module in model.modules()]
    with checkpointed(model):
        again = packed_gradients(model, groups)
        assert not any(module.training for module in model.modules())
    assert modes == [module.training for module in model.modules()]
    assert forwards == [dict(vars(module)).get("forward") for module in model.modules()]
    assert len(plain) > 4 and plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert gradient.norm() > 0 or "down" in name
        assert again[name].equal(gradient), name

    with toolx_attention(model):
        without = saved_bytes(lambda: batch.hidden(model))
        weights = sum(p.nbytes for p in model.parameters())
        with checkpointed(model):
            within = saved_bytes(lambda: batch.hidden(model))
    inputs = len(model.model.layers) * len(batch.input_ids) * 64 * 4  # kept by the checkpoints themselves
    assert within + inputs < (without - weights * (not adapters)) / 4


def test_checkpointing_leaves_a_replaced_forward_as_it_was():
    model = small_model("llama").to(DEVICE)
    layer, calls = model.model.layers[1], []

    def forward(*args, **kwargs):
        calls.append(1)
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = forward
    with checkpointed(model):
        packed_gradients(model, make_groups())
    assert layer.forward is forward and len(calls) == 2
    with pytest.raises(KeyError), checkpointed(model):
        raise KeyError
    assert layer.forward is forward and "forward" not in vars(model.model.layers[0])


# ---- tied embeddings


class LargeOutputs(TorchDispatchMode):
    """Records the ops that create a tensor of ``n_elements`` elements."""

    def __init__(self, n_elements):
        super().__init__()
        self.n_elements, self.names = n_elements, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = {t.untyped_storage().data_ptr() for t in itertools.chain(args, kwargs.values()) if torch.is_tensor(t)}
        out = function(*args, **kwargs)
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(tensor) and tensor.numel() == self.n_elements:
                if tensor.untyped_storage().data_ptr() not in known:
                    self.names.append(str(function))
        return out


def large_tensors(model) -> list[int]:
    """Counts the embedding-sized tensors that are created in the first and in the second micro-batch."""
    groups, counts = make_groups(), []
    for _ in range(2):
        batch = pack(groups, DEVICE)
        advantages = torch.tensor(sum(SCORES, []), device=DEVICE)
        with toolx_attention(model), LargeOutputs(model.get_input_embeddings().weight.numel()) as seen:
            linear_grpo_loss(
                batch.hidden(model),
                targets=batch.targets,
                cu_seqlens=batch.cu_seqlens,
                advantages=advantages,
                **head_of(model),
            ).loss.backward()
        counts.append(len(seen.names))
    return counts


def test_a_tied_embedding_has_one_gradient_of_the_vocabulary():
    tied = small_model("llama").to(DEVICE)
    assert large_tensors(tied) == [1, 1]  # the head's gradient, which becomes ``weight.grad`` or is added to it
    untied = small_model("llama", tied=False).to(DEVICE)
    assert large_tensors(untied) == [2, 1]  # first the gradients of head and embedding, then the head's alone
    tied.zero_grad()
    tied.get_input_embeddings().weight.register_hook(lambda gradient: None)  # leaves its gradient to autograd
    assert min(large_tensors(tied)) > 1
