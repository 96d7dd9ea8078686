"""Page state changes as Linux 6.12 serves them, entry by entry, on the guest's buffer. Numbers are typed again.

`buffer` is header and entries: u16 cur_entry, u16 end_entry, u32 reserved, then u64 entries with the pages done in bits
11:0, the guest page in 51:12, the operation in 55:52 and the size in bit 56.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

Exit = tuple[int, int, int]
"""Guest address, number of 4 KiB pages, attributes: bit 4 encrypted, bit 0 a 2 MiB entry."""
INVALID_HEADER, INVALID_ENTRY, FAILED = 0x1_00000001, 0x1_00000002, 0x100_00000000


def serve(buffer: bytearray, ask: Callable[[Exit], int]) -> int:
    """Serve the buffer in place, with one question for each run of pages: SW_EXITINFO2."""
    capacity = (len(buffer) - 8) // 8
    while True:
        index, end = struct.unpack_from("<HH", buffer)
        if end >= capacity:
            return INVALID_HEADER
        while index <= end:
            done, gfn, operation, large = _entry(buffer, index)
            pages = 512 if large else 1
            if done > pages or gfn % pages:
                _set_index(buffer, index)
                return INVALID_ENTRY
            if done < pages:
                break
            index += 1
        _set_index(buffer, index)
        if index > end:
            return 0
        run = [index]
        while done == 0 and run[-1] < end:
            before = _entry(buffer, run[-1])
            after = _entry(buffer, run[-1] + 1)
            follows = after[1] == before[1] + (512 if before[3] else 1)
            if not (follows and after[0] == 0 and after[2:] == (operation, large)):
                break
            run.append(run[-1] + 1)
        if operation in (1, 2):
            count = (512 if large else 1) * len(run) - done
            attributes = (16 if operation == 1 else 0) | (1 if large else 0)
            if ask(((gfn + done) << 12, count, attributes)):
                return FAILED
        for each in run:
            _, gfn, operation, large = _entry(buffer, each)
            word = struct.unpack_from("<Q", buffer, 8 + 8 * each)[0]
            struct.pack_into("<Q", buffer, 8 + 8 * each, word - word % 4096 + (512 if large else 1))
        _set_index(buffer, run[-1] + 1)


def _entry(buffer: bytearray, index: int) -> tuple[int, int, int, int]:
    word = struct.unpack_from("<Q", buffer, 8 + 8 * index)[0]
    return word % 4096, word // 4096 % 2**40, word // 2**52 % 16, word // 2**56 % 2


def _set_index(buffer: bytearray, index: int) -> None:
    struct.pack_into("<H", buffer, 0, index)
