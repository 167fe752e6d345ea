"""Wrong objects as model, tokenizer, config, reward or dataset: one sentence each, before anything is written."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from tests.small_models import small_model
from tests.train.test_trainer import SMALL, even_is_good, training_rows
from toolx_kernels.errors import InputError
from toolx_kernels.models.tiny import tiny_model, tiny_tokenizer
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.trainer import ToolExpanderTrainer

TOKENIZER = tiny_tokenizer()
CONFIG = tiny_model(TOKENIZER, 0).config


def trainer(tmp_path, **given):
    args = ToolExpanderConfig(output_dir=str(tmp_path / "run"), **SMALL)
    rows = training_rows(4)
    usual = dict(model=tiny_model(TOKENIZER, 0), reward_funcs=even_is_good, args=args, processing_class=TOKENIZER)
    return ToolExpanderTrainer(**usual | dict(train_dataset=rows, eval_dataset=rows[:2]) | given)


def t5():
    shape = dict(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(T5Config(**shape))


def on_meta():
    with torch.device("meta"):
        return LlamaForCausalLM(CONFIG)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model is None: pass a transformers causal LM, or the name of one"),
        (3, "model is the number 3: pass a transformers causal LM"),
        ({}, "model is an empty dict: pass a transformers causal LM"),
        (torch.nn.Linear(2, 2), "model is an object of Linear: pass a transformers causal LM"),
        (LlamaForCausalLM, "model is the class LlamaForCausalLM: pass a model that LlamaForCausalLM.from_pretrained"),
        (AutoModelForCausalLM, "model is the class AutoModelForCausalLM: pass a model that"),
        (torch.nn.Linear, "model is the class Linear: pass a transformers causal LM"),
        (torch.nn.DataParallel(tiny_model(TOKENIZER, 0)), "model is an object of DataParallel: pass .*, its .module"),
        (torch.compile(tiny_model(TOKENIZER, 0)), r"model is .*OptimizedModule: pass the .*, its \._orig_mod"),
        (
            LlamaModel(CONFIG),
            "model is an object of LlamaModel, which generates no text: load it with AutoModelForCausalL",
        ),
        (LlamaForSequenceClassification(CONFIG), "LlamaForSequenceClassification, which generates no text: load it"),
        (t5(), "model is an object of T5ForConditionalGeneration, an encoder-decoder: pass a causal LM"),
        (on_meta(), r"model is an object of LlamaForCausalLM without weights \(on the meta device\): load its"),
        (
            tiny_model(TOKENIZER, 0).requires_grad_(False),
            r"No parameter of the .* needs a gradient: call its requires_",
        ),
        (small_model("llama"), "has the token '<0x7D>' with the id 131, but the model's embedding has 131 rows: give"),
        ("", "The empty name is not a model folder: give a folder"),
        (Path("/no/such/model"), "/no/such/model is not a model folder: give a folder"),
    ],
)
def test_models(tmp_path, model, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, model=model)
    assert not (tmp_path / "run").exists()


def test_settings_that_were_changed_in_a_config_are_checked_again(tmp_path):
    args = ToolExpanderConfig(output_dir=str(tmp_path / "run"), **SMALL)
    args.prompts_per_step = 10**9
    with pytest.raises(InputError, match="prompts_per_step=1000000000 must be at least 1 and at most 65,536"):
        trainer(tmp_path, args=args)


class Processor(ProcessorMixin):
    def __init__(self):
        self.tokenizer = TOKENIZER


def without_end():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, r"processing_class is None: pass the model's tokenizer \(AutoTokenizer.from_pretrained\)"),
        ("tiny", r"processing_class is the text 'tiny': pass AutoTokenizer.from_pretrained\('tiny'\)"),
        (Processor(), "processing_class is an object of Processor: pass its .tokenizer"),
        (PreTrainedTokenizerFast, "processing_class is the class TokenizersBackend: pass the model's tokenizer"),
        (Tokenizer(WordLevel({"a": 0})), "processing_class is an object of Tokenizer: pass the model's tokenizer"),
        (without_end(), "has no end-of-sequence token: set its eos_token"),
    ],
)
def test_tokenizers(tmp_path, tokenizer, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, processing_class=tokenizer)
    assert not (tmp_path / "run").exists()


def test_special_tokens_beyond_the_embedding_matter_where_prompts_have_them(tmp_path):
    """The tokenizer of Gemma 3's text models has an image token beyond their embedding."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    assert len(tokenizer) > CONFIG.vocab_size
    trainer(tmp_path, processing_class=tokenizer)
    tokenizer.chat_template = "<image>" + tokenizer.chat_template
    with pytest.raises(
        InputError, match="'<image>' with the id .* or enlarge the embedding with resize_token_embeddings"
    ):
        trainer(tmp_path, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, r"args is an empty dict: pass ToolExpanderConfig\(\*\*args\)"),
        ({"seed": 1}, r"args is an object of dict: pass ToolExpanderConfig\(\*\*args\)"),
        (ToolExpanderConfig, r"args is the class ToolExpanderConfig: pass args=ToolExpanderConfig\(...\)"),
        (even_is_good, r"args is the function even_is_good: pass args=.*, and functions as reward_funcs"),
        (TrainingArguments(output_dir="x"), "args is an object of TrainingArguments: pass a ToolExpanderConfig, whose"),
        (SimpleNamespace(seed=1), "args is an object of SimpleNamespace: pass a ToolExpanderConfig"),
    ],
)
def test_args(tmp_path, args, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, args=args)


def test_trls_config(tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.GRPOConfig(output_dir=str(tmp_path / "run"), bf16=False)
    with pytest.raises(InputError, match="args is an object of GRPOConfig: pass a ToolExpanderConfig, whose settings"):
        trainer(tmp_path, args=args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (ToolExpanderConfig(), "reward_funcs is an object of ToolExpanderConfig: pass that as args"),
        (
            "my.reward",
            "reward_funcs has the text 'my.reward': pass a function of prompts, completions and completion_ids",
        ),
        ([even_is_good, "my.reward"], "reward_funcs has the text 'my.reward': pass a function"),
        (tiny_model(TOKENIZER, 0), "reward_funcs has an object of LlamaForCausalLM: pass a function"),
        (Processor, "reward_funcs has the class Processor: pass a function"),
        ([None], "the reward function None cannot be called"),
        ([], "reward_funcs is empty"),
        (7, "the reward function 7 cannot be called"),
    ],
)
def test_rewards(tmp_path, rewards, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, reward_funcs=rewards)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"demonstrations": 3}, "demonstrations is the number 3: pass a list of rows"),
        ({"demonstrations": None}, "demonstrations is None: pass a list of rows"),
        ({"cold_start": 3}, "cold_start is the number 3, which has no __next__"),
        ({"hard_sample_policy": 3}, "hard_sample_policy is the number 3, which has no start_round"),
        ({"prompt_order": even_is_good}, "prompt_order is the function even_is_good, which has no rows"),
        ({"advantage_shaper": "dapo"}, "advantage_shaper is the text 'dapo', which has no __call__"),
        ({"policy_loss": even_is_good}, "policy_loss is the function even_is_good, which has no denominator"),
    ],
)
def test_parts(tmp_path, part, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, **part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("rows.jsonl", r"is the text 'rows.jsonl': pass .*read_dataset\('rows.jsonl'\)"),
        (Path("rows.jsonl"), r"is the text 'rows.jsonl': pass .*read_dataset\('rows.jsonl'\)"),
        (5, "is the number 5: pass a list of rows"),
        ([], "is an empty list: pass at least one row"),
        ({"train": [], "test": []}, r"is an object of dict: pass a list of rows, or one of its parts \(train, test\)"),
        (dict, "is the class dict: pass a list of rows"),
        (even_is_good, "is the function even_is_good: pass a list of rows"),
    ],
)
def test_datasets(tmp_path, name, rows, message):
    with pytest.raises(InputError, match=f"{name} {message}"):
        trainer(tmp_path, **{name: rows})
    assert not (tmp_path / "run").exists()


def test_datasets_with_splits_and_frames(tmp_path):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    rows = [{"prompt": row.prompt, "tools": row.tools, "answer": row.answer} for row in training_rows(4)]
    train, test = (datasets.Dataset.from_list(those) for those in (rows, rows[:1]))
    splits = datasets.DatasetDict(train=train, test=test)
    task = trainer(tmp_path, train_dataset=splits, eval_dataset=pandas.DataFrame(rows[:2])).task
    assert (len(task.rows), len(task.eval_rows)) == (4, 2)
    with pytest.raises(InputError, match=r"has the splits train, test: pass one of them, such as dataset\['train'\]"):
        trainer(tmp_path, eval_dataset=splits)


def test_rows_to_train_on_are_needed_and_rows_to_evaluate_on_only_where_a_setting_asks_for_them(tmp_path):
    there = (
        r"train_dataset is None: pass a list of rows or a datasets.Dataset \(toolx_kernels.train.rows.load_rows give"
    )
    with pytest.raises(InputError, match=there):
        trainer(tmp_path, train_dataset=None)
    with pytest.raises(InputError, match="eval_dataset is an empty list: pass at least one row, or leave it out"):
        trainer(tmp_path, eval_dataset=[])
    for setting in (dict(eval_steps=2), dict(eval_rows=2), dict(eval_dataset="rows.jsonl")):
        args = ToolExpanderConfig(output_dir=str(tmp_path / "run"), **SMALL, **setting)
        with pytest.raises(
            InputError, match=r"eval_\w+=\S+ has nothing to evaluate: pass the argument eval_dataset, or"
        ):
            trainer(tmp_path, eval_dataset=None, args=args)
    assert trainer(tmp_path, eval_dataset=None).task.eval_rows == []


def test_what_is_legitimate_is_taken(tmp_path):
    frozen_in_part = tiny_model(TOKENIZER, 0)
    frozen_in_part.model.layers[0].requires_grad_(False)
    made = trainer(tmp_path, model=frozen_in_part, train_dataset=iter(training_rows(4)))
    assert made.model is frozen_in_part and len(made.task.rows) == 4
    frozen_in_part.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    own = tiny_tokenizer()
    assert trainer(tmp_path, model=tmp_path / "model", processing_class=None).tokenizer is not None
    assert trainer(tmp_path, model=tmp_path / "model", processing_class=own).tokenizer is own
