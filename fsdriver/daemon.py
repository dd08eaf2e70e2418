"""The daemon: serves one mount of one store until it is unmounted or told to end.

`python -m fsdriver.daemon STORE MOUNTPOINT`; people use `mountctl mount`. Holds the store's
lease `mount`, so there is one at a time and everybody can see which. Ends cleanly on SIGTERM,
SIGINT and SIGHUP, unmounting even when busy, and when the mount is ended from outside. Killed,
it leaves a dead mount, whose operations fail at once, and nothing that is not in order.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator

import structlog
import trio

from engine import EngineError, Repository
from engine.host.leases import acquire
from engine.mounted.vfs import SNAPSHOTS, Vfs
from engine.storage.nodes import Owner
from fsdriver.apart import keep_apart
from fsdriver.channel import Channel, Part
from fsdriver.client import STARTING, socket_path
from fsdriver.control import Control, listen
from fsdriver.device import Access
from fsdriver.housekeeping import LOOK_SECONDS, Housekeeping, Schedule
from fsdriver.launch import default_log
from fsdriver.logs import Logging
from fsdriver.messages import Status
from fsdriver.mountpoint import in_memory
from fsdriver.operations import COPY_IN_THREAD, Operations
from fsdriver.own_directory import remove_own_directory
from fsdriver.pressure import Pressure, sources
from fsdriver.ranges import Ranges
from fsdriver.readahead import ReadAhead

WATCH_SECONDS = 1.0
AGAIN_SECONDS = 10.0
"""How long what looks after the mount pauses after a failure, of the store or the system."""
SWITCH_SECONDS = 0.0005
"""How long a request may have to wait for a thread to give the interpreter up."""
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FAILED = 10
"""Exit status when it could not serve, as `mountctl` has it."""

log = structlog.get_logger("daemon")


def main(argv: list[str]) -> int:
    """Runs a daemon in this process; returns its exit status."""
    options = _parser().parse_args(argv)
    options.store = os.path.abspath(options.store)
    options.mountpoint = os.path.realpath(options.mountpoint)
    _prepare_process(options.mountpoint)
    logging = Logging(options.log, options.store)
    try:
        with _mounted(options) as (vfs, channel, control, listener, serving):

            def ready() -> None:
                log.info("mounted", mountpoint=options.mountpoint, store=options.store)
                if _tell(options.ready_fd, {"pid": os.getpid()}):
                    serving()
                else:
                    log.info("ending", reason="whoever started it is gone")
                    channel.stop()

            house = Housekeeping(
                vfs.repository,
                Schedule(options.gc_every, options.gc_below, options.gc_look),
                control.requests,
            )
            trio.run(
                _serve, channel, control, house, listener, ready, options.life_fd, logging.check
            )
            del vfs
        if options.life_fd >= 0:
            remove_own_directory(options.mountpoint)
        log.info("ended", mountpoint=options.mountpoint)
    except (EngineError, OSError) as error:
        log.error("cannot serve", kind=type(error).__name__, error=str(error))
        _tell(options.ready_fd, {"kind": type(error).__name__, "message": str(error)})
        return FAILED
    except BaseExceptionGroup as group:
        if group.split(MemoryError)[1] is not None:
            raise
        # The library that reads requests had none for one: it could not even answer.
        log.error("ended", reason="no memory")
        return FAILED
    finally:
        logging.end()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fsdriver.daemon", description=__doc__)
    parser.add_argument("store")
    parser.add_argument("mountpoint")
    parser.add_argument("--allow-other", action="store_true")
    parser.add_argument("--suid", action="store_true")
    parser.add_argument("--dev", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--log", default=None)
    parser.add_argument("--ready-fd", type=int, default=-1)
    parser.add_argument("--life-fd", type=int, default=-1)
    parser.add_argument("--gc-every", type=float, default=0.0, help="seconds; 0: never")
    parser.add_argument("--gc-below", type=float, default=0.0, help="share of free room")
    parser.add_argument("--gc-look", type=float, default=LOOK_SECONDS, help="seconds")
    return parser


def _prepare_process(mountpoint: str) -> None:
    keep_apart(mountpoint)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it as SIGTERM does, while nothing is served
    os.umask(0)
    sys.setswitchinterval(SWITCH_SECONDS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _tell(fd: int, facts: dict[str, object]) -> bool:
    """Tells whoever started us, once; False if nobody hears it any more."""
    if fd >= 0:
        try:
            os.write(fd, json.dumps(facts).encode() + b"\n")
        except BrokenPipeError:
            return False
        finally:
            os.close(fd)
    return True


@contextlib.contextmanager
def _mounted(
    options: argparse.Namespace,
) -> Iterator[tuple[Vfs, Channel, Control, socket.socket, Callable[[], None]]]:
    """Holds the lease, the store, the socket and the mount, and lets go in reverse.

    The last of what it gives is to be called once the mount is served.
    """
    store, mountpoint = options.store, options.mountpoint
    where = socket_path(store)
    with contextlib.ExitStack() as stack:
        repository = stack.enter_context(Repository.open(store, trusted=True))
        lease = stack.enter_context(acquire(store, "mount", what=f"mounted on {mountpoint}"))
        facts = {"mountpoint": mountpoint, "socket": where}
        lease.describe(what=f"being mounted on {mountpoint}", stage=STARTING, **facts)
        vfs = Vfs(repository, Owner(os.getuid(), os.getgid()), facts)
        stack.callback(vfs.close)
        listener = stack.enter_context(listen(store))
        stack.callback(_remove, where)
        operations = Operations(vfs)
        if in_memory(store):
            operations.copy_here = COPY_IN_THREAD
        # From here on a signal waits for its receiver, and one after that is ignored: either
        # would leave a dead mount.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)

        def elsewhere(mounted: bool) -> None:
            vfs.snapshots_elsewhere = mounted

        channel = Channel(
            operations, operations.abilities, mountpoint, source=store,
            access=Access(options.allow_other, options.suid, options.dev), plain=options.plain,
            part=Part("snapshots", SNAPSHOTS, elsewhere),
        )  # fmt: skip
        stack.callback(channel.close)
        operations.attributes_changed = channel.attributes_changed
        if not options.plain:
            operations.seat = channel.seat
            channel.ranges = Ranges(operations, channel.write_back, channel.attributes_changed)
            operations.ahead = ReadAhead(channel.give)
            stack.callback(operations.ahead.close)
        status = Status(
            os.getpid(), store, mountpoint, options.log or default_log(store), time.time_ns(), []
        )  # fmt: skip

        def serving() -> None:
            lease.describe(what=f"mounted on {mountpoint}", **facts)

        yield vfs, channel, Control(vfs, operations, channel, status), listener, serving


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


async def _serve(
    channel: Channel,
    control: Control,
    house: Housekeeping,
    listener: socket.socket,
    ready: Callable[[], None],
    life: int,
    check_log: Callable[[], None],
) -> None:
    pressure = Pressure(sources())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(control.serve, listener)
        nursery.start_soon(_again, "watch", control.watch, WATCH_SECONDS, pressure, check_log)
        nursery.start_soon(_again, "housekeeping", house.run)
        nursery.start_soon(_end_on_signal, channel)
        if life >= 0:
            nursery.start_soon(_end_with, life, channel)
        await channel.serve(ready)
        nursery.cancel_scope.cancel()


async def _again(name: str, task: Callable[..., Awaitable[None]], *arguments: object) -> None:
    """Runs what only looks after the mount: a failure is logged, and a while later it goes on."""
    while True:
        try:
            return await task(*arguments)
        except (EngineError, OSError) as error:
            log.error("interrupted", task=name, kind=type(error).__name__, error=str(error))
        await trio.sleep(AGAIN_SECONDS)


async def _end_with(life: int, channel: Channel) -> None:
    """Ends the mount when nobody needs it any more: nobody holds the other end of a pipe."""
    await trio.lowlevel.wait_readable(life)
    log.info("ending", reason="nobody needs the mount any more")
    channel.stop()


async def _end_on_signal(channel: Channel) -> None:
    with trio.open_signal_receiver(*ENDING) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        async for number in signals:
            log.info("ending", signal=signal.Signals(number).name)
            channel.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
