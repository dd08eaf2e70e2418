"""Where what pyfuse3 writes goes, with sockets in the place of devices."""

import os
import socket
from collections.abc import Iterator

import pytest

from fsdriver.seat import Seat

Pair = tuple[socket.socket, socket.socket]


def pair() -> Pair:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setblocking(False)
    return ours, theirs


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """The channel's socket and two devices: our end, and the other."""
    made = [pair() for _ in range(3)]
    yield made
    for both in made:
        for end in both:
            end.close()


@pytest.fixture
def fd(pairs: list[Pair]) -> int:
    """What pyfuse3 has."""
    return pairs[0][1].fileno()


@pytest.fixture
def seat(fd: int) -> Iterator[Seat]:
    made = Seat(fd)
    yield made
    made.close()


def read_request(pairs: list[Pair], seat: Seat, fd: int, device: int, words: bytes) -> None:
    """Does what the channel and then pyfuse3 do with a request."""
    pairs[0][0].send(words)
    seat.put(pairs[device][1].fileno(), answered=True)
    assert os.read(fd, 100) == words


def test_an_answer_goes_to_the_device_of_its_request(pairs: list[Pair], seat: Seat, fd: int):
    for device in (1, 2, 2, 1):
        read_request(pairs, seat, fd, device, b"request")
        answering = seat.begin()
        seat.end(answering)
        os.write(fd, b"answer %d" % device)
        assert pairs[device][0].recv(100) == b"answer %d" % device
    assert not os.get_inheritable(fd)


def test_answers_in_another_order(pairs: list[Pair], seat: Seat, fd: int):
    read_request(pairs, seat, fd, 1, b"first")
    first = seat.begin()
    read_request(pairs, seat, fd, 2, b"second")
    second = seat.begin()
    seat.end(second)
    os.write(fd, b"to the second")
    seat.end(first)
    os.write(fd, b"to the first")
    assert pairs[1][0].recv(100) == b"to the first"
    assert pairs[2][0].recv(100) == b"to the second"


def test_what_no_handler_answers_stays_in_the_socket(pairs: list[Pair], seat: Seat, fd: int):
    read_request(pairs, seat, fd, 1, b"request")
    seat.end(seat.begin())
    read_request(pairs, seat, fd, 1, b"unknown")
    assert seat.unanswered
    os.write(fd, b"no such request")
    assert pairs[0][0].recv(100) == b"no such request"
    with pytest.raises(BlockingIOError):
        pairs[1][0].recv(100)
