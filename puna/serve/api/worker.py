"""The one thread that runs the model; requests wait for it in the order they came."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor

from puna.engine.generator import Generator
from puna.engine.params import SamplingParams
from puna.engine.row import Delta


class Worker:
    """Runs a Generator beside the event loop, one request at a time."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self._thread = ThreadPoolExecutor(1, "model")
        self._closing = threading.Event()

    async def stream(self, prompts: Sequence[list[int]], n: int, params: SamplingParams) -> AsyncGenerator[Delta, None]:
        """Tokens as they are drawn. Closing it ends the work before the next token, or before its turn came."""
        loop, left = asyncio.get_running_loop(), threading.Event()
        inbox: asyncio.Queue[Delta | asyncio.Future[None]] = asyncio.Queue()

        def work() -> None:
            for delta in self.generator.stream(prompts, n, params):
                if left.is_set() or self._closing.is_set():
                    return
                loop.call_soon_threadsafe(inbox.put_nowait, delta)

        working = loop.run_in_executor(self._thread, work)
        working.add_done_callback(inbox.put_nowait)
        try:
            while isinstance(item := await inbox.get(), Delta):
                yield item
            item.result()
        finally:
            left.set()
            working.cancel()

    def close(self) -> None:
        """Ends the request in hand, drops those that wait, and joins the thread."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)
