"""The reader's folder."""

import json
from functools import cache

import pytest

from tests.docs.reader import Reader
from toolx_kernels.cli.commands import main

TOY = [
    "--train_rows", "4", "--eval_rows", "2", "--prompts_per_step", "2", "--num_generations", "2", "--max_steps", "1",
    "--max_completion_length", "8", "--cold_start_steps", "0", "--probe_rollouts", "1", "--config", "grpo",
]  # fmt: skip
CITIES = "Rome Oslo Bern Lima Kiev Riga Doha Baku Cork Pisa Nara Mali".split()


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """Makes the folder of a small run, with a KL term and two updates a step, when it is first asked for."""

    @cache
    def run():
        folder = tmp_path_factory.mktemp("docs") / "run"
        assert main(["train", *TOY, "--output_dir", str(folder)]) == 0
        return folder

    return run


@pytest.fixture
def reader(toy_run, tmp_path, monkeypatch):
    tool = {"name": "find_hotel", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    rows = [
        {
            "prompt": f"find the hotel in {city}",
            "tools": [tool],
            "answer": [{"name": "find_hotel", "arguments": {"city": city}}],
        }
        for city in CITIES
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return Reader(toy_run)
