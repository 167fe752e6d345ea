import asyncio
import threading
from concurrent.futures import wait

import pytest

from toolx_kernels.toolcall.background import Background


def test_calls_of_a_start_run_in_order_and_those_cancelled_before_their_turn_do_not():
    background, gate, seen = Background("test"), threading.Event(), []

    def fail():
        raise SystemExit(3)

    calls = [lambda: gate.wait(10), lambda: seen.append(1), fail, lambda: seen.append(3) or "last"]
    futures = background.start(calls)
    assert futures[1].cancel()
    gate.set()
    assert futures[3].result(10) == "last" and seen == [3]
    assert futures[0].result() is True and isinstance(futures[2].exception(), SystemExit)


@pytest.mark.parametrize("error", [SystemExit(2), KeyboardInterrupt("own")])
def test_a_coroutine_that_ends_the_process_ends_only_itself(error):
    """Also in a task of its own, whose error asyncio raises out of its loop."""
    background = Background("test")

    async def leave():
        raise error

    async def leave_in_a_task():
        await asyncio.gather(leave())

    async def stop():
        asyncio.get_running_loop().stop()

    async def answer():
        await asyncio.sleep(0)
        return 7

    for ending in (leave, leave_in_a_task):
        assert background.schedule(ending()).exception(10) is error
        assert background.schedule(answer()).result(10) == 7
    assert background.schedule(stop()).result(10) is None and background.schedule(answer()).result(10) == 7


def test_what_is_still_awaited_is_cancelled_with_the_owner():
    background, begun, ended = Background("test"), threading.Event(), threading.Event()

    async def endless():
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    future = background.schedule(endless())
    assert begun.wait(10)
    del background
    assert ended.wait(10)
    wait([future], 10)
    assert future.cancelled()
