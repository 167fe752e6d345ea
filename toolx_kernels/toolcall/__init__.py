"""Tool calling without tensors: rows and readers, prompts, parsing and matching of calls, rewards, demonstrations."""

from toolx_kernels.toolcall.bfcl_match import bfcl_match
from toolx_kernels.toolcall.chat import Chat, render_prompt, render_text
from toolx_kernels.toolcall.datasets.bfcl import CATEGORIES, read_bfcl
from toolx_kernels.toolcall.datasets.builtin_turns import Episode
from toolx_kernels.toolcall.datasets.read import read_dataset, read_hub, read_jsonl, rows_from
from toolx_kernels.toolcall.datasets.report import DatasetReport, dataset_report
from toolx_kernels.toolcall.datasets.seal_tools import read_seal_tools
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.match import exact_match
from toolx_kernels.toolcall.parse import THOUGHTS, only_calls, parse_calls, split_thought
from toolx_kernels.toolcall.reward_runner import RewardFunctions, Rewards
from toolx_kernels.toolcall.rewards import CallReward, SimilarityReward, is_correct, no_think_reward
from toolx_kernels.toolcall.rows import Row, check_row, check_rows, with_calls
from toolx_kernels.toolcall.self_exemplify import (
    SelfExemplifyingReward,
    answer_of,
    distinct_examples,
    is_answer_correct,
    parse_sections,
    render_self_exemplified,
)
from toolx_kernels.toolcall.tool_format import FORMATS, HERMES, ToolFormat, render_completion

__all__ = [
    "CATEGORIES",
    "CallReward",
    "Chat",
    "DatasetReport",
    "DemonstrationIndex",
    "Episode",
    "FORMATS",
    "HERMES",
    "RewardFunctions",
    "Rewards",
    "Row",
    "SelfExemplifyingReward",
    "SimilarityReward",
    "THOUGHTS",
    "ToolFormat",
    "answer_of",
    "bfcl_match",
    "check_row",
    "check_rows",
    "distinct_examples",
    "dataset_report",
    "exact_match",
    "is_answer_correct",
    "is_correct",
    "no_think_reward",
    "only_calls",
    "parse_calls",
    "parse_sections",
    "read_bfcl",
    "read_dataset",
    "read_hub",
    "read_jsonl",
    "read_seal_tools",
    "render_completion",
    "render_prompt",
    "render_self_exemplified",
    "render_text",
    "rows_from",
    "split_thought",
    "with_calls",
]
