"""Runs that train a LoRA adapter made by the user."""

import json

import pytest
import torch

from tests.train.test_trainer import SMALL, even_is_good, metrics, training_rows
from toolx_kernels.errors import InputError
from toolx_kernels.models.load import latest_checkpoint, load_model
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.trainer import ToolExpanderTrainer

peft = pytest.importorskip("peft")
SETTINGS = SMALL | dict(cold_start_steps=0, eval_on_start=False, learning_rate=3e-2, hard_sampling="none", beta=0.01)


@pytest.fixture(autouse=True)
def _no_measure(monkeypatch):
    monkeypatch.setattr("toolx_kernels.train.reporter.gemm_speed", lambda *_: 1e9)


def adapted(alpha=8):
    """The tiny model with an adapter as if trained before, with dropout as TRL users set it."""
    model, tokenizer = load_model("tiny", seed=3, device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=alpha, lora_dropout=0.1, target_modules=["q_proj", "up_proj"])
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model, tokenizer


def trainer(folder, model, tokenizer, **settings):
    args = ToolExpanderConfig(output_dir=str(folder), **SETTINGS | settings)
    rows = training_rows(4)
    return ToolExpanderTrainer(model, even_is_good, args, rows, rows[:2], processing_class=tokenizer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two steps, the peft model that it trained, and the tokenizer."""
    folder, (model, tokenizer) = tmp_path_factory.mktemp("runs") / "whole", adapted()
    trainer(folder, model, tokenizer, max_steps=2).train()
    return folder, model, tokenizer


def ids(model):
    return torch.arange(12, device=model.device)[None]


@torch.no_grad()
def logits(model):
    return model(input_ids=ids(model)).logits


def test_one_step_and_one_more_are_two(whole, tmp_path):
    trainer(tmp_path / "parts", *adapted(), max_steps=1).train()
    trainer(tmp_path / "parts", *adapted(), max_steps=2, resume=True).train()
    steps = metrics(whole[0], ["step"])
    assert steps == metrics(tmp_path / "parts", ["step"])
    assert steps[0]["kl"] < 1e-12 < steps[1]["kl"], "the reference is the adapter as it was given"
    for file in ("optimizer.safetensors", "adapter_model.safetensors"):
        assert len({(latest_checkpoint(run) / file).read_bytes() for run in (whole[0], tmp_path / "parts")}) == 1


def test_the_run_and_the_users_object_hold_the_same_model(whole, tmp_path):
    folder, model, tokenizer = whole
    loaded, _ = load_model(folder, device="cpu")
    expected = logits(model.eval())
    assert torch.equal(logits(loaded), expected) and not torch.equal(logits(adapted()[0].eval()), expected)
    model.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "reference").exists()
    trainer(tmp_path / "next", model, tokenizer, max_steps=1).train()
    assert not torch.equal(logits(model), expected), "it goes on from there"


def test_the_plan_is_that_of_the_adapter(whole):
    folder, model, _ = whole
    [plan] = [line for line in map(json.loads, open(folder / "metrics.jsonl")) if line["event"] == "plan"]
    trained = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert plan["timing"]["trained_parameters"] == trained


@pytest.mark.parametrize("given", ["a whole model", "another scale"])
def test_a_good_checkpoint_is_not_called_damaged(whole, given):
    model, tokenizer = adapted(alpha=16) if given == "another scale" else load_model("tiny", seed=3, device="cpu")
    words = "its lora_alpha is 8, but this model's is 16" if given == "another scale" else "holds an adapter, and this "
    again = trainer(whole[0], model, tokenizer, max_steps=3, resume=True)
    with pytest.raises(InputError, match=words) as raised:
        again.train()
    assert "remove it" not in str(raised.value)


def test_use_peft_on_top_is_refused(tmp_path):
    with pytest.raises(InputError, match="already has an adapter: leave out use_peft=True to train that one"):
        trainer(tmp_path / "run", *adapted(), use_peft=True)
    assert not (tmp_path / "run").exists()
