"""OCI in: the layers of an image layout, one over the other, become one tree.

Every blob is checked against its digest and size before anything can be seen of it. Digests
name files, so only `sha256:` with 64 hexadecimal digits is one; a blob that is a link or no
file is not opened. Documents are bounded, and indexes that name indexes are followed a few deep.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from engine.archives.oci_writing import NAME, ImageRefusedError
from engine.archives.tar_reading import TarReader
from engine.errors import EngineError
from engine.progress import Progress

LONGEST_DOCUMENT = 4 << 20
_MOST_LAYERS = 1000
_MOST_MANIFESTS = 1000
_DEEPEST = 4
_PIECE = 1 << 20
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_ATTACHED = {"vnd.docker.reference.type", "dev.cosignproject.cosign/imageref"}
"""Annotations of manifests that are no images, but say something of one: how it was built
(BuildKit's attestations), who has signed it."""
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class ImageChoiceError(ImageRefusedError):
    """Not one image of a layout is meant, but none or several. `names` are those there are."""

    def __init__(self, path: str, number: int, names: list[str]) -> None:
        what = ", ".join(names[:10]) + (", …" if len(names) > 10 else "") or "none"
        super().__init__(path, f"{number} images are meant; there are: {what}")
        self.number, self.names = number, names


class ImageDamagedError(EngineError):
    """A blob of an image is not what its digest or size says. `path` is its file."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"the image's file {path!r} is damaged: {why}")
        self.path, self.why = path, why


def read_image(
    path: str, reader: TarReader, *, image: str | None = None, progress: Progress | None = None
) -> None:
    """Reads the layers of an image, from the lowest up, into a layered `reader`.

    `image` is needed where there are several. Raises ImageRefusedError, ImageDamagedError, and
    what reading an archive does.
    """
    job = _Layout(path)
    manifest = job.choose(image)
    layers = _list(manifest.get("layers"), path, "its manifest has no list of layers")
    for layer in layers:
        kind = layer.get("mediaType") if isinstance(layer, dict) else None
        if kind is not None and ("tar" not in str(kind) or "encrypted" in str(kind)):
            raise ImageRefusedError(path, f"{str(kind)[:100]!r} is no layer of files")
    if job.attached:
        reader.report.left_out["attestation"] = job.attached
    if len(layers) > _MOST_LAYERS:
        raise ImageRefusedError(path, f"it has {len(layers):,} layers")
    total = sum(_size(layer, path) for layer in layers)
    done = 0
    for layer in layers:
        with job.blob(layer) as stream:
            reader.read(stream, partial(_tell, progress, total, done))
        done += _size(layer, path)


def _tell(progress: Progress | None, total: int, before: int, at: int) -> None:
    if progress is not None:
        progress(min(before + at, total), total)


class _Layout:
    def __init__(self, path: str) -> None:
        self.path = path
        self.attached = 0
        if not os.path.isdir(path):
            raise ImageRefusedError(path, "it is not a directory")

    def choose(self, image: str | None) -> dict[str, Any]:
        """Returns the manifest of the image that is meant."""
        with self.opened(os.path.join(self.path, "index.json")) as stream:
            index = self.document(stream)
        found: list[tuple[str, dict[str, Any]]] = []
        self.collect(index, "", 0, found)
        titles = [name for name, _ in found]
        # What has no name of its own is known by its digest.
        names = sorted(
            name if name and titles.count(name) == 1 else str(each.get("digest"))
            for name, each in found
        )
        if image is not None:
            found = [each for each in found if image in {each[0], each[1].get("digest")}]
        if len(found) != 1:
            raise ImageChoiceError(self.path, len(found), names)
        return self.load(found[0][1])

    def collect(
        self, index: dict[str, Any], name: str, depth: int, found: list[tuple[str, dict[str, Any]]]
    ) -> None:
        if depth > _DEEPEST:
            raise ImageRefusedError(self.path, "its indexes name indexes too deeply")
        for each in _list(index.get("manifests"), self.path, "its index has no manifests"):
            if not isinstance(each, dict) or len(found) >= _MOST_MANIFESTS:
                raise ImageRefusedError(self.path, "its index is wrong or too long")
            annotations = each.get("annotations")
            annotations = annotations if isinstance(annotations, dict) else {}
            if "artifactType" in each or _ATTACHED & annotations.keys():
                self.attached += 1
                continue
            own = annotations.get(NAME)
            platform = each.get("platform")
            if own is None and isinstance(platform, dict):
                parts = [platform.get(key) for key in ("os", "architecture", "variant")]
                own = f"{name}@{'/'.join(str(part) for part in parts if part is not None)}"
            title = str(own) if own is not None else name
            if "index" in str(each.get("mediaType")) or "list" in str(each.get("mediaType")):
                self.collect(self.load(each), title, depth + 1, found)
            else:
                found.append((title, each))

    def load(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        with self.blob(descriptor) as stream:
            return self.document(stream)

    def document(self, stream: IO[bytes]) -> dict[str, Any]:
        data = stream.read(LONGEST_DOCUMENT + 1)
        if len(data) > LONGEST_DOCUMENT:
            raise ImageRefusedError(self.path, "a document of it is too long")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ImageRefusedError(self.path, f"a document of it is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise ImageRefusedError(self.path, "a document of it is no JSON object")
        return value

    @contextmanager
    def blob(self, descriptor: Any) -> Iterator[IO[bytes]]:
        """Gives a blob to read, which was found to be what its descriptor says."""
        text = descriptor.get("digest") if isinstance(descriptor, dict) else None
        found = _DIGEST.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ImageRefusedError(self.path, f"{str(text)[:100]!r} is no sha256 digest")
        size = _size(descriptor, self.path)
        path = os.path.join(self.path, "blobs", "sha256", found[1])
        with self.opened(path) as stream:
            if os.fstat(stream.fileno()).st_size != size:
                raise ImageDamagedError(path, f"it does not have {size:,} bytes")
            hasher = hashlib.sha256()
            while data := stream.read(_PIECE):
                hasher.update(data)
            if hasher.hexdigest() != found[1]:
                raise ImageDamagedError(path, "its bytes do not match its digest")
            stream.seek(0)
            yield stream

    @contextmanager
    def opened(self, path: str) -> Iterator[IO[bytes]]:
        try:
            fd = os.open(path, _OPEN)
        except OSError as error:
            raise ImageRefusedError(path, error.strerror or "it cannot be opened") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ImageRefusedError(path, "it is not a regular file")
        with open(fd, "rb") as stream:
            yield stream


def _size(descriptor: Any, path: str) -> int:
    size = descriptor.get("size") if isinstance(descriptor, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ImageRefusedError(path, "a descriptor of it has no size")
    return size


def _list(value: Any, path: str, why: str) -> list[Any]:
    if not isinstance(value, list):
        raise ImageRefusedError(path, why)
    return value
