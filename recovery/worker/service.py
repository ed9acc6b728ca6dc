"""A recovery worker: claims jobs and carries them out, one after another.

One at a time is enough for one host, whose machines share its cores, and keeps a failover from waiting for nothing but
a drill's memory; more hosts take more jobs. On SIGTERM it stops after the step that it is at; killed, its job is
claimed by another when the lease runs out, or by itself when it is back.

Upkeep (see `upkeep`) goes on beside the jobs. It is cut off at SIGTERM, since it may be cut off anywhere.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from recovery.worker.desk import Desk
from recovery.worker.exposed import Tally, page
from recovery.worker.hands import Hands, QemuHands
from recovery.worker.homeward import Homeward
from recovery.worker.outward import Outward
from recovery.worker.rounds import Work, carry_out
from recovery.worker.settings import AzureSettings, WorkerSettings
from recovery.worker.upkeep import Chore, Upkeep, bring_on, fold, remove_unwanted
from replicar.clock import Clock
from replicar.control.client import ControlClient
from replicar.control.files import make_directory
from replicar.control.identity import Identity
from replicar.control.messages import ClaimRequest, JobKind, JobState, TargetSettings, UpkeepKind
from replicar.errors import PermanentError, TransientError
from replicar.observe.endpoint import Endpoint
from replicar.observe.exposition import Page
from replicar.storage.store import PageBlobStore
from replicar.storage.target import open_store

#: How long a claim waits for a job.
WAIT_SECONDS: Final = 20.0
LONGEST_PAUSE_SECONDS: Final = 30.0
OUTWARD: Final = (
    JobKind.TEST_FAILOVER,
    JobKind.CLEAN_UP,
    JobKind.FAILOVER,
    JobKind.CHANGE_POINT,
    JobKind.CANCEL_FAILOVER,
    JobKind.COMMIT,
)
HOMEWARD: Final = (JobKind.FAILBACK, JobKind.REPROTECT)

_log = logging.getLogger(__name__)


#: Makes the hands for one job.
MakeHands = Callable[[Desk], Hands]


def hands_of(settings: WorkerSettings, file: Path | None, clock: Clock) -> dict[str, MakeHands]:
    """The hands that a worker with these settings has, by name.

    Raises:
        PermanentError: machines in Azure are asked for, and the libraries for that are not installed.
    """
    qemu = QemuHands(settings, file)
    made: dict[str, MakeHands] = {"qemu": lambda desk: qemu}
    if settings.azure is not None:
        made["azure"] = partial(
            azure_for, settings.azure, settings.directory / "evidence", clock, logs=settings.storage
        )
    return made


def azure_for(azure: AzureSettings, evidence: Path, clock: Clock, desk: Desk, **options: Any) -> Hands:
    """Hands in Azure, for the job's target settings, in the resource group that it or an earlier job began in."""
    try:  # not above: the SDK takes seconds to import, and most workers have no use for it
        from recovery.worker.azure_hands import AzureHands
    except ImportError:
        raise PermanentError(
            "machines in Azure are asked for, but the libraries for that are not installed",
            hint="pip install 'replicar[azure]'",
        ) from None
    results = [desk.result, *(job.result for job in desk.before)]
    made_in = next((found["resource_group"] for found in results if "resource_group" in found), "")
    return AzureHands(azure, desk.target or TargetSettings(), evidence, clock, made_in=made_in, **options)


class Worker:
    """See the module.

    Args:
        file: where the settings are from, for exporters, which read them for themselves.
        hands: instead of those that the settings say.
    """

    def __init__(
        self, settings: WorkerSettings, file: Path | None, clock: Clock, *, hands: Mapping[str, MakeHands] | None = None
    ) -> None:
        self._settings, self._clock = settings, clock
        self._hands = hands if hands is not None else hands_of(settings, file, clock)
        self._tally = Tally()

    async def run(self, stop: asyncio.Event, *, once: bool = False) -> None:
        """Work until `stop` is set; with `once`, until there is nothing to do.

        Raises:
            PermanentError: the identity is none, or not one that may do this.
        """
        make_directory(self._settings.directory)
        identity = Identity.load(self._settings.identity)

        async def collect() -> Page:
            return page(self._tally, OUTWARD + HOMEWARD)

        with own_instance(self._settings.directory) as instance:
            async with Endpoint(self._settings.metrics_listen, collect):
                await self._work(identity, instance, stop, once=once)

    async def _work(self, identity: Identity, instance: str, stop: asyncio.Event, *, once: bool) -> None:
        async with (
            open_store(self._settings.storage, clock=self._clock) as store,
            ControlClient(identity, address=self._settings.config_server) as control,
        ):
            running = [asyncio.create_task(self._jobs(control, store, instance, stop, once=once))]
            if not once:
                running += [asyncio.create_task(each.run()) for each in self._upkeep(control, store, instance)]
            try:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # the jobs' end is the worker's, and so is anybody's error
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def _upkeep(self, control: ControlClient, store: PageBlobStore, instance: str) -> list[Upkeep]:
        chores: list[tuple[UpkeepKind, Chore, float]] = [
            (UpkeepKind.FOLD, partial(fold, clock=self._clock), self._settings.fold_seconds),
            (UpkeepKind.REPLICA, partial(bring_on, clock=self._clock), self._settings.replica_seconds),
            (UpkeepKind.REPLICA_REMOVAL, partial(remove_unwanted, clock=self._clock), self._settings.replica_seconds),
        ]
        return [
            Upkeep(kind, chore, control, store, clock=self._clock, instance=instance, every_seconds=every)
            for kind, chore, every in chores
            if every
        ]

    async def _jobs(
        self, control: ControlClient, store: PageBlobStore, instance: str, stop: asyncio.Event, *, once: bool
    ) -> None:
        pause = 1.0
        while not stop.is_set():
            request = ClaimRequest(
                instance=instance,
                kinds=OUTWARD + HOMEWARD,
                computes=tuple(self._hands),
                wait_seconds=0.0 if once else WAIT_SECONDS,
            )
            claiming, stopping = asyncio.create_task(control.claim(request)), asyncio.create_task(stop.wait())
            await asyncio.wait((claiming, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not claiming.done():
                claiming.cancel()
                await asyncio.gather(claiming, return_exceptions=True)
                return
            try:
                claim = claiming.result()
            except TransientError as error:
                _log.warning("the config server does not answer: %s", error)
                self._tally.is_heard = False
                await self._clock.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            pause, self._tally.is_heard = 1.0, True
            if claim.job is not None:
                await self._carry_out(Desk(control, claim, self._clock, host=instance), store, stop)
            elif once:
                return

    async def _carry_out(self, desk: Desk, store: PageBlobStore, stop: asyncio.Event) -> None:
        tally, kind = self._tally, desk.job.kind
        tally.going = kind
        try:
            works = self._works(desk, store)
        except PermanentError as error:
            await desk.finish(JobState.FAILED, error)
        except TransientError as error:
            await desk.finish(JobState.SUSPENDED, error)
        else:
            await carry_out(desk, works, stop)
        finally:
            tally.going = None
            tally.lost[kind] += desk.lost
        if desk.ended is not None:
            tally.jobs[kind, desk.ended] += 1

    def _works(self, desk: Desk, store: PageBlobStore) -> Mapping[str, Work]:
        asked = (job.result.get("compute") or job.parameters.compute for job in desk.before)
        wanted = desk.job.parameters.compute or next(filter(None, asked), "qemu")
        make = self._hands.get(wanted)
        if make is None:  # of a job that asks for none itself: it is about what another worker has made
            raise TransientError(
                f"this worker has no compute {wanted!r}, and the machine was to be made by that",
                hint=f"have a worker run that has it; this one has {', '.join(self._hands)}",
            )
        hands = make(desk)
        if desk.job.kind in HOMEWARD:
            return Homeward(desk, hands, store, self._settings.directory).works()
        return Outward(desk, hands, store).works()


@contextmanager
def own_instance(directory: Path) -> Iterator[str]:
    """What this directory's worker is called towards the config server, always the same: a worker that was killed gets
    its job back at once when it returns. One process at a time has it.

    Raises:
        PermanentError: another worker is at work in that directory.
    """
    with (directory / "instance").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermanentError(
                f"another recovery worker is at work in {directory}",
                hint="end it first, or give this one a directory of its own",
                path=str(directory),
            ) from None
        file.seek(0)
        instance = file.read().strip()
        if not instance:
            instance = uuid.uuid4().hex
            file.write(instance)
            file.flush()
            os.fsync(file.fileno())
        yield instance
