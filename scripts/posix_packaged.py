"""The suites that Debian packages: CPython's tests, stress-ng, fio, dbench, bonnie++."""

import os
import re
import shutil
import xml.etree.ElementTree as ET

from scripts.bench_setting import CannotError, install, run
from scripts.posix_scores import Failure, Score
from scripts.posix_setting import Place

# ---------------------------------------------------------------- CPython's own tests

MODULES = """
test_os test_shutil test_mmap test_posix test_fcntl test_tempfile test_io test_file test_fileio
test_largefile test_pathlib test_glob test_zipfile test_tarfile test_sqlite3 test_dbm
test_dbm_dumb test_dbm_gnu test_mailbox test_filecmp test_shelve test_unicode_file
test_unicode_file_functions test_import test_zipimport test_compileall test_py_compile
test_fnmatch test_posixpath test_genericpath test_stat test_bufio test_gzip test_bz2 test_lzma
test_netrc test_configparser test_fileinput test_linecache test_runpy test_pkgutil
test_importlib test_logging test_zipapp test_wave test_univnewlines test_file_eintr
test_cmd_line_script test_venv
"""
SHORT_MODULES = """
test_os test_shutil test_mmap test_posix test_fcntl test_tempfile test_file test_fileio
test_pathlib test_glob test_dbm test_filecmp test_unicode_file test_genericpath test_stat
test_univnewlines test_zipimport test_fileinput
"""


def _python() -> str:
    """Returns the system's own interpreter: the packages are for that one."""
    found = shutil.which("python3", path="/usr/bin:/bin")
    if found is None:
        raise CannotError("this system has no /usr/bin/python3")
    return found


def _has(python: str, modules: list[str]) -> list[str]:
    script = "import sys, test; from importlib.util import find_spec\n"
    script += "print(*(m for m in sys.argv[1:] if find_spec('test.' + m)))"
    try:
        return run(python, "-c", script, *modules, cwd="/").output.split()
    except CannotError:
        return []


def prepare_cpython() -> str:
    """Installs the tests where they are not; returns the interpreter's version."""
    python = _python()
    major_minor = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = run(python, "-c", major_minor).output.strip()
    if not _has(python, ["test_os"]):
        install([f"libpython{version}-testsuite"])
    return run(python, "-c", "import platform; print(platform.python_version())").output.strip()


def cpython(place: Place, _: None) -> Score:
    """Runs the modules; counts their test cases."""
    python = _python()
    wanted = (SHORT_MODULES if place.short else MODULES).split()
    modules = _has(python, wanted)
    report = os.path.join(place.scratch, "report.xml")
    said = place.say(
        python, "-m", "test", "-j2", "--timeout=300", "--junit-xml", report,
        "--tempdir", place.path, *modules, seconds=1800,
    )  # fmt: skip
    score = Score("cpython", place.side, unit=f"test cases of {len(modules)} modules")
    score.left_out = [f"{m}: not in the package" for m in wanted if m not in modules]
    if os.path.exists(report):
        for case in ET.parse(report).iter("testcase"):
            score.total += 1
            bad = case.find("failure")
            bad = case.find("error") if bad is None else bad
            if bad is not None:
                text = (bad.text or bad.get("message") or "").strip()
                name = (case.get("name") or "").removeprefix("test.")
                score.failures.append(Failure(name, text.rpartition("\n")[2]))
    listed = re.findall(r"^\d+ tests? failed:\n((?: {4}.*\n)+)", said.output, re.MULTILINE)
    for module in " ".join(listed).split():
        if not any(failure.test.startswith(module + ".") for failure in score.failures):
            score.failures.append(Failure(module, "the module failed as a whole"))
    if said.status != 0 and not score.failures:
        score.failures.append(Failure("all", _end(said.output) or "it took too long"))
    return score


# ---------------------------------------------------------------- stress-ng

STRESSORS = """
access chattr chdir chmod chown copy-file dentry dir dirdeep dirmany dup fcntl filename flock
fpunch fstat getdent handle hdd inotify io iomix lease link locka lockf lockofd open rename
symlink sync-file touch utime xattr mmap seek sendfile splice aio
"""
SHORT_STRESSORS = "copy-file dir fcntl hdd link mmap rename symlink xattr"


def cannot_run(status: int | None) -> bool:
    """Tells stress-ng's statuses for lacking resources, and for a stressor not built here."""
    return status in {3, 4}


def prepare_stress_ng() -> str:
    """Installs it where it is not; returns its version."""
    return _program("stress-ng", "stress-ng")


def stress_ng(place: Place, _: None) -> Score:
    """Runs one stressor after the other; each is a test."""
    score = Score("stress-ng", place.side, unit="stressors")
    for name in (SHORT_STRESSORS if place.short else STRESSORS).split():
        said = place.say(
            "stress-ng", "--temp-path", place.path, "--verify",
            "--timeout", "1s" if place.short else "2s", f"--{name}", "1",
        )  # fmt: skip
        complaints = [line for line in said.output.splitlines() if ": fail:" in line]
        if cannot_run(said.status) and not complaints:
            score.left_out.append(f"{name}: {_end(said.output)}")
            continue
        score.total += 1
        if said.status != 0 or complaints:
            score.failures.append(Failure(name, (complaints or [_end(said.output)])[0]))
    return score


# ---------------------------------------------------------------- fio

JOBS = {
    "randrw psync 4k": "--ioengine=psync --rw=randrw --bs=4k",
    "randwrite mmap 4k": "--ioengine=mmap --rw=randwrite --bs=4k",
    "write psync, uneven blocks": "--ioengine=psync --rw=write --bsrange=512-48k --bs_unaligned",
    "randwrite pvsync 512 to 64k": "--ioengine=pvsync --rw=randwrite --bsrange=512-64k",
    "randwrite libaio, direct": "--ioengine=libaio --direct=1 --iodepth=8 --rw=randwrite --bs=8k",
    "write psync, fsync": "--ioengine=psync --rw=write --bs=16k --fsync=32",
    "write sync, made when opened": "--ioengine=sync --rw=write --bs=64k --create_on_open=1",
}
SHORT_JOBS = ("randrw psync 4k", "randwrite mmap 4k")


def prepare_fio() -> str:
    """Installs it where it is not; returns its version."""
    return _program("fio", "fio")


def fio(place: Place, _: None) -> Score:
    """Writes with each way of writing, and reads every checksum back; each is a test."""
    score = Score("fio", place.side, unit="ways to write, crc32c read back")
    for number, name in enumerate(SHORT_JOBS if place.short else JOBS):
        said = place.say(
            "fio", f"--name=job{number}", f"--directory={place.path}", "--numjobs=2",
            f"--size={8 if place.short else 48}m", "--verify=crc32c", "--verify_fatal=1",
            "--verify_state_save=0", "--fallocate=none", "--group_reporting",
            *JOBS[name].split(),
        )  # fmt: skip
        score.total += 1
        if said.status != 0 or "verify:" in said.output:
            score.failures.append(Failure(name, _end(said.output)))
        for made in os.listdir(place.path):
            os.unlink(os.path.join(place.path, made))
    return score


# ---------------------------------------------------------------- dbench, bonnie++


def prepare_dbench() -> str:
    """Installs it where it is not; returns its version."""
    return _program("dbench", "dbench")


def dbench(place: Place, _: None) -> Score:
    """Plays the load of a file server's clients; each client is a test."""
    clients = 4
    said = place.say("dbench", "-D", place.path, "-t", "2" if place.short else "10", str(clients))
    score = Score("dbench", place.side, total=clients, unit="clients")
    bad = [line for line in said.output.splitlines() if re.search(r"ERROR|failed", line)]
    if said.status != 0 or bad:
        score.failures.append(Failure("clients", (bad or [_end(said.output)])[0]))
    return score


def prepare_bonnie() -> str:
    """Installs it where it is not; returns its version."""
    return _program("bonnie++", "bonnie++")


def bonnie(place: Place, _: None) -> Score:
    """Runs its passes over one big file, but those byte by byte, and over many small ones."""
    user = ["-u", "root"] if os.geteuid() == 0 else []
    said = place.say(
        "bonnie++", "-d", place.path, "-s", "64", "-r", "32", "-n", "2", "-q", "-f", *user
    )
    score = Score("bonnie++", place.side, total=1, unit="run")
    if said.status != 0:
        score.failures.append(Failure("run", _end(said.output)))
    return score


def _program(name: str, package: str) -> str:
    if shutil.which(name) is None:
        install([package])
    try:
        found = run("dpkg-query", "--show", "-f=${Version}", package).output
    except (CannotError, FileNotFoundError):
        return ""
    return found.rpartition("-")[0] or found


def _end(output: str) -> str:
    return " ".join(output.strip().splitlines()[-3:])
