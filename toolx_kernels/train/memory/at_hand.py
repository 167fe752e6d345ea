"""What a plan needs to know of a model and its prompts, without reading a weight."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from toolx_kernels.errors import LOADING_ERRORS
from toolx_kernels.models.load import latest_checkpoint
from toolx_kernels.models.tiny import is_tiny, tiny_tokenizer
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.self_exemplify import INSTRUCTIONS
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.memory.work import Work
from toolx_kernels.train.rows import MADE_UP, load_demonstrations, load_rows

LARGEST_DATASET = 16 << 20  # bytes of a file whose prompts are looked at


def work_at_hand(args: ToolExpanderConfig, config: PreTrainedConfig) -> Work | None:
    """What the run's rows ask, where they and the tokenizer lie on this machine; else None."""
    named = (args.dataset, args.eval_dataset, args.demonstration_dataset)
    if not all(map(_is_at_hand, named)):
        return None
    tokenizer = _tokenizer_at_hand(args.model)
    if tokenizer is None:
        return None
    rows, eval_rows = load_rows(args)
    prompts = Prompts(tokenizer, config.max_position_embeddings, INSTRUCTIONS if args.self_exemplify else "")
    index = DemonstrationIndex.of(rows, load_demonstrations(args.demonstration_dataset))
    return Work.of(args, prompts, index, rows, eval_rows)


def _is_at_hand(dataset: str | None) -> bool:
    file = Path(dataset or "")
    return dataset is None or dataset in MADE_UP or (file.is_file() and file.stat().st_size <= LARGEST_DATASET)


def _tokenizer_at_hand(name: str) -> PreTrainedTokenizerBase | None:
    if is_tiny(name):
        return tiny_tokenizer()
    path = Path(name)
    if not path.is_dir():
        return None
    try:
        return AutoTokenizer.from_pretrained(latest_checkpoint(path) or path)
    except LOADING_ERRORS:
        return None  # a folder with a config alone can be planned for
