"""Narrow copies of configs: the same architecture with few layers, narrow widths and a small vocabulary.

transformers' configs use the same names for the same things, so a table of names narrows nearly all of them. A size
whose name is not in the table is kept and may not fit the others: then the copy cannot be made or run, and a copy with
the original widths must be tried.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedConfig

VOCAB_SIZE = 128
LENGTH = 3  # tokens: upper limit of settings that limit what a token sees
LENGTHS = re.compile("window|chunk_size|block_size|index_topk|local_attention|floor_scale")
COUNTS = re.compile("layer|pattern")  # of layers, not tokens
CONTEXT = 64  # tokens: lower limit of settings that limit the length of a row
DEPTHS = (2, 4, 8, 64)
NARROW_ENOUGH = 128  # largest hidden size that is kept

TOKEN_NAMES = ("token_id", "token_ids", "token_index")  # suffixes of the names of special tokens
INNER_NAMES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")

# Upper limits, by the names that all configs map to their own.
WIDTHS = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "rotary_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 2,
    "topk_group": 1,
}


def narrow_copies(config: PreTrainedConfig, *, widths: bool) -> Iterator[PreTrainedConfig]:
    """Yields copies of ``config`` of increasing depth, with narrow widths if ``widths``, else with its own."""
    text = config.get_text_config(decoder=True)
    n_layers = text.num_hidden_layers
    kinds = len(_first_of_kinds(_per_layer(text, n_layers)))
    for depth in sorted({min(n_layers, max(kinds, depth)) for depth in DEPTHS}):
        narrow = copy.deepcopy(config)
        for part in parts_of(narrow):
            if widths and getattr(part, "hidden_size", 0) > NARROW_ENOUGH:
                _narrow_widths(part)
            _shallow(part, depth)
            _shorten(part)
        yield narrow


def parts_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config and, if it is composite, its sub-configs."""
    return [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]


def _narrow_widths(config: PreTrainedConfig) -> None:
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None)
    if not heads:  # for example the part for images
        return
    head_dim, rope_dim = (getattr(config, name, None) for name in ("head_dim", "qk_rope_head_dim"))
    for name, most in WIDTHS.items():
        _at_most(config, name, most)
    narrow = 16
    if head_dim and head_dim == rope_dim:  # keys and values are made from a latent
        narrow = WIDTHS["qk_rope_head_dim"]
    elif head_dim and head_dim * heads != hidden:
        narrow = 32
    for name in _names(config):
        if name.endswith(INNER_NAMES):
            _at_most(config, name, 48 if "expert" in name or "moe" in name else 96)
        elif name.endswith(("kv_heads", "key_value_heads")):
            _change(config, name, lambda value: 1 if value == 1 else 4 if value == heads else 2)
        elif name.endswith("attention_heads"):
            _change(config, name, lambda value: 4 if value == heads else 8)
        elif name.endswith("head_dim") and name not in WIDTHS:
            _change(config, name, lambda value: narrow if value == head_dim else 2 * narrow)
    share = narrow / (head_dim or hidden // heads)

    def cut(rope: dict) -> None:
        for name, factors in rope.items():
            if isinstance(factors, list):  # one per frequency, half as many as a head's dimension
                rope[name] = factors[: max(1, round(len(factors) * share))]

    _change_ropes(config, cut)


def _shallow(config: PreTrainedConfig, depth: int) -> None:
    """Keeps ``depth`` layers, which include all kinds."""
    n_layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(n_layers, int):
        return
    lists = _per_layer(config, n_layers)
    first = _first_of_kinds(lists)[:depth]
    others = [layer for layer in range(n_layers) if layer not in first]
    chosen = sorted([*first, *others[: max(0, depth - len(first))]])
    config.num_hidden_layers = len(chosen)
    for name, values in lists.items():
        setattr(config, name, [values[layer] for layer in chosen])
    _at_most(config, "num_kv_shared_layers", len(chosen) // 2)


def _per_layer(config: PreTrainedConfig, n_layers: int) -> dict[str, list]:
    return {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == n_layers and not name.endswith(TOKEN_NAMES)
    }


def _first_of_kinds(lists: dict[str, list]) -> list[int]:
    """The first layer of each kind; the per-layer lists distinguish the kinds."""
    kinds: dict[str, int] = {}
    for layer, kind in enumerate(zip(*lists.values(), strict=True)):
        kinds.setdefault(repr(kind), layer)
    return list(kinds.values())


def _shorten(config: PreTrainedConfig) -> None:
    """Sets a small vocabulary that includes all special tokens, and lengths: a dozen tokens exceed any window and fit
    the context."""
    for name in _names(config):
        if name.startswith("vocab_size"):
            _at_most(config, name, VOCAB_SIZE)
        elif name.endswith(TOKEN_NAMES):
            _change(config, name, lambda token: token % VOCAB_SIZE)
        elif LENGTHS.search(name) and not COUNTS.search(name):
            _at_most(config, name, LENGTH)
        elif name == "max_position_embeddings":
            _change(config, name, lambda value: max(value, CONTEXT))

    def shorten(rope: dict) -> None:
        if original := rope.get("original_max_position_embeddings"):
            limits_rows = rope.get("rope_type") == "longrope"
            rope["original_max_position_embeddings"] = max(original, CONTEXT) if limits_rows else LENGTH

    _change_ropes(config, shorten)


def _names(config: PreTrainedConfig) -> list[str]:
    return [*vars(config), *config.attribute_map]


def _at_most(config: PreTrainedConfig, name: str, most: int) -> None:
    _change(config, name, lambda value: min(value, most))


def _change(config: PreTrainedConfig, name: str, change: Callable[[int], int]) -> None:
    """Changes the number, or each number in the list, called ``name``, if the config has one."""

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, int) and not isinstance(value, bool) else value

    value = getattr(config, name, None)
    new = [changed(part) for part in value] if isinstance(value, list) else changed(value)
    if new != value:
        setattr(config, name, new)


def _change_ropes(config: PreTrainedConfig, change: Callable[[dict], None]) -> None:
    """Changes rope parameters in place; they may be one dictionary per type of layer."""
    ropes = getattr(config, "rope_parameters", None)
    if isinstance(ropes, dict):
        for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
            change(rope)
