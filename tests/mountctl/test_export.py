import io
import os
import select
import signal
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.engine.trees import noise


@pytest.mark.parametrize("end", ["tar", "tar.gz", "tar.xz", "tar.zst"])
def test_an_archive_out_and_in(mountctl, first, tmp_path, end):
    file = tmp_path / f"x.{end}"
    made = mountctl.json("export", "main", "--tar", file)
    assert made["entries"] == mountctl.json("snapshot", "show", "main")["entries"] + 1
    data = file.read_bytes()
    mountctl("export", "main", "--tar", file)
    assert file.read_bytes() == data
    back = mountctl.json("import", "--tar", file, "--ref", "main")
    assert back["snapshot"] == first
    assert not back["changed"]
    other = mountctl.json("import", "--tar", file, "-m", "other")["snapshot"]
    assert mountctl.json("diff", "main", other)["entries"] == []


def test_through_pipes(mountctl, first):
    archive = subprocess.run(
        mountctl.command("export", "main:src", "--tar", "-"), env=mountctl.environment(),
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(archive)) as found:
        assert found.getnames() == [".", "empty", "main.c", "tool.sh"]
    done = subprocess.run(
        mountctl.command("import", "--tar", "-", "--json"), env=mountctl.environment(),
        input=archive, capture_output=True, check=True,
    )  # fmt: skip
    assert b'"entries": 3' in done.stdout


def test_what_is_no_file_is_written_to_and_not_replaced(mountctl, first, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(
        mountctl.command("export", "main", "--tar", pipe), env=mountctl.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        archive = pipe.read_bytes()
        child.communicate(timeout=120)
    assert child.returncode == 0
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    with tarfile.open(fileobj=io.BytesIO(archive)) as found:
        assert "src/main.c" in found.getnames()
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    assert f"{full}: No space" in mountctl.fails(8, "export", "main", "--tar", full)
    assert "space" in mountctl.fails(8, "bundle", "create", full, "main")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    nowhere = tmp_path / "none" / "x"
    said = mountctl.fails(11, "export", "main", "--tar", nowhere)
    assert f"{nowhere}: No such file" in said


def test_a_link_to_a_file_stays_one(mountctl, first, tmp_path):
    (tmp_path / "old.tar").write_bytes(b"old")
    link = tmp_path / "latest.tar"
    link.symlink_to("old.tar")
    mountctl("export", "main", "--tar", link)
    assert link.is_symlink()
    assert tarfile.is_tarfile(tmp_path / "old.tar")
    assert sorted(p.name for p in tmp_path.iterdir() if "tar" in p.name) == [
        "latest.tar", "old.tar"
    ]  # fmt: skip


def test_an_image_out_and_in(mountctl, upper, tmp_path):
    (upper / "new").write_text("new\n")
    made = mountctl.json("export", "@work", "--oci", tmp_path / "image")
    assert len(made["layers"]) == 2
    back = mountctl.json("import", "--oci", tmp_path / "image", "--ref", "image")
    assert mountctl.json("diff", "image", "@work")["entries"] == []
    assert back["ref"] == "image"
    assert "a/b" not in mountctl("export", "main", "--oci", tmp_path / "other").stdout


def test_what_is_wrong_is_said(mountctl, first, tmp_path):
    mountctl.fails(2, "export", "main")
    mountctl.fails(2, "export", "main", "--tar", "x", "--oci", "y")
    mountctl.fails(2, "export", "main:src", "--oci", tmp_path / "y")
    mountctl.fails(2, "export", "main", "--oci", tmp_path / "y", "--compress", "xz")
    mountctl.fails(2, "import")
    mountctl.fails(2, "import", tmp_path, "--tar", "x")
    mountctl.fails(2, "import", tmp_path, "--image", "x")
    mountctl.fails(2, "import", "--tar", "x", "--no-cache")
    mountctl.fails(3, "export", "nothing", "--tar", tmp_path / "x")
    mountctl.fails(3, "export", "main:nothing", "--tar", tmp_path / "x")
    mountctl.fails(4, "export", "main:data.bin", "--tar", tmp_path / "x")
    mountctl.fails(4, "export", "main", "--oci", tmp_path / "tree")
    mountctl.fails(4, "import", "--oci", tmp_path / "tree")
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"no archive" * 100)
    mountctl.fails(9, "import", "--tar", bad)
    hostile = tarfile.TarInfo("../x").tobuf() + bytes(1024)
    bad.write_bytes(hostile)
    assert "leads out of the tree" in mountctl.fails(4, "import", "--tar", bad)
    assert len(mountctl.json("snapshot", "list")) == 1
    assert not (tmp_path / "x").exists()


def test_killed_while_it_reads_a_pipe(mountctl, first, tmp_path):
    random = tmp_path / "noise"
    random.mkdir()
    (random / "long").write_bytes(noise(20_000_000))
    file = tmp_path / "x.tar"
    subprocess.run(["tar", "-cf", file, "-C", random, "."], check=True)
    for words in (["import", "--tar", "-", "--ref", "killed"], ["import", "--tar", "-"]):
        child = subprocess.Popen(
            mountctl.command(*words), env=mountctl.environment(), stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert child.stdin is not None
        child.stdin.write(file.read_bytes()[:15_000_000])
        child.kill()
        child.stdin.close()
        assert child.wait() == -9
        assert [each["snapshot"] for each in mountctl.json("snapshot", "list")] == [first]
        assert [each["ref"] for each in mountctl.json("ref", "list")] == ["main"]
        assert mountctl.json("verify")["damage"] == []
    mountctl("import", "--tar", file)
    assert mountctl.json("verify")["damage"] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_that_help_end_with_the_one_they_help(mountctl, tmp_path, number):
    tree = tmp_path / "many"
    tree.mkdir()
    (tree / "first").write_bytes(noise(8_000_000))
    with (tree / "holes").open("wb") as file:  # large enough to be worth several processes
        file.truncate(1 << 30)
    mountctl("import", tree, "--ref", "main")
    with subprocess.Popen(
        mountctl.command("export", "main", "--tar", "-"), env=mountctl.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.read(1 << 20)  # they were started before the first byte
        below = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text()
        handles = [os.pidfd_open(int(pid)) for pid in below.split()]
        assert len(handles) == min(len(os.sched_getaffinity(0)), 4)
        child.send_signal(number)
        child.communicate(timeout=30)
    assert child.returncode != 0
    for handle in handles:
        assert select.select([handle], [], [], 30)[0]
        os.close(handle)
