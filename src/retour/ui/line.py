"""The line before a device: one job at a time, first come first served, and no more than fit."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import RetourError
from .work import Stopped, Token

logger = logging.getLogger(__name__)


class Ticket:
    """A place in the line, and what came of it.

    Attributes:
        token: stops the job, wherever it is.
    """

    def __init__(self, line: Line, work: Callable[[Ticket], Any], token: Token):
        self.token = token
        self._line, self._work = line, work
        self._news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    @property
    def ahead(self) -> int:
        """Jobs before it, the running one included; 0 once it runs or has ended."""
        return self._line.ahead(self)

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._done.is_set()

    def tell(self, news: Any) -> None:
        """Pass news of the work to whoever follows it."""
        self._news.put(news)

    def cancel(self) -> None:
        """Stop it: at once if it waits, before its next network call if it runs."""
        self.token.cancel()
        self._line.forget(self)

    def follow(self, every: float = 0.5) -> Iterator[Any]:
        """Yield news as they come, None where there are none for `every` seconds, until it ends.

        Only the newest of what came meanwhile is yielded.
        """
        while not self.done or not self._news.empty():
            try:
                news = self._news.get(timeout=every)
                while not self._news.empty():
                    newer = self._news.get()
                    news = newer if newer is not None else news
                yield news
            except queue.Empty:
                yield None

    def result(self) -> Any:
        """What the work returned, waited for.

        Raises:
            Stopped: it was cancelled.
            BaseException: whatever the work raised.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self.token.check()
            self._end(self._work(self), None)
        except (RetourError, Stopped) as error:
            self._end(None, error)
        except BaseException as error:  # the worker must outlive whatever a method raises
            logger.exception("a job failed")
            self._end(None, error)

    def _end(self, result: Any, error: BaseException | None) -> None:
        self._result, self._error = result, error
        self._done.set()
        self._news.put(None)


class Line:
    """Jobs of one device, run by one thread in the order that they came in.

    Args:
        longest: how many may wait behind the running one.
        seconds: how long a job may run.
    """

    def __init__(self, longest: int = 8, seconds: float | None = None):
        self.longest, self.seconds = longest, seconds
        self._waiting: list[Ticket] = []
        self._running: Ticket | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="retour-line", daemon=True)
        self._thread.start()

    def join(self, work: Callable[[Ticket], Any]) -> Ticket:
        """Take a place for `work`, which is called with its ticket when its turn comes.

        Raises:
            RetourError: the line is full.
        """
        ticket = Ticket(self, work, Token(self.seconds))
        with self._changed:
            if self._closed:
                raise RetourError("the page is closing: start it again with `retour ui`")
            if len(self._waiting) + (self._running is not None) > self.longest:
                raise RetourError(
                    f"the server is busy and its queue of {self.longest} is full: try again in a "
                    "minute"
                )
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def ahead(self, ticket: Ticket) -> int:
        """Jobs before a ticket's."""
        with self._changed:
            if ticket not in self._waiting:
                return 0
            return self._waiting.index(ticket) + (self._running is not None)

    def forget(self, ticket: Ticket) -> None:
        """Take a waiting ticket out of the line; a running one is left to its token."""
        with self._changed:
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
        ticket._end(None, Stopped("stopped"))

    def close(self, seconds: float = 10.0) -> None:
        """Stop everything, and wait for the thread."""
        with self._changed:
            self._closed = True
            left = [*self._waiting, *([self._running] if self._running else [])]
            self._changed.notify_all()
        for ticket in left:
            ticket.cancel()
        self._thread.join(seconds)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._running = self._waiting.pop(0)
            self._running._run()
            with self._changed:
                self._running = None
