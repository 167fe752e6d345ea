"""Adoption of LoRA adapters that users made with peft or transformers: unchanged, or refused in one sentence."""

import copy

import pytest
import torch

from tests.models.test_adapters import FP32, logits
from tests.ops.cases import DEVICE
from tests.small_models import small_model
from toolx_kernels.errors import InputError
from toolx_kernels.models.adapters import (
    check_same_adapter,
    drop_frozen_adapter,
    freeze_adapter,
    reference_adapter,
    save_adapter,
)
from toolx_kernels.models.adopt import adapter_settings, adopt_adapter
from toolx_kernels.models.support import check_supported

peft = pytest.importorskip("peft")
LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")


def of_peft(model=None, config=None, adapter_name="default", **settings):
    model = small_model("llama", tied=False).to(DEVICE) if model is None else model
    return peft.get_peft_model(model, config or peft.LoraConfig(**LORA | settings), adapter_name=adapter_name)


def of_transformers(**settings):
    model = small_model("llama", tied=False).to(DEVICE)
    model.add_adapter(peft.LoraConfig(**LORA | settings))
    return model


def trained(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B.default." in name:
                parameter += (torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter)
    return model


@pytest.mark.parametrize(
    "make",
    [
        of_peft,
        of_transformers,
        lambda: of_peft(use_rslora=True, rank_pattern={"q_proj": 2}, lora_dropout=0.5, init_lora_weights="gaussian"),
        lambda: of_peft(use_dora=True),
        lambda: of_peft().get_base_model(),
        lambda: of_peft().base_model,
    ],
    ids=["peft", "transformers", "patterns and dropout", "dora", "unwrapped by its user", "peft's tuner"],
)
def test_the_adopted_model_computes_as_the_given_one_and_shares_its_weights(make, tmp_path):
    given = trained(make())
    given.eval()
    expected = logits(given)
    model = adopt_adapter(given, "a-base").eval()
    assert torch.equal(logits(model), expected)
    placed = {p.data_ptr() for p in given.parameters()}
    assert {p.data_ptr() for p in model.parameters()} == placed
    check_supported(model)  # runs packed training
    save_adapter(model, tmp_path)
    again = peft.PeftModel.from_pretrained(small_model("llama", tied=False).to(DEVICE), tmp_path)
    assert torch.equal(logits(again), expected)
    assert model.peft_config["default"].base_model_name_or_path == "a-base"


def test_an_adapter_in_bfloat16_is_trained_in_fp32():
    base = small_model("llama").to(DEVICE, torch.bfloat16)
    given = peft.get_peft_model(base, peft.LoraConfig(**LORA), autocast_adapter_dtype=False)
    model = adopt_adapter(given, None)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {FP32} and model.dtype == torch.bfloat16


def test_the_reference_is_the_adapter_as_it_was_given_and_leaves_no_trace():
    given = trained(of_peft(lora_dropout=0.5))
    for name, parameter in given.named_parameters():  # a user may train one half alone
        parameter.requires_grad_(".lora_B." in name)
    flags = {name: parameter.requires_grad for name, parameter in given.named_parameters()}
    model = adopt_adapter(given, None).eval()
    first = logits(model)
    freeze_adapter(model)
    trained(given)
    present = logits(model)
    with reference_adapter(model):
        assert torch.equal(logits(model), first) and not torch.equal(first, present)
    assert torch.equal(logits(model), present)
    drop_frozen_adapter(model)
    assert list(given.peft_config) == ["default"] and given.active_adapters == ["default"]
    assert {name: parameter.requires_grad for name, parameter in given.named_parameters()} == flags


def test_the_users_object_can_be_merged_and_saved_afterwards(tmp_path):
    given = trained(of_peft())
    model = adopt_adapter(given, None)
    given.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "transformers")
    for name in ("theirs", "transformers"):
        again = peft.PeftModel.from_pretrained(small_model("llama", tied=False).to(DEVICE), tmp_path / name)
        assert torch.equal(logits(again), logits(given.eval()))
    merged = given.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").to(DEVICE)
    assert torch.equal(logits(again), logits(merged))
    with pytest.raises(InputError, match="no longer has an adapter: pass the model that peft's merge_and_unload"):
        adopt_adapter(given, None)


def with_another():
    model = of_peft()
    model.add_adapter("other", peft.LoraConfig(**LORA))
    return model


def merged():
    model = of_peft()
    model.merge_adapter()
    return model


def switched_off():
    model = of_peft()
    model.base_model.disable_adapter_layers()
    return model


def under_another_wrapper(wrapped):
    model = small_model("llama", tied=False).to(DEVICE)
    wrapper = of_peft(model, target_modules=["q_proj"])
    return of_peft(wrapper if wrapped else model, target_modules=["v_proj"])


def with_trained_norm():
    model = of_peft()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_another, "has the adapters 'default', 'other': give it a single one, called 'default'"),
        (lambda: of_peft(adapter_name="policy"), "has the adapter 'policy': give it a single one, called 'default'"),
        (lambda: of_peft(config=peft.IA3Config(task_type="CAUSAL_LM")), "of the kind IA3, but only LORA .*use_peft=T"),
        (
            lambda: of_peft(config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "of the kind PROMPT_TUNING, but only LORA is supported: pass the model without an adapter and set",
        ),
        (lambda: of_peft(target_modules=["q_proj", "lm_head"]), "has an adapter on lm_head: give it one on linear"),
        (lambda: of_peft(target_modules=["embed_tokens"]), "has an adapter on model.embed_tokens: give it one on li"),
        (lambda: of_peft(modules_to_save=["lm_head"]), r"with modules_to_save=\['lm_head'\], which is not supported"),
        (lambda: of_peft(bias="all"), "with bias='all', which is not supported: pass the model without"),
        (
            lambda: of_peft(target_modules=[], target_parameters=["self_attn.q_proj.weight"]),
            r"with target_parameters=\['self_attn.q_proj.weight'\], which is not supported",
        ),
        (lambda: of_peft(trainable_token_indices=[1]), r"with trainable_token_indices=\[1\], which is not supported"),
        (lambda: of_peft(init_lora_weights="pissa"), "init_lora_weights='pissa', which changes the weights under it"),
        (lambda: of_peft(inference_mode=True), "without trainable weights: load it with is_trainable=True"),
        (lambda: of_transformers(bias="lora_only"), "The LlamaForCausalLM given as model .* with bias='lora_only'"),
        (merged, "has its adapter merged into model.layers.0.self_attn.q_proj: unmerge it"),
        (switched_off, r"has its adapter switched off: call enable_adapter_layers and set_adapter\('default'\)"),
        (
            lambda: under_another_wrapper(True),
            "on model.layers.0.self_attn.q_proj that its config does not target: make",
        ),
        (
            lambda: under_another_wrapper(False),
            "one adapter of all target_modules, not one around another, or pass the model",
        ),
        (with_trained_norm, "has an adapter, but model.norm.weight needs a gradient too: freeze it"),
    ],
)
def test_refuses_what_cannot_be_trained(make, message):
    with pytest.raises(InputError, match=message):
        adopt_adapter(make(), None)


def test_an_adapter_of_other_settings_does_not_go_on(tmp_path):
    save_adapter(adopt_adapter(of_peft(), None), tmp_path)
    check_same_adapter(tmp_path, adopt_adapter(of_peft(), None))
    with pytest.raises(InputError, match="another adapter: its lora_alpha is 8, but this model's is 16; resume"):
        check_same_adapter(tmp_path, adopt_adapter(of_peft(lora_alpha=16), None))


def test_a_plan_knows_the_adapter():
    layers = [f"model.layers.{layer}.{part}" for layer in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")]
    expected = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": layers}
    assert adapter_settings(adopt_adapter(of_peft(), None)) == expected
    assert adapter_settings(copy.copy(small_model("llama"))) == {}
