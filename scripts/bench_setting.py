"""What a benchmark stands on: child processes, a directory of the run's own, packages, the tree.

Used by the other bench modules, and by those of scripts/posix.
"""

import contextlib
import fcntl
import glob
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from fsdriver.launch import wait_until_ended
from fsdriver.mountpoint import UnmountError, mounts, unmount

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

ENVIRONMENT = {
    **{key: os.environ[key] for key in ("PATH", "HOME", "XDG_CACHE_HOME") if key in os.environ},
    "LC_ALL": "C",
    "NO_COLOR": "1",
    # git as it is without anybody's configuration, but for one thing: the repacking that it
    # starts in the background after a commit would disturb what is measured next.
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "gc.auto",
    "GIT_CONFIG_VALUE_0": "0",
    **{f"GIT_{who}_NAME": "bench" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "bench@localhost" for who in ("AUTHOR", "COMMITTER")},
}

FETCH_TREE = r"""
search() { apt-cache search --names-only '^linux-source-[0-9.]+$' | cut -d' ' -f1 | sort; }
[ -n "$(search)" ] || [ "$(id -u)" != 0 ] || apt-get -qq update
name=$(search | head -n 1) # the oldest
[ -n "$name" ] || { echo 'apt knows no linux-source package: apt-get update' >&2; exit 1; }
apt-get -qq -o APT::Sandbox::User=root download "$name"
dpkg-deb --fsys-tarfile ./*.deb | tar -x --wildcards '*/linux-source-*.tar.*'
mkdir "$name"
find usr -name 'linux-source-*.tar.*' \
    -exec tar -C "$name" --strip-components=1 --no-same-owner -xf {} ';'
mv "$name" ..
"""


class CannotError(Exception):
    """Something that is needed failed or is not there; the text says what."""


class Ran(NamedTuple):
    """What a child process took and said. `peak` is its largest resident set in MB."""

    seconds: float
    peak: float
    output: str


def note(text: str) -> None:
    """Tells the person who waits."""
    program = os.path.basename(sys.argv[0]).removesuffix("_main.py")
    print(f"{program}: {text}", file=sys.stderr, flush=True)


def run(
    *command: str,
    cwd: str | None = None,
    patient: bool = False,
    strict: bool = False,
    fetches: bool = False,
    keeps: tuple[int, ...] = (),
) -> Ran:
    """Runs a command to its end; raises CannotError if it fails or, if `strict`, complains.

    When we are interrupted it is killed with its children, unless `patient`: what starts a
    daemon must get to where the daemon can be found. What `fetches` has our whole environment,
    as it may say by which way the network is reached. `keeps` are descriptors that it inherits.
    """
    environment = {**os.environ, **ENVIRONMENT} if fetches else ENVIRONMENT
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        child = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            process_group=0, pass_fds=keeps,
        )  # fmt: skip
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            if not patient:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        complaint = err.read().decode(errors="replace").strip()
        if child.returncode or (strict and complaint):
            raise CannotError(f"{' '.join(command)} ended with {child.returncode}: {complaint}")
        return Ran(seconds, usage.ru_maxrss / 1024, out.read().decode(errors="replace"))


def shell(script: str, *arguments: str, cwd: str | None = None, strict: bool = False) -> Ran:
    """Runs a shell script with positional arguments, as `run` does."""
    return run("sh", "-ec", script, "sh", *arguments, cwd=cwd, strict=strict)


PROGRAM = os.path.join(os.path.dirname(sys.executable), "mountctl")


def mountctl(store: str, *arguments: str, patient: bool = False) -> Ran:
    """Runs the command line as a person does, its start included."""
    return run(PROGRAM, "--store", store, *arguments, patient=patient)


def ignore_signals() -> None:
    """Lets nothing interrupt what follows: it is the way out."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def workplace(cache: str) -> Iterator[str]:
    """Gives a directory of this run's own; nothing of it or mounted below it is left afterwards.

    The same place each time, under a lock, so that what a killed run left goes as well.
    """
    os.makedirs(cache, exist_ok=True)
    place = os.path.join(os.path.realpath(cache), "run")
    with open(os.path.join(cache, "lock"), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotError(f"another run of bench is using {cache}") from None
        clear(place)
        try:
            os.mkdir(place, 0o700)
            yield place
        finally:
            ignore_signals()
            clear(place)


def clear(place: str) -> None:
    """Removes a directory with all that is mounted below it; never deletes through a mount."""
    for mount in reversed(mounts()):
        if mount.path.startswith(place + os.sep):
            with contextlib.suppress(UnmountError):
                unmount(mount.path, lazy=True)
    if any(mount.path.startswith(place + os.sep) for mount in mounts()):
        raise CannotError(f"still mounted, so kept: {place}")
    for store in glob.glob(os.path.join(place, "store*", "")):
        wait_until_ended(store, 60)
    if os.path.isdir(place):
        run("chmod", "-R", "u+rwX", place)  # fuse-overlayfs leaves a directory without permissions
        shutil.rmtree(place)


def install(packages: list[str]) -> None:
    """Installs Debian packages if this user may. Raises CannotError."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    command = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-y"]
    command += ["-o", "DPkg::Lock::Timeout=300"]  # another apt is waited for
    note(f"installing with apt: {' '.join(packages)}")
    try:
        run(*command, "update", patient=True)
        run(*command, "--no-install-recommends", "install", *packages, patient=True)
    except (CannotError, FileNotFoundError) as error:
        hint = f"not installed; as root: apt-get install {' '.join(packages)}"
        raise CannotError(hint) from error


def kernel_source(cache: str) -> str:
    """Returns the source of Linux as Debian and Ubuntu package it, kept; needs no root."""
    pattern = os.path.join(os.path.realpath(cache), "linux-source-*", "")
    if not glob.glob(pattern):
        note("fetching a linux-source package")
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch.") as scratch:
            try:
                shell(FETCH_TREE, cwd=scratch)
            except CannotError as error:
                reason = str(error).removeprefix(f"sh -ec {FETCH_TREE} sh ")
                raise CannotError(f"no tree ({reason}); name one: --tree DIR") from None
    return os.path.dirname(glob.glob(pattern)[0])


def size_of(tree: str) -> tuple[int, int, int]:
    """Returns how many entries a directory has, their bytes, and their bytes on the disk."""
    entries = apparent = used = 0
    for folder, folders, files in os.walk(tree):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(folder, name))
            entries += 1
            used += status.st_blocks * 512
            apparent += status.st_size if name in files else 0
    return entries, apparent, used


def read_all(path: str) -> None:
    """Reads a file, or all files below a directory, so that they are in the page cache."""
    shell('tar -c "$1" 2>/dev/null | cat >/dev/null', path)


def machine(place: str) -> dict[str, str]:
    """Returns what a reader must know of the machine to compare figures."""

    def find(path: str, pattern: str) -> str:
        with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
            if found := re.search(pattern, file.read(), re.MULTILINE):
                return found[1].strip('"')
        return "unknown"

    processor = find("/proc/cpuinfo", r"^model name\s*:\s*(.*)")
    memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    schemes = "/sys/kernel/mm/damon/admin/kdamonds/*/contexts/*/schemes/*/action"
    if any(find(scheme, r"^(pageout)$") == "pageout" for scheme in glob.glob(schemes)):
        memory += "; the kernel drops what is not used for a while (DAMON)"
    disk = run("stat", "--file-system", "--format=%T", place).output.strip()
    return {
        "when": f"{time.strftime('%Y-%m-%d')}, load average at the start {os.getloadavg()[0]:.1f}",
        "processor": f"{processor}, {os.cpu_count()} cores",
        "memory": memory,
        "system": f"{find('/etc/os-release', r'^PRETTY_NAME=(.*)')}, Linux {platform.release()}",
        "disk": "ext4" if disk == "ext2/ext3" else disk,
        "Python": platform.python_version(),
        "user": "root" if os.geteuid() == 0 else "an ordinary user",
    }
