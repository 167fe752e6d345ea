"""LoRA adapters: used in rollouts, the only trained weights, exact in files, and their own reference."""

import importlib.util
import json
import logging
from importlib.metadata import version

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.ops.cases import DEVICE
from tests.small_models import small_model
from toolx_kernels.engine import RolloutEngine, SamplingParams
from toolx_kernels.errors import InputError
from toolx_kernels.models import adapters, peft_library
from toolx_kernels.models.adapters import (
    add_adapter,
    attach_adapter,
    base_of,
    freeze_adapter,
    load_adapter_weights,
    reference_adapter,
    save_adapter,
)
from toolx_kernels.models.bridge import head_of, toolx_attention
from toolx_kernels.models.load import load_model
from toolx_kernels.models.support import check_supported
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.update.adamw import make_optimizer
from toolx_kernels.train.update.batch import PackedGroup, pack

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
FP32, BF16 = torch.float32, torch.bfloat16
PROMPT = [1, 5, 7, 9, 11, 13] * 5  # more than one page
GROUPS = [PackedGroup(PROMPT, [[4, 8, 15], [16, 23]]), PackedGroup([3, 42], [[6, 6, 2], [9]])]
IDS = torch.arange(12, device=DEVICE)[None]


def adapted(dtype=FP32, architecture="llama", seed=0, trained=True, model=None, **settings):
    """A small model with an adapter, which has an effect if ``trained``, and its settings."""
    model = model or small_model(architecture).to(DEVICE, dtype)
    args = ToolExpanderConfig(use_peft=True, lora_r=4, lora_alpha=8, seed=seed, model="a-base", **settings)
    targets = args.lora_target_modules
    add_adapter(model, rank=4, alpha=8, target_modules=targets, seed=seed, name="a-base")
    if trained:
        change(model)
    return model, args


def change(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B.default." in name:
                parameter += torch.randn(parameter.shape, generator=g).to(parameter) * 0.2


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def sampled(engine):
    groups = engine.generate([PROMPT], 3, SamplingParams(max_new_tokens=8))
    return [(c.ids, c.logprobs) for c in groups[0].completions]


def logprobs(model, groups=GROUPS):
    with toolx_attention(model):
        batch = pack(groups, DEVICE)
        return linear_logprob(batch.hidden(model), targets=batch.targets, **head_of(model)).logprobs


def loss_of(model):
    return -logprobs(model).sum() / 8


@needs_peft
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_begins_as_the_base_model_and_trains_nothing_else(architecture):
    bare = small_model(architecture).to(DEVICE)
    model, _ = adapted(architecture=architecture, trained=False)
    assert torch.equal(logits(model), logits(bare))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {name.removesuffix(".weight") for name, _ in bare.named_parameters() if "_proj.weight" in name}
    assert trained == {f"{layer}.lora_{half}.default.weight" for layer in layers for half in "AB"}
    check_supported(model)


@needs_peft
def test_depends_on_the_seed_alone():
    def first(seed):
        torch.manual_seed(seed + 5)
        before = torch.get_rng_state()
        model, _ = adapted(seed=seed % 2, trained=False, model=small_model("llama").to(DEVICE))
        return model.model.layers[0].mlp.up_proj.lora_A["default"].weight.detach(), before

    (one, _), (again, _), (other, _) = first(0), first(2), first(1)
    assert torch.equal(one, again) and not torch.equal(one, other)
    model = small_model("llama").to(DEVICE)
    state = torch.get_rng_state()
    adapted(model=model, trained=False)
    freeze_adapter(model)
    assert torch.equal(torch.get_rng_state(), state)


@needs_peft
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("optim", ["adamw", "adamw_offload"])
def test_updates_at_1e_6_arrive_in_every_adapter_weight(dtype, optim):
    model, args = adapted(dtype, optim=optim)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {FP32}
    assert model.dtype == dtype and logits(model).dtype == dtype
    optimizer = make_optimizer(model, args, 1e-6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_of(model).backward()
    optimizer.collect()
    assert optimizer.apply(1e9, (0, 0)) > 0
    for name, parameter in model.named_parameters():
        moved = float((parameter.detach() - before[name]).abs().median())
        assert 0.5e-6 < moved < 2e-6 if "lora_" in name else moved == 0, name


@needs_peft
def test_gradients_are_those_of_the_merged_weights():
    """With W = W0 + s B A, dB = s dW A^T and dA = s B^T dW, in packed training."""
    model, args = adapted()
    loss_of(model).backward()
    layer = model.model.layers[1].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged = small_model("llama").to(DEVICE)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if "_proj" in name:
                lora = modules[name.removesuffix(".weight")]
                parameter += 2.0 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    loss_of(merged).backward()
    dw = merged.model.layers[1].self_attn.q_proj.weight.grad
    torch.testing.assert_close(b.grad, 2.0 * dw @ a.T, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(a.grad, 2.0 * b.T @ dw, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(logprobs(merged), logprobs(model), rtol=1e-4, atol=1e-4)


@needs_peft
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rollouts_follow_the_adapter(dtype):
    """The prompt's pages are kept between calls."""
    model, _ = adapted(dtype)
    freeze_adapter(model)
    engine = RolloutEngine(model)
    first = sampled(engine)
    with reference_adapter(model):
        assert sampled(engine) == first, "it has just been frozen"
    change(model, seed=1)
    present = sampled(engine)
    assert present != first and present == sampled(RolloutEngine(model)), "no page of the adapter before is used"
    with reference_adapter(model):
        assert sampled(engine) == first
    assert sampled(engine) == present
    completion, reported = present[0]
    with torch.no_grad():
        trainers = logprobs(model, [PackedGroup(PROMPT, [completion])])
    torch.testing.assert_close(trainers.cpu(), torch.tensor(reported), rtol=0, atol=1e-4 if dtype == FP32 else 0.1)


@needs_peft
def test_the_reference_is_the_model_before_rl():
    model, args = adapted()  # as after a cold start
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    cold, bare = logits(model), logits(small_model("llama").to(DEVICE))
    freeze_adapter(model)
    optimizer = make_optimizer(model, args, 1e-2)
    assert set(optimizer.parameters) == {name for name, (_, needed) in before.items() if needed}
    loss_of(model).backward()
    optimizer.apply(1e9, (0, 0))
    after = logits(model)
    assert not torch.equal(after, cold)
    loss_of(model).backward()
    kept = {name: parameter.grad.clone() for name, parameter in optimizer.parameters.items()}
    with pytest.raises(ZeroDivisionError), reference_adapter(model):
        assert torch.equal(logits(model), cold) and not torch.equal(cold, bare)
        raise ZeroDivisionError
    assert torch.equal(logits(model), after)
    present = dict(model.named_parameters())
    for name, (parameter, needed) in before.items():
        assert present[name] is parameter and parameter.requires_grad == needed, name
    assert not any(p.requires_grad for name, p in present.items() if ".reference." in name)
    assert all(torch.equal(p.grad, kept[name]) for name, p in optimizer.parameters.items())


@needs_peft
def test_the_reference_may_come_from_a_checkpoint(tmp_path):
    model, _ = adapted()
    first = logits(model)
    save_adapter(model, tmp_path)
    change(model, seed=1)
    freeze_adapter(model, tmp_path)
    assert not torch.equal(logits(model), first)
    with reference_adapter(model):
        assert torch.equal(logits(model), first)


@needs_peft
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_files_are_pefts_and_exact(dtype, tmp_path, recwarn, caplog):
    from peft import PeftModel

    small_model("qwen2").to(dtype).save_pretrained(tmp_path / "base")

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).to(DEVICE)

    model, args = adapted(dtype, model=base())
    freeze_adapter(model)
    change(model, seed=1)
    with caplog.at_level(logging.WARNING):
        save_adapter(model, tmp_path / "adapter")
    assert not recwarn.list and not caplog.records
    assert base_of(tmp_path / "adapter") == str(tmp_path / "base")

    theirs = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(logits(theirs), logits(model))
    attached = base()
    attach_adapter(attached, tmp_path / "adapter")
    assert torch.equal(logits(attached), logits(model))
    assert not any(p.requires_grad for p in attached.parameters())
    if dtype == FP32:  # transformers would round the adapter to the dtype of the weights
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").to(DEVICE)
        assert torch.equal(logits(loaded), logits(model))

    resumed, _ = adapted(dtype, model=base(), seed=3)
    places = [p.data_ptr() for p in resumed.parameters()]
    load_adapter_weights(tmp_path / "adapter", resumed)
    assert torch.equal(logits(resumed), logits(model))
    assert places == [p.data_ptr() for p in resumed.parameters()], "in place, so that an optimizer goes on"

    model.save_pretrained(tmp_path / "transformers")
    load_adapter_weights(tmp_path / "transformers", resumed)
    assert torch.equal(logits(resumed), logits(model))


@needs_peft
def test_names_a_base_model_that_has_no_folder(tmp_path):
    model, _ = adapted()
    save_adapter(model, tmp_path)
    assert base_of(tmp_path) == "a-base"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "a-base"


@needs_peft
def test_an_adapter_of_the_tiny_model_names_the_seed_of_its_weights(tmp_path):
    model, _ = load_model("tiny", seed=3)
    add_adapter(model, rank=4, alpha=8, seed=3, name="tiny")
    change(model, seed=1)
    save_adapter(model, tmp_path)
    assert base_of(tmp_path) == "tiny:3"
    found, _ = load_model(str(tmp_path))
    assert torch.equal(logits(found), logits(model.to("cpu")))


@needs_peft
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("lm_head", "'lm_head' is the head, .*; choose among down_proj, gate_proj, k_proj"),
        ("q_prj", "'q_prj' is not a module of LlamaForCausalLM; choose among"),
        ("embed_tokens", "'embed_tokens' is not a linear layer"),
        ("mlp", "'mlp' is not a linear layer"),
    ],
)
def test_refuses_targets(target, message):
    model = small_model("llama", tied=False)
    with pytest.raises(InputError, match=message):
        add_adapter(model, rank=4, alpha=8, target_modules=["v_proj", target])
    assert all(p.requires_grad for p in model.parameters()) and not adapters.has_adapter(model)


@needs_peft
def test_trains_the_targets_that_are_named():
    model, _ = adapted(lora_target_modules=["v_proj", "layers.0.mlp.up_proj"])
    assert adapters.has_adapter(model)
    adapted_layers = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    values = {f"model.layers.{layer}.self_attn.v_proj" for layer in range(3)}
    assert adapted_layers == values | {"model.layers.0.mlp.up_proj"}


@needs_peft
def test_refuses_files_of_another_adapter(tmp_path):
    model, _ = adapted()
    save_adapter(model, tmp_path / "good")
    other = small_model("llama")
    add_adapter(other, rank=2, alpha=8)
    before = logits(model)
    with pytest.raises(InputError, match=r"lora_A.weight is \(4, .*this model's is \(2, .*use the lora_r and"):
        load_adapter_weights(tmp_path / "good", other)
    (tmp_path / "cut").mkdir()
    whole = (tmp_path / "good" / adapters.WEIGHTS_FILE).read_bytes()
    (tmp_path / "cut" / adapters.WEIGHTS_FILE).write_bytes(whole[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_adapter_weights(tmp_path / "cut", model)
    with pytest.raises(InputError, match="holds no adapter for LlamaForCausalLM"):
        attach_adapter(small_model("llama"), tmp_path / "cut")
    assert torch.equal(logits(model), before)


def test_says_that_peft_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"use_peft=True needs peft: pip install 'toolx_kernels\[lora\]'"):
        add_adapter(small_model("llama"), rank=4, alpha=8)


@needs_peft
def test_a_peft_too_old_for_transformers_is_named_with_both_versions(monkeypatch, tmp_path):
    adapted_model, _ = adapted()
    save_adapter(adapted_model, tmp_path)
    versions = (
        f"99.1 or newer with transformers {version('transformers')}, but peft {version('peft')} is installed: pip"
    )
    monkeypatch.setattr(peft_library, "MIN_PEFT_VERSION", "99.1")
    model = small_model("llama")
    with pytest.raises(InputError, match=f"use_peft=True needs peft {versions} install 'peft>=99.1'"):
        add_adapter(model, rank=4, alpha=8)
    assert all(p.requires_grad for p in model.parameters()) and not adapters.has_adapter(model)
    with pytest.raises(InputError, match=f"The adapter in {tmp_path} needs peft {versions}"):
        attach_adapter(model, tmp_path)
    monkeypatch.setattr(peft_library.transformers, "__version__", "99.0")
    with pytest.raises(InputError, match=r"or if it is not released yet 'transformers==5\.17\.\*'"):
        base_of(tmp_path)
    monkeypatch.setattr(peft_library.metadata, "version", lambda name: "garbage")
    with pytest.raises(
        InputError, match="needs peft 99.1 or newer, .* calls its version 'garbage': pip install --force"
    ):
        base_of(tmp_path)


@needs_peft
@pytest.mark.parametrize("error", [ValueError("no"), AttributeError("no"), ImportError("no"), AssertionError("no")])
def test_whatever_peft_raises_is_one_sentence(monkeypatch, tmp_path, error):
    import peft

    def fail(*args, **settings):
        raise error

    model, _ = adapted()
    said = rf"\({type(error).__name__}: no\)"
    monkeypatch.setattr("peft.get_peft_model_state_dict", fail)
    with pytest.raises(InputError, match=f"The adapter's weights cannot be separated from the model's {said}: use an"):
        save_adapter(model, tmp_path)
    monkeypatch.undo()
    save_adapter(model, tmp_path)
    monkeypatch.setattr(peft, "inject_adapter_in_model", fail)
    with pytest.raises(InputError, match=f"No adapter can be made for LlamaForCausalLM {said}: choose other lora_tar"):
        add_adapter(small_model("llama"), rank=4, alpha=8)
    with pytest.raises(InputError, match=f"holds no adapter for LlamaForCausalLM {said}: give a folder"):
        attach_adapter(small_model("llama"), tmp_path)
    with pytest.raises(InputError, match=f"No second adapter can be made {said}: use another adapter"):
        freeze_adapter(model)
    monkeypatch.setattr(peft.PeftConfig, "from_pretrained", fail)
    with pytest.raises(InputError, match=f"holds no readable adapter_config.json {said}"):
        base_of(tmp_path)
    monkeypatch.setattr(peft.LoraConfig, "save_pretrained", fail)
    with pytest.raises(InputError, match=f"The adapter's config cannot be written to {tmp_path} {said}"):
        save_adapter(model, tmp_path)


@needs_peft
def test_a_full_disk_and_full_memory_are_not_pefts(monkeypatch, tmp_path):
    import peft

    for error in (OSError(28, "No space left on device"), torch.OutOfMemoryError("CUDA out of memory")):

        def fail(*args, error=error, **settings):
            raise error

        monkeypatch.setattr(peft.LoraConfig, "save_pretrained", fail)
        with pytest.raises(type(error)):
            save_adapter(adapted()[0], tmp_path)


@needs_peft
def test_the_base_is_noted_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_model("llama").save_pretrained("base")
    model = AutoModelForCausalLM.from_pretrained("base").to(DEVICE)
    add_adapter(model, rank=4, alpha=8, name="an-alias")
    save_adapter(model, tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == str(tmp_path / "base")
    model.name_or_path = "Qwen/Qwen3-0.6B"
    adapters.name_base(model, None)
    assert model.peft_config["default"].base_model_name_or_path == "Qwen/Qwen3-0.6B"
