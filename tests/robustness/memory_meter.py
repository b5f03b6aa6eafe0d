"""A custom node for the server of test_many_runs.py that measures the bytes allocated and not freed by the process.

The size of the process would be less exact, because it includes the memory that the allocator caches.
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
    """A node that returns the bytes in use. Other nodes run in the same thread, so they free nothing meanwhile."""

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
        info = libc.mallinfo2()
        return {"ui": {"bytes": [info.uordblks + info.hblkhd]}}


NODE_CLASS_MAPPINGS = {"BytesInUse": BytesInUse}
