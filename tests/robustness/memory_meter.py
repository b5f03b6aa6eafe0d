"""A custom node for the server of test_many_runs.py: the bytes that the process has allocated and not freed.

The size of a process is no such measure: it swings by percents with what the allocator keeps for later.
"""

import ctypes
import gc


class Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2; ``uordblks`` are the bytes in use in its heaps, ``hblkhd`` those in large blocks."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


class BytesInUse:
    """Runs where the other nodes run, so that nothing is being freed meanwhile."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "testing", "measure", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls):
        return float("nan")

    def measure(self):
        gc.collect()
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = Mallinfo2
        found = libc.mallinfo2()
        return {"ui": {"bytes": [found.uordblks + found.hblkhd]}}


NODE_CLASS_MAPPINGS = {"BytesInUse": BytesInUse}
