"""Asynchronous writes past the page cache: io_submit(2), which Python has no name for."""

import ctypes
import mmap
import os
import platform
import struct

_SETUP, _DESTROY, _GETEVENTS, _SUBMIT = (
    (206, 207, 208, 209) if platform.machine() == "x86_64" else (0, 1, 4, 2)
)
_PWRITE = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Writer:
    """Writes whole pages, all asked for at once."""

    def __init__(self) -> None:
        self._context = ctypes.c_ulong(0)
        _call(_SETUP, ctypes.c_uint(64), ctypes.byref(self._context))
        self._kept: list[object] = []
        self._count = 0

    def submit(self, fd: int, writes: list[tuple[int, bytes]]) -> None:
        """Asks for (offset, data) to be written; `fd` is open with O_DIRECT."""
        blocks, pointers = [], []
        for offset, data in writes:
            pages = mmap.mmap(-1, len(data))  # which is aligned
            pages[:] = data
            at = ctypes.addressof(ctypes.c_char.from_buffer(pages))
            block = ctypes.create_string_buffer(
                struct.pack(
                    "=QIIHhIQQqQII", 0, 0, 0, _PWRITE, 0, fd, at, len(data), offset, 0, 0, 0
                )
            )
            self._kept += [pages, block]
            blocks.append(block)
            pointers.append(ctypes.addressof(block))
        array = (ctypes.c_void_p * len(pointers))(*pointers)
        self._count += _call(_SUBMIT, self._context, ctypes.c_long(len(pointers)), array)

    def wait(self) -> list[int]:
        """Waits for all of them and returns what each has written, or a negative errno."""
        buffer = ctypes.create_string_buffer(32 * self._count)
        count = ctypes.c_long(self._count)
        _call(_GETEVENTS, self._context, count, count, buffer, None)
        found = [struct.unpack_from("=QQqq", buffer.raw, 32 * at)[2] for at in range(self._count)]
        self._count = 0
        return found

    def close(self) -> None:
        """Gives the context back."""
        _call(_DESTROY, self._context)
