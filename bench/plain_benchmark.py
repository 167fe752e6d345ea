"""A stand-in for pytest-benchmark where it is not installed: ``make gpu`` has pytest alone.

Only what the benchmarks here use: the ``benchmark`` fixture with ``pedantic`` and ``extra_info``, and
``--benchmark-json``, in pytest-benchmark's layout.
"""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import pytest

from bench.loss.measure import machine

RECORDS = pytest.StashKey[list]()


class PlainBenchmark:
    def __init__(self):
        self.extra_info, self.times = {}, []

    def __call__(self, function, *args, **kwargs):
        return self.pedantic(function, args, kwargs, rounds=5)

    def pedantic(self, target, args=(), kwargs=None, setup=None, rounds=1, iterations=1):
        kwargs = kwargs or {}
        for _ in range(rounds):
            if setup is not None:
                args, kwargs = setup()
            start = time.perf_counter()
            for _ in range(iterations):
                result = target(*args, **kwargs)
            self.times.append((time.perf_counter() - start) / iterations)
        return result


def pytest_addoption(parser):
    parser.addoption("--benchmark-json", type=Path, metavar="FILE", help="write the measurements there")


def pytest_configure(config):
    config.stash[RECORDS] = []


@pytest.fixture
def benchmark(request):
    fixture = PlainBenchmark()
    yield fixture
    if fixture.times:
        request.config.stash[RECORDS].append(
            {
                "name": request.node.name,
                "stats": {"median": median(fixture.times), "data": fixture.times},
                "extra_info": fixture.extra_info,
            }
        )


def pytest_sessionfinish(session):
    if path := session.config.getoption("--benchmark-json"):
        now = datetime.now(timezone.utc).isoformat()
        record = {"machine_info": machine(), "datetime": now, "benchmarks": session.config.stash[RECORDS]}
        path.write_text(json.dumps(record, indent=1) + "\n")
