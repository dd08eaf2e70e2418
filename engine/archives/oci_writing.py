"""OCI out: states of a tree become the layers of an image layout, the same bytes every time.

Each state is a layer: what differs from the state before, as the image specification has it
(opencontainers/image-spec, layer.md), an empty file `.wh.NAME` for what was removed. A directory
that differs in anything comes with its attributes; of a hard link that changes, all names come.
Everything is made in a directory beside the target and renamed when it is whole.
"""

import gzip
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from typing import IO, Any

import msgspec

from engine.archives.tar_reading import WHITEOUT
from engine.archives.tar_writing import TarWriter, everything
from engine.errors import EngineError
from engine.progress import Progress, unheard
from engine.storage.nodes import Entry, Kind
from engine.storage.objects import Objects
from engine.trees.diffing import pairs
from engine.trees.directory import directory_id, walk
from engine.trees.links import linked

State = tuple[str, Entry]
"""What a layer is called, and the tree that it and those before it make."""

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
NAME = "org.opencontainers.image.ref.name"


class ImageRefusedError(EngineError):
    """A tree cannot be an image, or a directory is none that can be read. `path` names where."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path!r}: {why}")
        self.path, self.why = path, why


class OciReport(msgspec.Struct, frozen=True):
    """What was made: digests of the manifest and the layers, and bytes of all blobs.

    `set_id_dropped` members lost their set-id bits.
    """

    manifest: str
    layers: tuple[str, ...]
    bytes: int
    set_id_dropped: int = 0


def write_image(
    objects: Objects,
    states: Sequence[State],
    target: str,
    *,
    image: str = "latest",
    architecture: str = "amd64",
    set_id: bool = False,
    progress: Progress | None = None,
) -> OciReport:
    """Makes an image layout at `target`, which must not exist or be an empty directory.

    An image's files are root's: set-id bits are written with `set_id` only.

    Raises ImageRefusedError, OSError, and damage of objects; then there is nothing new.
    """
    target = os.path.abspath(target)
    if os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise ImageRefusedError(target, "it exists and is not an empty directory")
    parent, name = os.path.split(target)
    temporary = os.path.join(parent, f".{name[:50]}.image-{secrets.token_hex(4)}")
    os.makedirs(os.path.join(temporary, "blobs", "sha256"))
    maker = os.getpid()
    try:
        report = _Image(objects, temporary, progress, set_id).make(states, image, architecture)
        os.rename(temporary, target)
    except BaseException:
        if os.getpid() == maker:  # not in a child that `progress` has forked
            shutil.rmtree(temporary)
        raise
    return report


class _Image:
    def __init__(
        self, objects: Objects, path: str, progress: Progress | None, set_id: bool
    ) -> None:
        self.objects, self.path, self.set_id = objects, path, set_id
        self.dropped = 0
        self.tell = progress or unheard
        self.bytes = self.members = self.plain_bytes = 0

    def make(self, states: Sequence[State], image: str, architecture: str) -> OciReport:
        layers, ids, history = [], [], []
        before: Entry | None = None
        for label, state in states:
            descriptor, plain = self.layer(before, state)
            layers.append(descriptor)
            ids.append(plain)
            history.append({"created_by": label})
            before = state
        config = self.document(CONFIG, {
            "architecture": architecture, "os": "linux", "config": {}, "history": history,
            "rootfs": {"type": "layers", "diff_ids": ids},
        })  # fmt: skip
        manifest = self.document(MANIFEST, {
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers,
        })  # fmt: skip
        manifest["annotations"] = {NAME: image}
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest]}
        for name, value in (("index.json", index), ("oci-layout", {"imageLayoutVersion": "1.0.0"})):
            with open(os.path.join(self.path, name), "xb") as out:
                out.write(_json(value))
                out.flush()
                os.fsync(out.fileno())
        digests = tuple(str(layer["digest"]) for layer in layers)
        return OciReport(str(manifest["digest"]), digests, self.bytes, self.dropped)

    def layer(self, before: Entry | None, state: Entry) -> tuple[dict[str, Any], str]:
        """Writes a layer and returns its descriptor, and the digest of what is compressed."""
        path = os.path.join(self.path, "blobs", "layer")
        with (
            open(path, "xb") as file,
            # Closed on every way out: Python 3.13 warns of one that is only forgotten.
            gzip.GzipFile("", "wb", 6, packed := _Hashing(file), mtime=0) as zipped,
        ):
            plain = _Hashing(zipped)  # type: ignore[arg-type]  # both write, and no more is asked
            before_bytes = self.plain_bytes

            def tell() -> None:
                self.plain_bytes = before_bytes + writer.report.bytes
                self.tell(self.members, None, self.plain_bytes)

            writer = TarWriter(
                self.objects, plain, tell, set_id=self.set_id,  # type: ignore[arg-type]  # likewise
            )  # fmt: skip
            members = everything(self.objects, state) if before is None else (
                difference(self.objects, before, state))  # fmt: skip
            for where, entry in members:
                name = where.rpartition(b"/")[2]
                if name.startswith(WHITEOUT):
                    raise ImageRefusedError(
                        os.fsdecode(where), "the name means a whiteout in an image"
                    )
                if entry is None:
                    writer.mark(where[: len(where) - len(name)] + WHITEOUT + name)
                else:
                    writer.add(where, entry)
                self.members += 1
                tell()
            writer.end()
            self.dropped += writer.report.set_id_dropped
            zipped.close()
            file.flush()
            os.fsync(file.fileno())
        return self.keep(LAYER, path, packed), "sha256:" + plain.hasher.hexdigest()

    def document(self, kind: str, value: Any) -> dict[str, Any]:
        path = os.path.join(self.path, "blobs", "document")
        with open(path, "xb") as file:
            hashing = _Hashing(file)
            hashing.write(_json(value))
            file.flush()
            os.fsync(file.fileno())
        return self.keep(kind, path, hashing)

    def keep(self, kind: str, path: str, written: "_Hashing") -> dict[str, Any]:
        digest = written.hasher.hexdigest()
        os.rename(path, os.path.join(self.path, "blobs", "sha256", digest))
        self.bytes += written.bytes
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": written.bytes}


class _Hashing:
    def __init__(self, out: IO[bytes]) -> None:
        self._out, self.hasher, self.bytes = out, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self._out.write(data)
        self.hasher.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._out.flush()


def difference(objects: Objects, old: Entry, new: Entry) -> Iterator[tuple[bytes, Entry | None]]:
    """Yields the members of a layer over `old` that shows `new`; None for what is removed.

    A directory before what is in it. Memory follows the difference.
    """
    members: dict[bytes, Entry | None] = {}
    stack = [(b"", old, new)]
    while stack:
        path, before, after = stack.pop()
        for one, other in pairs(objects, before, after):
            name = (other or one or after).name
            child = path + b"/" + name if path else name
            members[child] = other
            if other is None or other.kind != Kind.DIRECTORY:
                continue
            if one is None or one.kind != Kind.DIRECTORY:
                members.update(walk(objects, other, child))
            elif directory_id(one) != directory_id(other):
                stack.append((child, one, other))
    groups = {each.link.group for each in members.values() if each is not None and each.link}
    if groups:
        members |= {
            path: entry
            for path, entry in _links(objects, new, b"")
            if entry.link is not None and entry.link.group in groups
        }
    yield b".", new
    for path in sorted(members, key=lambda path: path.split(b"/")):
        yield path, members[path]


def _links(objects: Objects, directory: Entry, path: bytes) -> Iterator[tuple[bytes, Entry]]:
    for entry in linked(objects, directory):
        child = path + b"/" + entry.name if path else entry.name
        if entry.kind == Kind.DIRECTORY:
            yield from _links(objects, entry, child)
        else:
            yield child, entry


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
