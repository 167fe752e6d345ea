"""pytest-benchmark or its stand-in; a description of the machine without names of hosts, users and branches."""

import pytest

from bench import plain_benchmark
from bench.loss.measure import machine


def pytest_addoption(parser, pluginmanager):
    if not pluginmanager.hasplugin("benchmark"):
        pluginmanager.register(plain_benchmark)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config):
    return machine()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_commit_info(config):
    return {}
