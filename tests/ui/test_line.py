import threading

import pytest

from retour.errors import RetourError
from retour.ui.line import Line
from retour.ui.rooms import HISTORY, Room, Rooms
from retour.ui.work import Stopped


@pytest.fixture
def line():
    found = Line(longest=2)
    yield found
    found.close()


class Gate:
    """Work that waits to be let through."""

    def __init__(self, name="x"):
        self.name, self.started, self.open = name, threading.Event(), threading.Event()

    def __call__(self, ticket):
        self.started.set()
        while not self.open.wait(0.01):
            ticket.token.check()
        return self.name


def test_jobs_run_one_at_a_time_in_their_order(line):
    gate, order = Gate(), []
    first = line.join(gate)
    gate.started.wait(5)
    others = [line.join(lambda t, k=k: order.append(k)) for k in range(2)]
    assert [t.ahead for t in (first, *others)] == [0, 1, 2]
    assert not order
    gate.open.set()
    assert first.result() == "x"
    others[1].result()
    assert order == [0, 1] and others[1].ahead == 0


def test_a_full_line_refuses_in_one_sentence(line):
    gate = Gate()
    line.join(gate)
    gate.started.wait(5)
    line.join(Gate())
    line.join(Gate())
    with pytest.raises(RetourError, match="queue of 2 is full: try again"):
        line.join(Gate())
    assert [t.ahead for t in line._waiting] == [1, 2]


def test_a_line_without_waiting_room_still_serves():
    line = Line(longest=0)
    gate = Gate()
    first = line.join(gate)
    gate.started.wait(5)
    with pytest.raises(RetourError):
        line.join(Gate())
    gate.open.set()
    assert first.result() == "x"
    line.close()


def test_cancel_while_waiting_and_while_running(line):
    gate, never = Gate(), Gate()
    running, waiting, last = line.join(gate), line.join(never), line.join(lambda t: "last")
    gate.started.wait(5)
    waiting.cancel()
    assert waiting.done and last.ahead == 1
    with pytest.raises(Stopped):
        waiting.result()
    running.cancel()
    with pytest.raises(Stopped):
        running.result()
    assert last.result() == "last" and not never.started.is_set()


def test_one_failure_does_not_stop_the_line(line):
    def broken(ticket):
        raise ZeroDivisionError

    failed, fine = line.join(broken), line.join(lambda t: 7)
    with pytest.raises(ZeroDivisionError):
        failed.result()
    assert fine.result() == 7


def test_followers_hear_the_news_and_the_end(line):
    gate = Gate()

    def work(ticket):
        ticket.tell("one")
        gate(ticket)
        ticket.tell("two")

    ticket = line.join(work)
    heard = []
    for item in ticket.follow(every=0.05):
        heard.append(item)
        gate.open.set()
    said = [h for h in heard if h is not None]
    assert said[0] == "one" and said[-1] == "two"


def test_closing_stops_everything():
    line = Line(longest=3)
    gates = [Gate(), Gate()]
    tickets = [line.join(gate) for gate in gates]
    gates[0].started.wait(5)
    line.close()
    assert all(t.done for t in tickets) and not line._thread.is_alive()
    with pytest.raises(RetourError, match="closing"):
        line.join(Gate())


# --- Rooms ---


def test_rooms_are_apart_and_bounded():
    rooms = Rooms(most=3)
    a = rooms.enter("a")
    a.name = "mine"
    assert rooms.enter("b").name == "" and rooms.enter("a") is a
    for name in "cde":
        rooms.enter(name)
    assert len(rooms) == 3 and rooms.enter("b") is not a


def test_idle_rooms_go_busy_ones_stay(line):
    rooms = Rooms(most=1, idle=0.0)
    busy = rooms.enter("busy")
    gate = Gate()
    busy.begin(line, gate)
    rooms.enter("new")
    assert rooms.enter("busy") is busy
    rooms.leave("busy")
    with pytest.raises(Stopped):
        busy.ticket.result()
    rooms.leave("nobody")


def test_a_visitor_has_one_job_at_a_time(line):
    room, gate = Room(), Gate()
    room.begin(line, gate)
    with pytest.raises(RetourError, match="still at work"):
        room.begin(line, gate)
    gate.open.set()
    room.ticket.result()
    assert room.begin(line, lambda t: 3).result() == 3


def test_history_is_bounded_and_numbered():
    room = Room()
    for _ in range(HISTORY + 3):
        last = room.keep(None, None, None, 0.0)
    assert last.number == HISTORY + 3 and len(room.history) == HISTORY
    assert room.find(last.number) is last
    with pytest.raises(RetourError, match="no longer kept"):
        room.find(1)


@pytest.mark.parametrize("session", [None, ""])
def test_no_session_no_room(session):
    with pytest.raises(RetourError, match="browser"):
        Rooms().enter(session)
