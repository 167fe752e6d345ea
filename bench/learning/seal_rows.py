"""The data of the SmolLM2 record, from Seal-Tools' rows and BFCL's: four JSONL files in a folder.

    python -m bench.learning.seal_rows seal-tools-train.jsonl data/

rl.jsonl             96 one-call rows whose tool some other row demonstrates: what RL trains on
cold.jsonl           the other one-call rows: what the cold start imitates
demonstrations.jsonl all other rows: what demonstrations are taken from
bfcl.jsonl           200 rows of BFCL's simple_python and multiple: what is evaluated on, and no run trains on

The rows are any that ``toolx train --dataset`` reads; the draw is fixed.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from toolx_kernels.toolcall import DemonstrationIndex, Row, read_dataset

RL_ROWS = 96
EVAL_ROWS = {"simple_python": 133, "multiple": 67}  # in proportion to the categories' sizes


def demonstrated(row: Row, index: DemonstrationIndex) -> bool:
    """Whether some other row demonstrates the tool that the row's answer calls."""
    only_its_own = [tool for tool in row.tools if tool["function"]["name"] == row.answer[0]["name"]]
    alone = Row(row.id, row.prompt, only_its_own, row.answer, row.columns)
    return bool(index.choose(alone, random.Random(0)))


def write(path: Path, rows: Iterable[Row]) -> None:
    lines = [
        {"id": row.id, "prompt": row.prompt, "tools": row.tools, "answer": row.answer, **row.columns} for row in rows
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


def main(source: str, folder: str) -> None:
    rows = read_dataset(source)
    index = DemonstrationIndex(rows)
    one_call = [row for row in rows if len(row.answer) == 1]
    fit = [row for row in one_call if demonstrated(row, index)]
    chosen = {row.id for row in random.Random("rl").sample(fit, RL_ROWS)}
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "rl.jsonl", (row for row in one_call if row.id in chosen))
    write(out / "cold.jsonl", (row for row in one_call if row.id not in chosen))
    write(out / "demonstrations.jsonl", (row for row in rows if row.id not in chosen))
    bfcl = []
    for category, count in EVAL_ROWS.items():
        of_category = read_dataset(f"bfcl:{category}")
        places = sorted(random.Random(category).sample(range(len(of_category)), count))
        bfcl += [of_category[place] for place in places]
    write(out / "bfcl.jsonl", bfcl)


if __name__ == "__main__":
    main(*sys.argv[1:])
