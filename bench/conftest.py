"""pytest configuration: pytest-benchmark's description of the machine, without hosts, users and branches."""

import pytest

from bench.common.machine import machine


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config):
    return machine()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_commit_info(config):
    return {}
