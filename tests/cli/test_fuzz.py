"""Flags of ``toolx train`` with any words; ``make soak`` tries many more."""

import pytest

from tests.cli.fuzz_settings import FUZZER
from tests.fuzzing import fuzz
from toolx_kernels.cli.train import parse_train
from toolx_kernels.errors import InputError
from toolx_kernels.train.config import ToolExpanderConfig

CASES = 250


def test_flags_are_taken_or_refused():
    counts = fuzz(FUZZER, CASES)
    assert counts["taken"] > CASES / 8 and counts["refused"] > CASES / 2


def test_settings_nested_too_deep_are_refused(tmp_path):
    deep: dict = {}
    for _ in range(1200):
        deep = {"a": deep}
    (tmp_path / "deep.yaml").write_text(f"seed: {'[' * 1200}")
    with pytest.raises(InputError, match="^chat_template_kwargs=.* must be a JSON object"):
        parse_train(["--chat_template_kwargs", "[" * 1200])
    with pytest.raises(InputError, match="^chat_template_kwargs=a value nested hundreds deep must be a JSON object"):
        ToolExpanderConfig(chat_template_kwargs=deep)
    with pytest.raises(InputError, match="deep.yaml.* is not YAML .*recursion"):
        parse_train(["--config", str(tmp_path / "deep.yaml")])
