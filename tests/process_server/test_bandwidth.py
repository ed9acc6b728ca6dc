"""Working hours, clocks that change, and the mean that comes of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

import pytest

from process_server.bandwidth import Pace, Schedule, Window

BERLIN = ZoneInfo("Europe/Berlin")
WEEK = frozenset(range(5))
OFFICE = Schedule(None, (Window(WEEK, 8 * 60, 18 * 60, 1_000_000),))
NIGHT = Schedule(5_000_000, (Window(frozenset({4}), 22 * 60, 6 * 60, None),))
EARLY = Schedule(None, (Window(frozenset(range(7)), 2 * 60, 3 * 60, 70_000),))


class SetClock:
    """A clock that goes on only when it is told to."""

    def __init__(self, moment: datetime) -> None:
        self.moment, self.seconds = moment, 0.0

    def now_ns(self) -> int:
        return int(self.moment.timestamp() * 10**9)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.go(seconds)

    def go(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)
        self.seconds += seconds


@pytest.mark.parametrize(
    ("schedule", "local", "rate"),
    [
        (OFFICE, "2026-11-23 07:59", None),  # a Monday
        (OFFICE, "2026-11-23 08:00", 1_000_000),
        (OFFICE, "2026-11-23 17:59", 1_000_000),
        (OFFICE, "2026-11-23 18:00", None),
        (OFFICE, "2026-11-28 12:00", None),  # a Saturday
        (NIGHT, "2026-11-27 21:59", 5_000_000),  # a Friday
        (NIGHT, "2026-11-27 22:00", None),
        (NIGHT, "2026-11-28 05:59", None),  # still Friday's night
        (NIGHT, "2026-11-28 06:00", 5_000_000),
        (NIGHT, "2026-11-28 22:00", 5_000_000),
        (NIGHT, "2026-11-27 05:00", 5_000_000),  # Thursday's has no window
    ],
)
def test_the_week(schedule: Schedule, local: str, rate: int | None) -> None:
    assert schedule.rate_at(datetime.fromisoformat(local)) == rate


def test_the_first_window_that_applies_counts() -> None:
    lunch = Window(WEEK, 12 * 60, 13 * 60, 2_000_000)
    schedule = Schedule(None, (lunch, *OFFICE.windows))
    assert schedule.rate_at(datetime.fromisoformat("2026-11-23 12:30")) == 2_000_000
    assert schedule.rate_at(datetime.fromisoformat("2026-11-23 13:30")) == 1_000_000


def limited_minutes(schedule: Schedule, day: datetime, zone: tzinfo) -> int:
    """How many real minutes of a day (from its first instant) the schedule's one window holds."""
    clock = SetClock(day.astimezone(UTC))
    pace, count = Pace(schedule, clock, zone), 0
    while clock.moment.astimezone(zone).date() == day.date():
        count += pace.rate is not None
        clock.go(60)
    return count


@pytest.mark.parametrize(
    ("schedule", "day", "minutes"),
    [
        (OFFICE, datetime(2026, 3, 27, tzinfo=BERLIN), 600),
        (OFFICE, datetime(2026, 3, 30, tzinfo=BERLIN), 600),  # the first working day of summer time
        (OFFICE, datetime(2026, 10, 26, tzinfo=BERLIN), 600),  # and of winter time
        (EARLY, datetime(2026, 3, 28, tzinfo=BERLIN), 60),
        (EARLY, datetime(2026, 3, 29, tzinfo=BERLIN), 0),  # 02:00 to 03:00 never came
        (EARLY, datetime(2026, 10, 25, tzinfo=BERLIN), 120),  # and came twice
    ],
)
def test_windows_follow_the_wall_clock_when_it_changes(schedule: Schedule, day: datetime, minutes: int) -> None:
    assert limited_minutes(schedule, day, BERLIN) == minutes


def uploaded(pace: Pace, clock: SetClock, seconds: float, size: int) -> int:
    """Bytes that go out in so long, in pieces of `size`, when there is always more."""
    end, count = clock.seconds + seconds, 0
    while clock.seconds < end:
        pause = pace.wait_seconds()
        if pause:
            clock.go(min(pause, end - clock.seconds))
        else:
            pace.spend(size)
            count += size
    return count


@pytest.mark.parametrize("size", [10_000, 500_000, 4_000_000])
def test_the_mean_is_the_rate_whatever_the_pieces(size: int) -> None:
    clock = SetClock(datetime(2026, 11, 23, 9, tzinfo=UTC))
    pace = Pace(OFFICE, clock, UTC)
    count = uploaded(pace, clock, 600, size)
    assert abs(count - 600_000_000) <= 1_000_000 + 2 * size


def test_nothing_is_saved_up_beyond_a_second_and_no_debt_outlives_its_window() -> None:
    clock = SetClock(datetime(2026, 11, 23, 8, tzinfo=UTC))
    pace = Pace(OFFICE, clock, UTC)
    clock.go(3600)
    assert uploaded(pace, clock, 1, 1000) <= 2_001_000
    pace.spend(1_000_000_000)
    assert pace.wait_seconds() > 900
    clock.moment = datetime(2026, 11, 23, 18, tzinfo=UTC)
    assert pace.wait_seconds() == 0


def test_what_did_not_go_out_after_all_is_given_back() -> None:
    clock = SetClock(datetime(2026, 11, 23, 9, tzinfo=UTC))
    pace = Pace(OFFICE, clock, UTC)
    pace.spend(3_000_000)
    assert pace.wait_seconds() == pytest.approx(2.0)
    pace.spend(-1_500_000)
    assert pace.wait_seconds() == pytest.approx(0.5)
