"""Settings: each has help and bounds and belongs to a section; values are checked against types and bounds."""

import math
from collections import OrderedDict
from dataclasses import dataclass, fields
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from typing import get_type_hints

import numpy as np
import pytest
import yaml

from toolx_kernels.engine.types import SamplingParams
from toolx_kernels.errors import InputError
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.models.load import resolve_device
from toolx_kernels.settings import FINITE, NOT_NEGATIVE, POSITIVE, Settings, setting, without_none
from toolx_kernels.train.config import ToolExpanderConfig

KINDS = get_type_hints(ToolExpanderConfig)


@pytest.mark.parametrize("field", fields(ToolExpanderConfig), ids=lambda field: field.name)
def test_every_setting_has_help_and_a_numeric_one_has_bounds_or_says_why_not(field):
    bounds, unbounded = field.metadata["bounds"], field.metadata["unbounded"]
    assert field.metadata["help"]
    numeric = without_none(KINDS[field.name]) in (int, float, list[float])
    assert (bool(bounds) + bool(unbounded)) == numeric, "either bounds, or a reason to have none"
    assert not bounds or field.default is None or bounds.allow(field.default)


@pytest.mark.parametrize("field", fields(ToolExpanderConfig), ids=lambda field: field.name)
def test_no_number_is_unbounded(field):
    """Sizes are refused before anything is allocated by them."""
    kind = without_none(KINDS[field.name])
    values: list = [10**30, -(10**30)] if kind is int else [math.nan, -math.inf, math.inf] if kind is float else []
    if field.name in ("epsilon_high", "delta"):
        values.remove(math.inf)  # it means no clip
    for value in values:
        with pytest.raises(InputError, match=rf"^[^.]*\b{field.name}={value}"):
            ToolExpanderConfig(**{field.name: value})


def test_the_rollouts_of_a_step_are_bounded_together():
    ToolExpanderConfig(num_generations=64, prompts_per_step=1024)
    with pytest.raises(InputError, match="num_generations=65 and prompts_per_step=1024 make 66,560 rollouts per step"):
        ToolExpanderConfig(num_generations=65, prompts_per_step=1024)


def test_every_setting_belongs_to_one_section():
    sections = ToolExpanderConfig.__bases__
    assert all(section.__doc__ and issubclass(section, Settings) for section in sections)
    named = [field.name for section in reversed(sections) for field in fields(section)]
    assert named == [field.name for field in fields(ToolExpanderConfig)] and len(set(named)) == len(named)


def test_a_section_stands_alone():
    for section in ToolExpanderConfig.__bases__:
        assert all(getattr(section(), field.name) == field.default for field in fields(section))


@dataclass
class Small(Settings):
    steps: int = setting(3, "steps", least=1)
    few: int = setting(0, "few", least=0, most=8)
    decay: float = setting(0.0, "decay", bounds=NOT_NEGATIVE)
    weights: list[float] | None = setting(None, "weights", bounds=FINITE)
    rate: float | None = setting(None, "rate", bounds=POSITIVE)


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"steps": 0}, "steps=0 must be at least 1 and at most 1,000,000,000."),
        ({"steps": 10**30}, f"steps={10**30} must be at least 1 and at most 1,000,000,000."),
        ({"steps": 10**5000}, "steps=a number of thousands of digits must be at least 1 and at most 1,000,000,000."),
        ({"few": 9}, "few=9 must be at least 0 and at most 8."),
        ({"steps": 1.0}, "steps=1.0 must be a whole number."),
        ({"steps": True}, "steps=True must be a whole number."),
        ({"steps": None}, "steps=None must be a whole number."),
        ({"steps": "9" * 100}, f"steps='{'9' * 76}... must be a whole number."),
        ({"decay": -1}, "decay=-1.0 must lie in [0, 1e+30]."),
        ({"decay": float("nan")}, "decay=nan must lie in [0, 1e+30]."),
        ({"decay": "inf"}, "decay=inf must lie in [0, 1e+30]."),
        ({"decay": 10**400}, f"decay=1{'0' * 76}... must be a number."),
        ({"rate": "0"}, "rate=0.0 must be positive and finite, from 1e-30 to 1e+30."),
        ({"rate": 1e-300}, "rate=1e-300 must be positive and finite, from 1e-30 to 1e+30."),
        ({"weights": [1, "nan"]}, "weights=nan must be finite, from -1e+30 to 1e+30."),
        ({"rate": "fast"}, "rate='fast' must be a number."),
    ],
)
def test_a_value_that_does_not_fit_is_named(values, sentence):
    with pytest.raises(InputError) as error:
        Small(**values)
    assert str(error.value) == sentence


def test_a_misspelt_setting_is_refused():
    config = ToolExpanderConfig()
    with pytest.raises(AttributeError, match="'num_generation' is not a setting of ToolExpanderConfig"):
        config.num_generation = 3
    with pytest.raises(TypeError):
        ToolExpanderConfig("tiny")  # settings are passed by name only: there are about eighty


def test_values_become_what_the_fields_are():
    small = Small(steps=1, decay=2, rate="5e-4")
    assert (small, type(small.decay)) == (Small(1, decay=2.0, rate=5e-4), float) and Small().rate is None


class Name(str, Enum):  # as strings of a wider program may be; StrEnum and NumPy's str_ are derived from str too
    CHECKED = "retry"


class Fifth(float):
    pass


def test_numbers_texts_and_lists_of_other_libraries_become_pythons_own(tmp_path):
    config = ToolExpanderConfig(
        learning_rate=np.float64(1e-3), temperature=np.float32(0.5), lr_decay=Fifth(0.2), beta=Fraction(1, 4),
        num_generations=np.int64(6), max_completion_length=np.uint8(200), output_dir=tmp_path,
        hard_sampling=Name.CHECKED, dataset=np.str_("rows.jsonl"), reward_weights=(np.float32(1), 2),
        reward_funcs=(tmp_path / "a.py", "b.py:f"), chat_template_kwargs=OrderedDict(a=np.float64(1)),
    )  # fmt: skip
    wanted = {
        "learning_rate": 1e-3, "temperature": 0.5, "lr_decay": 0.2, "beta": 0.25, "num_generations": 6,
        "max_completion_length": 200, "output_dir": str(tmp_path), "hard_sampling": "retry", "dataset": "rows.jsonl",
        "reward_weights": [1.0, 2.0], "reward_funcs": [f"{tmp_path}/a.py", "b.py:f"],
        "chat_template_kwargs": {"a": 1.0},
    }  # fmt: skip
    assert repr({name: getattr(config, name) for name in wanted}) == repr(wanted)
    assert yaml.safe_load(yaml.safe_dump(config.to_dict())) == config.to_dict()  # it knows no other types
    loss = GRPOLossConfig(
        beta=np.float32(0.5), epsilon=Fifth(0.2), loss_type="dr_grpo", max_completion_length=np.int64(7)
    )
    same = GRPOLossConfig(beta=0.5, loss_type="dr_grpo", max_completion_length=7)
    assert (loss, loss.key) == (same, same.key) and "Fifth" not in repr(loss)
    sampling = SamplingParams(np.int64(8), temperature=np.float32(0.5), stop_token_ids=(np.int64(2),))
    assert repr(sampling) == repr(SamplingParams(8, temperature=0.5, stop_token_ids=(2,)))


@pytest.mark.parametrize("wrong", [np.bool_(True), np.array([1.0]), 1j, Decimal(1), b"1", object])
def test_what_is_no_number_stays_refused(wrong):
    for make, name, words in (
        (ToolExpanderConfig, "learning_rate", "a number"),
        (ToolExpanderConfig, "num_generations", "a whole number"),
        (GRPOLossConfig, "beta", "a number"),
        (partial(SamplingParams, max_new_tokens=1), "top_k", "a whole number"),
    ):
        with pytest.raises(InputError, match=rf"^{name}=.* must be {words}\.$"):
            make(**{name: wrong})


@pytest.mark.parametrize("device", ["cuda:\u0663", "cuda:-1", "cuda:256"])  # torch takes 256 for 0
def test_a_device_is_one_that_torch_can_number(device):
    for use in (resolve_device, lambda name: ToolExpanderConfig(device=name)):
        with pytest.raises(InputError, match="is unknown: use auto, cpu, cuda or cuda:<number>"):
            use(device)


def test_the_loss_has_every_setting_that_it_shares_a_name_with():
    shared = {
        "loss_type": "dapo", "epsilon": 0.1, "epsilon_high": None, "delta": 1.5, "beta": 0.01, "temperature": 0.9,
        "importance_sampling_level": "sequence", "importance_sampling_mode": "sequence_mask",
        "importance_sampling_cap": 3.0, "scale_rewards": "batch", "max_completion_length": 7,
    }  # fmt: skip
    assert shared.keys() == {field.name for field in fields(GRPOLossConfig)} & KINDS.keys()
    assert ToolExpanderConfig(**shared, hard_sampling="none").loss == GRPOLossConfig(**shared)
    assert ToolExpanderConfig().loss.importance_sampling_mode == GRPOLossConfig().importance_sampling_mode
