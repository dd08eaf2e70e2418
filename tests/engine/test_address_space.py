"""A process with little address space maps the store's file smaller, or says why it cannot."""

import subprocess
import sys
from pathlib import Path

from engine.storage.lmdb_store import LmdbStore

LIMITED = """
import resource, sys
from engine.storage.lmdb_store import LmdbStore
from engine.storage.store import Db, StoreMemoryError, Writer

def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

path, room = sys.argv[1], int(sys.argv[2]) << 20
resource.setrlimit(resource.RLIMIT_AS, (used() + room, resource.RLIM_INFINITY))

def put(writer: Writer) -> None:
    for number in range(64):
        writer.put(Db.CHUNKS, turn.to_bytes(2, "big") + bytes([number]), bytes(16_000))

try:
    store = LmdbStore(path)
    for turn in range(100):
        store.write(put)
        with store.read() as reader:
            assert reader.count(Db.CHUNKS) == 64 * (turn + 1)
    print("written")
except StoreMemoryError as error:
    print("no memory")
    with store.read() as reader:  # what was there is there
        assert reader.count(Db.CHUNKS) == 64 * turn
"""


def limited(path: Path, mebibytes: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), str(mebibytes)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_smaller_map_is_taken_and_grows(tmp_path: Path):
    LmdbStore(str(tmp_path / "store"), create=True).close()
    assert limited(tmp_path / "store", 600) == "written"


def test_what_is_too_small_for_growth_is_said_and_loses_nothing(tmp_path: Path):
    LmdbStore(str(tmp_path / "store"), create=True).close()
    assert limited(tmp_path / "store", 90) == "no memory"
