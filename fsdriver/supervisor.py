"""Runs one command, in a session's tree under the kernel's overlayfs if asked to; a program.

`python -m fsdriver.supervisor JOB COMMAND [ARG...]`, started by `running`, which see; JOB is a
`Job` as JSON. A process of its own because only one without other threads can enter a user
namespace. It stands between who started it and the command, and

- tells over the pipe `tell`, one JSON object per line: `refused` (a step and an errno; nothing
  was started), `failed` (an errno of execve(2)), or `started` (the command's process), then
  `stopped` (a signal) each time the command is, and `ended` (as waitpid(2) has it) with `left`,
  whether processes that the command started go on;
- passes on the signals that it is sent by who started it;
- kills the command when who started it is gone: the other end of `life` is closed;
- lives as long as any process that came from the command, for these all become its children.
  So does what it has inherited: the session's lease, and with it the pipe that keeps a mount.

The user namespace has the user's own number and group and nothing else, so the command sees
what it always sees; what it mounts needs privilege that execve(2) takes away again.
"""

import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import struct
import sys
import time
from typing import Any, NamedTuple

FORWARDED = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1,
    signal.SIGUSR2, signal.SIGALRM, signal.SIGCONT,
)  # fmt: skip
"""What is passed on. The terminal stops and resumes all processes by itself."""
WATCHED = (*FORWARDED, signal.SIGCHLD, signal.SIGIO)

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_NOSUID, _MS_NODEV = 2, 4
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_SLAVE = 0x1000, 0x4000, 0x40000, 0x80000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_MOUNT_ATTR = struct.Struct("=QQQQ")
"""What mount_setattr(2) is told: attributes to set (as `_MS_NOSUID`), to clear, and two more."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SAME_SECONDS = 1.0
"""Within this time a signal sent to the process group and one passed on are the same.

It is passed on as soon as who started this gets the processor.
"""
_GRACE_SECONDS = 0.2
"""How long processes that came from the command may take to end after it."""

_OUT_OF_THE_WAY = 100
"""From where on a descriptor is numbered that scripts, which number their own, shall not meet."""

_libc = ctypes.CDLL(None, use_errno=True)


class Job(NamedTuple):
    """What to do. Descriptors by number.

    At `place` overlayfs is mounted from `lower`, `upper` and `work`, or with an empty `lower` the
    directory `tree`; with both empty nothing is. `mountpoint` may be empty; with `cover`, a
    descriptor of it, it is an empty directory, in which `place` is to be made.
    """

    tell: int
    life: int
    lease: int
    mount: int
    cover: int
    mountpoint: str
    lower: str
    upper: str
    work: str
    tree: str
    place: str
    name: str
    directory: str
    mask: list[int]


class _RefusedError(Exception):
    def __init__(self, step: str, code: int) -> None:
        super().__init__(step)
        self.step, self.code = step, code


def main(argv: list[str]) -> int:
    """Does a job; returns this process's exit status, which says nothing of the command's."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    job, command = Job(*json.loads(argv[0])), argv[1:]
    for descriptor in (job.tell, job.life, job.lease, job.mount, job.cover):
        if descriptor >= 0:
            os.set_inheritable(descriptor, False)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        if job.lower or job.tree:
            _enter(job)
            (_mount_overlay if job.lower else _bind)(job)
        _go_to(job)
    except _RefusedError as refused:
        _tell(job, refused=[refused.step, refused.code])
        return 0
    told, failed = os.pipe()
    early = signal.sigpending()
    supervisor = os.getpid()
    child = os.fork()
    if not child:
        _become(job, command, failed, supervisor)
    os.close(failed)
    code = os.read(told, 16)  # execve(2) may wait for a mount; who started us kills us then
    os.close(told)
    if code:
        os.waitpid(child, 0)
        _tell(job, failed=int(code))
        return 0
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # else who reads the command's output would wait for us
        os.dup2(nothing, descriptor)
    _tell(job, started=child)
    _Watch(job, child, early).run()
    return 0


def _tell(job: Job, **facts: Any) -> None:
    try:
        os.write(job.tell, json.dumps(facts).encode() + b"\n")
    except BrokenPipeError:
        pass  # who started this is gone; `life` tells, too


def _enter(job: Job) -> None:
    """Goes where only this process and its descendants see what is mounted."""
    ids = [("uid_map", os.geteuid()), ("gid_map", os.getegid())]
    if _libc.unshare(_CLONE_NEWNS):  # only root may, without a user namespace
        _call("a user namespace", _libc.unshare, _CLONE_NEWUSER | _CLONE_NEWNS)
        try:
            _write("setgroups", "deny")
            for table, number in ids:
                _write(table, f"{number} {number} 1")
        except OSError as error:
            raise _RefusedError("a user namespace", error.errno or errno.EIO) from error
    _call("a mount namespace", _libc.mount, None, b"/", None, _MS_REC | _MS_SLAVE, None)
    if job.mountpoint and job.cover < 0:
        # Ours stays as long as it is needed here; elsewhere it may be ended as if we were not.
        _libc.mount(None, os.fsencode(job.mountpoint), None, _MS_REC | _MS_PRIVATE, None)


def _bind(job: Job) -> None:
    if job.cover >= 0:
        cover = os.fsencode(job.mountpoint)
        flags = _MS_NOSUID | _MS_NODEV
        _call("a place for the tree", _libc.mount, b"tmpfs", cover, b"tmpfs", flags, b"mode=700")
        try:
            os.makedirs(job.place)
        except OSError as error:
            raise _RefusedError("a place for the tree", error.errno or errno.EIO) from error
    tree, place = os.fsencode(job.tree), os.fsencode(job.place)
    _call("the tree's place", _libc.mount, tree, place, None, _MS_BIND | _MS_REC, None)
    in_mount = job.mountpoint and job.tree.startswith(job.mountpoint + os.sep)
    if not in_mount:  # it is a checkout, on a disk where set-id bits work
        _take_privileges(place)


def _take_privileges(place: bytes) -> None:
    """Makes set-id bits and devices have no effect at a mount. Only adds: what is locked stays."""
    attributes = _MOUNT_ATTR.pack(_MS_NOSUID | _MS_NODEV, 0, 0, 0)
    at, flags = ctypes.c_int(_AT_FDCWD), ctypes.c_uint(_AT_RECURSIVE)
    size = ctypes.c_size_t(len(attributes))
    number = ctypes.c_long(_MOUNT_SETATTR)
    _call("a mount without set-id bits", _libc.syscall, number, at, place, flags, attributes, size)


def _mount_overlay(job: Job) -> None:
    try:
        # By descriptors, so that no path needs to be escaped, and none is too long.
        parts = {
            option: os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            for option, path in (
                ("lowerdir", job.lower), ("upperdir", job.upper), ("workdir", job.work),
            )
        }  # fmt: skip
    except OSError as error:
        raise _RefusedError("the session's directories", error.errno or errno.EIO) from error
    # xino: else a directory's number differs from the one that its listing has, and changes.
    layers = [f"{option}=/proc/self/fd/{fd}" for option, fd in parts.items()]
    options = ",".join(["userxattr", "xino=on", *layers])
    source, place = os.fsencode(job.name), os.fsencode(job.place)
    # As the store's mount has it: what shows there as the user's own may be anybody's.
    flags = os.fstatvfs(parts["lowerdir"]).f_flag & (_MS_NOSUID | _MS_NODEV)
    _call("overlayfs", _libc.mount, source, place, b"overlay", flags, options.encode())
    for descriptor in parts.values():
        os.close(descriptor)


def _write(name: str, text: str) -> None:
    with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
        file.write(text)


def _call(step: str, function: Any, *arguments: Any) -> None:
    if function(*arguments):
        raise _RefusedError(step, ctypes.get_errno())


def _go_to(job: Job) -> None:
    try:
        os.chdir(job.directory)
    except OSError:
        try:
            os.chdir(job.place)
        except OSError as error:
            raise _RefusedError("the working directory", error.errno or errno.EIO) from error


def _become(job: Job, command: list[str], failed: int, supervisor: int) -> None:
    """Turns this process into the command. Does not return."""
    if job.lease >= 0:
        fcntl.fcntl(job.lease, fcntl.F_DUPFD, _OUT_OF_THE_WAY)  # should only this process be killed
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != supervisor:  # it was killed before we could ask to be told
        os._exit(127)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them
    words = [os.fsencode(word) for word in command]
    array = (ctypes.c_char_p * (len(words) + 1))(*words, None)
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.Signals(number) for number in job.mask])
    _libc.execvp(words[0], array)
    os.write(failed, b"%d" % ctypes.get_errno())
    os._exit(127)


class _Watch:
    """What happens from the command's start on."""

    def __init__(self, job: Job, child: int, early: set[signal.Signals]) -> None:
        """`early` are signals that came when there was no command to have them."""
        self._job, self._child, self._starter = job, child, os.getppid()
        self._early: set[int] = {int(number) for number in early}
        self._ended = self._over = False
        self._seen: dict[int, float] = {}

    def run(self) -> None:
        """Returns when no process that came from the command is left."""
        life = self._job.life
        fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        self._look_after_starter()
        while self._reap():
            info = signal.sigtimedwait(WATCHED, 3600)
            if info is None or info.si_signo == signal.SIGCHLD:
                continue
            if info.si_signo == signal.SIGIO:
                self._look_after_starter()
            else:
                self._signalled(info)

    def _look_after_starter(self) -> None:
        gone = select.select([self._job.life], [], [], 0)[0]
        if gone and not self._ended:
            os.kill(self._child, signal.SIGKILL)

    def _signalled(self, info: "signal.struct_siginfo") -> None:
        """Passes a signal on, unless the command has had it with its process group."""
        now = time.monotonic()
        if self._ended:
            return
        if info.si_signo in self._early:
            self._early.discard(info.si_signo)
            os.kill(self._child, info.si_signo)
        elif info.si_code > 0:
            pass  # the terminal has sent it to all, and nobody passes it on
        elif info.si_pid != self._starter:
            self._seen[info.si_signo] = now
        elif now - self._seen.pop(info.si_signo, -1.0) > _SAME_SECONDS:
            os.kill(self._child, info.si_signo)

    def _reap(self) -> bool:
        """Collects what has ended; tells whether a process is left."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                if self._ended and not self._over:
                    self._end(left=False)
                return False
            if pid == self._child and os.WIFSTOPPED(status):
                _tell(self._job, stopped=os.WSTOPSIG(status))
            elif pid == self._child:
                self._ended, self._status = True, status
            elif not pid:
                if not self._ended or self._over:
                    return True
                if time.monotonic() > deadline:
                    self._end(left=True)
                    return True
                signal.sigtimedwait([signal.SIGCHLD], 0.02)

    def _end(self, *, left: bool) -> None:
        self._over = True
        _tell(self._job, ended=self._status, left=left)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
