"""What storage holds of a stream, by the headers of the segments that were written: up to the first hole."""

from __future__ import annotations

import os
import uuid

import pytest

from replicar.formats.cipher import Position
from replicar.formats.frame import ANEW_STEP
from replicar.formats.logblob import BlobName
from replicar.formats.segment import SegmentHeader
from simulator.world.ledger import Ledger

MACHINE = uuid.UUID(int=1, version=4)


class Writer:
    """One run of a machine's log: a process server's, between two starts."""

    def __init__(self, ledger: Ledger, run: int) -> None:
        self._ledger, self._run, self._offset = ledger, run, 0

    def segment(self, number: int, first: int, last: int) -> None:
        position = Position(MACHINE, 1, self._run, number, first, last)
        header = SegmentHeader(position, 0, 0, 4096, 4096, 1, 100, 100, 512, 1, os.urandom(32), bytes(32))
        self._offset += 4096
        data = header.pack()
        self._ledger.wrote(str(BlobName(MACHINE, 1, self._run, 0)), self._offset, bytes(len(data)), data)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_what_lies_behind_a_hole_is_not_reached_until_the_hole_is_filled(ledger: Ledger) -> None:
    writer = Writer(ledger, 1)
    writer.segment(1, 1, 10)
    writer.segment(3, 21, 30)
    assert ledger.stored_until(MACHINE) == 10
    writer.segment(2, 11, 20)
    assert ledger.stored_until(MACHINE) == 30
    assert ledger.violations == []


def test_what_a_dead_writer_had_behind_a_hole_holds_up_no_later_one(ledger: Ledger) -> None:
    dead, alive = Writer(ledger, 1), Writer(ledger, 2)
    dead.segment(1, 1, 10)
    dead.segment(3, 21, 30)
    alive.segment(2, ANEW_STEP + 1, ANEW_STEP + 8)  # the machine's log was lost meanwhile
    assert ledger.stored_until(MACHINE) == ANEW_STEP + 8


def test_a_later_writer_with_a_hole_of_its_own_reaches_nothing_behind_it(ledger: Ledger) -> None:
    dead, alive = Writer(ledger, 1), Writer(ledger, 2)
    dead.segment(1, 1, 10)
    alive.segment(3, 21, 30)
    assert ledger.stored_until(MACHINE) == 10


def test_numbers_may_be_left_out_only_where_a_log_begins_anew(ledger: Ledger) -> None:
    writer = Writer(ledger, 1)
    writer.segment(1, 1, 10)
    writer.segment(2, 12, 20)
    assert ledger.stored_until(MACHINE) == 10
