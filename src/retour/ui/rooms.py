"""What belongs to one visitor, and to nobody else: a picture, a job, a history."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

from ..errors import RetourError
from .line import Line, Ticket
from .work import Made

HISTORY = 12
MOST_ROOMS = 64
IDLE_SECONDS = 3600.0


@dataclass(frozen=True)
class Entry:
    """One result of a visitor's history.

    Attributes:
        number: counts from 1.
        made: the pictures.
        picture: what went in, at its own size.
        mask: the mask that went in.
        seconds: from the click to the picture.
    """

    number: int
    made: Made
    picture: Image.Image
    mask: Image.Image | None
    seconds: float


@dataclass
class Room:
    """One visitor's things.

    Attributes:
        picture: the picture to edit.
        name: its file name.
        given: the size that it came with, where it was reduced.
        history: the latest results, newest last.
        shown: the result that the visitor looks at.
        ticket: the job that waits or runs.
    """

    picture: Image.Image | None = None
    name: str = ""
    given: tuple[int, int] | None = None
    history: deque[Entry] = field(default_factory=lambda: deque(maxlen=HISTORY))
    shown: Entry | None = None
    ticket: Ticket | None = None
    made: int = 0
    touched: float = field(default_factory=time.monotonic)

    @property
    def busy(self) -> bool:
        """Whether a job of this visitor waits or runs."""
        return self.ticket is not None and not self.ticket.done

    def begin(self, line: Line, work: Callable[[Ticket], object]) -> Ticket:
        """Put a job in the line: one at a time for each visitor."""
        if self.busy:
            raise RetourError("your last job is still at work: wait for it or cancel it")
        self.ticket = line.join(work)
        return self.ticket

    def keep(
        self, made: Made, picture: Image.Image, mask: Image.Image | None, seconds: float
    ) -> Entry:
        """Add a result to the history."""
        self.made += 1
        entry = Entry(self.made, made, picture, mask, seconds)
        self.history.append(entry)
        self.shown = entry
        return entry

    def bring(self, picture: Image.Image, name: str, given: tuple[int, int] | None = None) -> None:
        """Put another picture to edit in place of the last one, which no result is shown of."""
        self.picture, self.name, self.given, self.shown = picture, name, given, None

    def find(self, number: int) -> Entry:
        """A result of the history."""
        for entry in self.history:
            if entry.number == number:
                return entry
        raise RetourError(f"result {number} is no longer kept: only the last {HISTORY} are")

    def close(self) -> None:
        """Stop its job."""
        if self.ticket is not None:
            self.ticket.cancel()


class Rooms:
    """The rooms of all visitors, by their session; bounded, the longest idle ones go first."""

    def __init__(self, most: int = MOST_ROOMS, idle: float = IDLE_SECONDS):
        self.most, self.idle = most, idle
        self._rooms: OrderedDict[str, Room] = OrderedDict()
        self._lock = threading.Lock()

    def enter(self, session: str | None) -> Room:
        """The room of a session, made when it first comes."""
        if not session:
            raise RetourError("this page works in a browser: open its address there")
        with self._lock:
            room = self._rooms.pop(session, None) or Room()
            self._rooms[session] = room
            room.touched = time.monotonic()
            gone = self._pick_idle(session)
        for old in gone:
            old.close()
        return room

    def leave(self, session: str | None) -> None:
        """Forget a session; its job stops."""
        with self._lock:
            room = self._rooms.pop(session or "", None)
        if room is not None:
            room.close()

    def __len__(self) -> int:
        return len(self._rooms)

    def _pick_idle(self, entering: str) -> list[Room]:
        now = time.monotonic()
        free = [k for k, r in self._rooms.items() if k != entering and not r.busy]
        old = [k for k in free if now - self._rooms[k].touched > self.idle]
        over = len(self._rooms) - len(old) - self.most
        old += [k for k in free if k not in old][: max(0, over)]
        return [self._rooms.pop(k) for k in old]
