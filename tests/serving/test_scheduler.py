"""The scheduler when its thread ends against all expectation."""

from __future__ import annotations

import asyncio

import pytest
from serving_helpers import EchoEngine

from prlhf_lightning.inference import GenerationRequest
from prlhf_lightning.serving.metrics import Metrics
from prlhf_lightning.serving.scheduler import Closing, EngineFailed, Scheduler


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_ended(monkeypatch):
    engines = iter([EchoEngine()])  # there is no second one

    async def ask(scheduler):
        ticket = await scheduler.submit(GenerationRequest("break", "ann"))
        async for _ in ticket:
            pass

    async def run():
        scheduler = Scheduler(lambda: next(engines), 10, Metrics())
        scheduler.start()

        async def late(asking):
            scheduler._thread.join()  # so that nothing else runs in the loop meanwhile
            monkeypatch.setattr(scheduler._thread, "is_alive", lambda: True)  # as it was a moment ago
            await asking

        asked = ask(scheduler), late(ask(scheduler)), late(scheduler.call(lambda: 1, "ann"))
        async with asyncio.timeout(5):
            answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers] == [EngineFailed] * 3
        for too_late in (ask(scheduler), scheduler.call(lambda: 1)):
            with pytest.raises(Closing):
                await too_late

    asyncio.run(run())


def test_texts_are_written_and_taken_in_while_a_call_goes_on():
    async def run():
        scheduler = Scheduler(EchoEngine, 10, Metrics())
        scheduler.start()
        loop, written = asyncio.get_running_loop(), asyncio.Event()

        def call():
            """Return once somebody's text has been written, which was asked for after this call began."""
            loop.call_soon_threadsafe(begun.set)
            while not written.is_set():
                scheduler.go_on()
            return "done"

        begun = asyncio.Event()
        called = asyncio.create_task(scheduler.call(call, "ann"))
        await begun.wait()
        second = asyncio.create_task(scheduler.call(lambda: "second", "bob"))
        async with asyncio.timeout(5):
            ticket = await scheduler.submit(GenerationRequest("hello", "cy"))
            assert [piece async for piece in ticket]
            assert not called.done()
            assert not second.done()  # calls wait for one another
            written.set()
            assert await asyncio.gather(called, second) == ["done", "second"]
        await scheduler.drain()

    asyncio.run(run())
