"""Virtual time: an asyncio event loop that jumps to the next timer instead of waiting for it.

It is asyncio's own `BaseEventLoop`, with its C tasks and futures; only the queue of what is due is its own, in the same
order that asyncio has: what is ready first, then timers by their time, and those of one moment as they were set. So a
virtual minute costs what its callbacks cost, and little beside.

What would bring the outside in is replaced or refused:

- work for threads is done on the spot, once, at a moment within a virtual duration that `delays` draws; nobody can
  cancel it, as nobody can cancel a thread;
- connections and servers are those of `network`;
- tasks have a hash of their own that counts, since asyncio keeps them in sets, and sets of things that are hashed by
  address are walked in another order in every process;
- a loop without anything to do for ever raises `StuckError` instead of waiting for ever.

Ready-made loops were looked at. looptime skips time over a real loop, so threads and sockets stay real.
async-solipsism has sockets of its own but neither TLS, nor threads' time, nor machines that die, and its licence is the
GPL. detangle explores schedules, with a loop and a network written anew: a good tool for races in small code, but its
tasks are not C, it has no notion of a process that is killed with its files left behind, and a minute of this product
takes it seconds. What is needed of a loop here is this page; the world around it is the work.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from asyncio import base_events
from collections.abc import Callable, Coroutine
from heapq import heappop, heappush
from typing import Any, Final, Protocol

#: A thread's work takes so long at least, in virtual seconds: nothing comes back in the same instant.
_LEAST_SECONDS: Final = 1e-5
#: So does every round of the loop; else whoever waits for a moment less than rounding away would wait for ever.
ROUND_SECONDS: Final = 1e-9
#: How many tasks a loop remembers before it looks which of them are done.
_MOST_TASKS: Final = 2000


class StuckError(Exception):
    """Nothing will ever happen again, and somebody still waits."""


class Network(Protocol):
    """Where connections come from."""

    async def connect(
        self, factory: Callable[[], asyncio.BaseProtocol], host: str, port: int, **options: Any
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]: ...

    async def listen(
        self, factory: Callable[[], asyncio.BaseProtocol], host: str, port: int, **options: Any
    ) -> Any: ...


class CountedTask(asyncio.Task):  # type: ignore[type-arg]
    """A task whose hash is how many there were before it. `context` is the one that it runs in, or was made in."""

    _made = 0

    def __init__(self, coroutine: Any, **options: Any) -> None:
        self._number = CountedTask._made
        CountedTask._made += 1
        context = options.get("context")
        self.context: contextvars.Context = contextvars.copy_context() if context is None else context
        super().__init__(coroutine, loop=options["loop"], name=options.get("name"), context=self.context)
        options["loop"].tasks.append(self)

    def __hash__(self) -> int:
        return self._number


class _Handle(asyncio.Handle):
    """asyncio's, made without asking whether somebody debugs: there are a hundred thousand of them in a minute."""

    __slots__ = ()

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context | None,
    ) -> None:
        self._context = contextvars.copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = self._source_traceback = None


class _Timer(_Handle):
    """A handle that becomes ready at a moment."""

    __slots__ = ("_when",)
    _when: float

    def when(self) -> float:
        """The moment, in the loop's time."""
        return self._when


class VirtualLoop(base_events.BaseEventLoop):
    """See the module.

    Args:
        randomness: draws how long threads take.
    """

    def __init__(self, randomness: random.Random) -> None:
        super().__init__()
        self._now = 0.0
        self._timers: list[tuple[float, int, _Timer]] = []  # a heap
        self._set = 0  # timers, ever: of one moment, the one that was set first goes off first
        self._randomness = randomness
        self.network: Network | None = None
        #: Virtual seconds that a thread's work takes; replaced by whoever has slow disks.
        self.delays: Callable[[], float] = lambda: randomness.expovariate(1 / 0.0005)
        #: What went wrong in callbacks, where asyncio would only log it.
        self.failures: list[dict[str, Any]] = []
        self._left: list[Any] = []
        #: Every task that may still be under way. asyncio knows them too, in a set that is slow to walk.
        self.tasks: list[CountedTask] = []
        self.set_task_factory(_task)  # type: ignore[arg-type]
        self.set_exception_handler(lambda _, context: self.failures.append(context))

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        timer = _Timer(callback, args, self, context)
        timer._when = when
        self._set += 1
        heappush(self._timers, (when, self._set, timer))
        return timer

    def _run_once(self) -> None:
        """Everything that is ready now; if nothing is, what comes next becomes it."""
        ready, timers = self._ready, self._timers  # type: ignore[attr-defined]
        self._now += ROUND_SECONDS
        while timers and timers[0][2].cancelled():
            heappop(timers)
        if not ready:
            if not timers:
                raise StuckError("nothing is due, and nothing else can happen")
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            ready.append(heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Do it at a moment drawn, and answer at a later one."""
        future = self.create_future()
        duration = _LEAST_SECONDS + self.delays()
        begins = duration * self._randomness.random()
        self.call_later(begins, _work, future, func, args, self, self.time() + duration)
        return future

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    async def create_connection(
        self, protocol_factory: Callable[[], asyncio.BaseProtocol], host: Any = None, port: Any = None, **options: Any
    ) -> Any:
        assert self.network is not None, "this loop has no network"
        return await self.network.connect(protocol_factory, host, port, **options)

    async def create_server(
        self, protocol_factory: Callable[[], asyncio.BaseProtocol], host: Any = None, port: Any = None, **options: Any
    ) -> Any:
        assert self.network is not None, "this loop has no network"
        return await self.network.listen(protocol_factory, host, port, **options)

    def forget(self, belongs: Callable[[contextvars.Context], bool]) -> None:
        """Cancel every callback whose context `belongs` to what died."""
        for handle in [*self._ready, *(timer for _, _, timer in self._timers)]:  # type: ignore[attr-defined]
            if not handle.cancelled() and belongs(handle._context):
                handle.cancel()

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        """What a dead process leaves half done stays so."""
        self._left.append(agen)

    def _timer_handle_cancelled(self, handle: Any) -> None:
        """It is passed over when its time comes."""

    def _write_to_self(self) -> None:
        """There is nobody to be woken."""


def _task(loop: VirtualLoop, coroutine: Coroutine[Any, Any, Any], **options: Any) -> CountedTask:
    if len(loop.tasks) > _MOST_TASKS:
        loop.tasks = [task for task in loop.tasks if not task.done()]
    return CountedTask(coroutine, loop=loop, **options)


def _work(
    future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...], loop: VirtualLoop, ends: float
) -> None:
    result: Any = None
    error: Exception | None = None
    try:
        result = func(*args)
    except Exception as raised:  # whatever it is, it is the caller's
        error = raised
    loop.call_at(ends, _answer, future, result, error)


def _answer(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():  # cancelled; the work was done all the same
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
