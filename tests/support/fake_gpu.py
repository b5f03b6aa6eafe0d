"""Fake GPUs: tensors on "cuda:0" and "cuda:1" that are in the memory of the CPU.

Inside ``FakeGPUs`` every call of torch is checked by Python code. A tensor that is created on a CUDA device, or moved
to it, is an ordinary CPU tensor that is marked with this device. Results of operations on it are marked as well.
- An operation on tensors of different devices raises MixedDevices, as on a GPU.
- A read of a marked tensor by the host raises HostWait, because on a GPU it waits for all work queued before it.
  Examples are item(), tolist(), bool(), .cpu(), boolean indices and nonzero(). Places in ``allowed`` may read.
- A blocking copy from the host within a step raises HostWait too. Examples are .to("cuda") and an index on the host.
- Allowed reads return the true values, and results have the same bits as in a run on the CPU.

torch's FakeTensorMode has no values, so no code after an allowed read could run. It also makes tensors on the host
unreadable. tests/fake_gpu/test_stand_in.py compares FakeGPUs with it.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
READS = frozenset(
    "item __bool__ __float__ __int__ __index__ __complex__ is_nonzero tolist numpy __array__ __contains__"
    " nonzero argwhere masked_select unique unique_consecutive equal allclose bincount".split()
)
UPLOADS = frozenset(("tensor", "as_tensor", "asarray", "new_tensor", "from_numpy"))
# functions whose tensors may be on different devices
ANY_DEVICE = frozenset(
    ("copy_", "_has_compatible_shallow_copy_type", "result_type", "__get__", "__set__", "is_same_size")
)
MARK = "_fake_gpu"
MEMORY = 1 << 34  # bytes


class MixedDevices(RuntimeError):
    """An operation on tensors of different devices."""


class HostWait(RuntimeError):
    """A wait of the host for a GPU, at a place that is not allowed to wait."""


def device_of(value: Tensor) -> torch.device | None:
    """The fake GPU of a tensor; None on the CPU."""
    return getattr(value, MARK, None)


def _tensors(value: Any, found: list[Tensor] | None = None) -> list[Tensor]:
    """The tensors in nested lists and dictionaries, appended to ``found``."""
    found = [] if found is None else found
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _tensors(part, found)
    elif isinstance(value, dict):
        for part in value.values():
            _tensors(part, found)
    return found


def _gpu(device: Any) -> torch.device | None:
    """The fake GPU for an argument ``device``; None for the CPU."""
    device = torch.device(device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else None


class _Event:
    """A CUDA event. Synchronizing with it counts as a wait for the GPU only within the step that recorded it."""

    def __init__(self, gpus: "FakeGPUs") -> None:
        self.gpus = gpus

    def record(self, stream: Any) -> None:
        self.recorded = self.gpus.clock

    def query(self) -> bool:
        """Whether the work before the event counts as finished."""
        return not self.gpus.in_step or self.recorded < self.gpus.clock

    def synchronize(self) -> None:
        if not self.query():
            self.gpus.wait("event")


class _Scalars(TorchDispatchMode):
    """Detects reads of single numbers inside torch's functions, such as of a tensor that is passed as a number."""

    def __init__(self, gpus: "FakeGPUs") -> None:
        super().__init__()
        self.gpus = gpus

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_read = func is torch.ops.aten._local_scalar_dense.default and device_of(args[0]) is not None
        if is_read and not self.gpus.counted:
            self.gpus.wait("read")
        return func(*args, **(kwargs or {}))


class _Delegate(TorchFunctionMode):
    """Applies the mode ``gpus`` in another thread."""

    def __init__(self, gpus: "FakeGPUs") -> None:
        super().__init__()
        self.gpus = gpus

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.gpus.__torch_function__(func, types, args, kwargs)


class FakeGPUs(TorchFunctionMode):
    """The fake GPUs that the module docstring describes.

    ``allowed``: places "file:function" of this repository that may wait outside of the context ``steps``. Within
    ``steps``, only the places passed to ``steps`` may wait. ``waits`` counts the waits by place. Waits of other
    packages are allowed and not counted.
    """

    def __init__(self, allowed: Collection[str] = ()) -> None:
        super().__init__()
        self.allowed = frozenset(allowed)
        self.waits: Counter[str] = Counter()
        self.in_step = False
        self.clock = 0  # steps begun
        self.counted = False  # whether the wait of the running function has been counted already
        self._scalars = _Scalars(self)

    def __enter__(self) -> "FakeGPUs":
        new_parameter = torch.nn.Parameter.__new__

        def marked_parameter(cls: type, data: Any = None, requires_grad: bool = True) -> Any:
            parameter = new_parameter(cls, data, requires_grad)
            return parameter if data is None else _marked(parameter, device_of(data), [data])

        self._patches = pytest.MonkeyPatch()
        self._patches.setattr(torch.nn.Parameter, "__new__", marked_parameter)  # torch function modes miss this call
        properties = SimpleNamespace(major=8, minor=0, name="fake GPU", total_memory=MEMORY)
        for name, function in {
            "Event": lambda *args, **kwargs: _Event(self),
            "current_stream": lambda device=None: None,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "synchronize": lambda device=None: self.wait("synchronization"),
            "get_device_properties": lambda device=None: properties,
            "get_device_name": lambda device=None: properties.name,
            "mem_get_info": lambda device=None: (MEMORY, MEMORY),
            "memory_stats": lambda device=None: Counter(),
        }.items():
            self._patches.setattr(torch.cuda, name, function)
        submit = ThreadPoolExecutor.submit

        def submit_within(pool: ThreadPoolExecutor, function: Any, *args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                with _Delegate(self), _Scalars(self):  # a mode applies to one thread only
                    return function(*args, **kwargs)

            return submit(pool, run)

        self._patches.setattr(ThreadPoolExecutor, "submit", submit_within)
        super().__enter__()
        self._scalars.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._scalars.__exit__(*error)
        super().__exit__(*error)
        self._patches.undo()

    @contextlib.contextmanager
    def steps(self, allowed: Collection[str] = ()) -> Iterator[None]:
        """A step of a loop: only the places ``allowed`` may wait."""
        self.begin_step()
        before = self.allowed, self.in_step
        self.allowed, self.in_step = frozenset(allowed), True
        try:
            yield
        finally:
            self.allowed, self.in_step = before

    def begin_step(self) -> None:
        """Begin the next step of a loop. Work queued in earlier steps counts as finished from here on."""
        self.clock += 1

    def wait(self, kind: str) -> None:
        """Count a wait of the calling code; raises HostWait if this code may not wait."""
        if kind == "upload" and not self.in_step:
            return
        frame = sys._getframe(1)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if "comfy" in file.parts or "comfy_extras" in file.parts:
                return
            if file.is_relative_to(ROOT) and not {".venv", ".host", "fake_gpu", "support"} & set(file.parts):
                break
            if file.parent.name == "fake_gpu" and file.is_relative_to(ROOT):  # the test itself
                break
            frame = frame.f_back
        if frame is None:
            return
        code = frame.f_code
        # a wait in a lambda or a comprehension counts for the function around it
        names = getattr(code, "co_qualname", code.co_name).split(".")
        place = f"{file.relative_to(ROOT)}:{next((n for n in reversed(names) if '<' not in n), code.co_name)}"
        self.waits[place] += 1
        if place not in self.allowed:
            raise HostWait(f"{kind} of a GPU tensor in {place}, line {frame.f_lineno}")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args[0])
        if name == "__set__":
            return self._set_attribute(func, *args)
        if name in ("to", "cpu", "cuda") and isinstance(args[0], Tensor):
            return self._moved(name, *args, **kwargs)
        given = _tensors(kwargs, _tensors(args)) if kwargs else _tensors(args)
        devices = {getattr(t, MARK, None) for t in given}
        if None in devices and len(devices) > 1 and name not in ("cat", "stack"):
            # a tensor of one number on the CPU may be mixed with tensors of any device
            devices = {getattr(t, MARK, None) for t in given if getattr(t, MARK, None) or t.dim() > 0}
        gpus = devices - {None}
        if gpus and name in READS:
            self.wait("read")
            self.counted = True
            try:
                return _marked(func(*args, **kwargs), next(iter(gpus)), given)
            finally:
                self.counted = False
        if gpus and name in ("__getitem__", "__setitem__"):
            devices = self._indexed(name, args)
        if name == "copy_" and len(devices) > 1:
            self._check_copy(device_of(args[1]), device_of(args[0]), kwargs.get("non_blocking", False))
        elif len(devices) > 1 and name not in ANY_DEVICE:
            found = " and ".join(sorted(str(d or "cpu") for d in devices))
            raise MixedDevices(f"{name}: expected all tensors on the same device, found {found}")
        target = next(iter(gpus), None)
        if kwargs.get("device") is not None:
            target = _gpu(kwargs.pop("device"))
            if target is not None and name in UPLOADS and not gpus:
                self.wait("upload")
        return _marked(func(*args, **kwargs), target, given)

    def _attribute(self, func: Any, value: Tensor) -> Any:
        device, attribute = device_of(value), func.__self__.__name__
        if device is None:
            return func(value)
        if attribute in ("device", "is_cuda", "is_cpu"):
            return {"device": device, "is_cuda": True, "is_cpu": False}[attribute]
        return _marked(func(value), device, [value])

    def _set_attribute(self, func: Any, value: Tensor, new: Any) -> None:
        func(value, new)
        if func.__self__.__name__ == "data":
            setattr(value, MARK, device_of(new))

    def _moved(self, name: str, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        source, copy = device_of(value), kwargs.pop("copy", False)
        if name == "to" and args and isinstance(args[0], Tensor):
            target, args = device_of(args[0]), (args[0].dtype, *args[1:])
            _, dtype, blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        elif name == "to":
            if "other" in kwargs:
                raise NotImplementedError("to(other=...)")
            device, dtype, blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
            target = source if device is None else _gpu(device)
        else:
            target = _gpu("cpu" if name == "cpu" else (args[0] if args else kwargs.get("device", "cuda")))
            dtype, memory_format, blocking = None, kwargs.get("memory_format"), kwargs.get("non_blocking", False)
        if _caller_file() == "clip_grad.py":  # clip_grad groups tensors by device in C++, which does not see the marks
            target = source
        if target != source:
            self._check_copy(source, target, blocking)
        options = {} if memory_format is None else {"memory_format": memory_format}
        out = value.to(dtype or value.dtype, copy=copy or target != source, **options)
        if out is not value:
            setattr(out, MARK, target)
        return out

    def _check_copy(self, source: torch.device | None, target: torch.device | None, non_blocking: bool) -> None:
        if source is not None and target is not None:  # between GPUs, without the host
            return
        if not non_blocking:
            self.wait("upload" if source is None else "read")

    def _indexed(self, name: str, args: Any) -> set[torch.device | None]:
        """The device of an indexed tensor, as a set; counts the waits for the index and for a written value."""
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        device = device_of(args[0])
        written = args[2] if name == "__setitem__" else None
        for part in index:
            if isinstance(part, list) or (isinstance(part, Tensor) and device_of(part) is None and part.dim() > 0):
                if device is not None:
                    self.wait("upload")
            elif isinstance(part, Tensor) and device_of(part) is not None:
                if device is None:
                    raise MixedDevices("a tensor on the CPU cannot be indexed by one on a GPU")
                is_one = not isinstance(written, Tensor) or written.numel() == 1
                is_mask = part.dtype in (torch.bool, torch.uint8) and not (name == "__setitem__" and is_one)
                if is_mask or part.dim() == 0:  # a tensor of one number as index is read as a number
                    self.wait("read")
        if isinstance(written, Tensor) and device_of(written) != device:
            # an assignment copies between devices
            self._check_copy(device_of(written), device, written.dim() == 0 and device_of(written) is None)
        return {device}


def _caller_file() -> str:
    """The name of the file whose code called torch; calls within this file are skipped."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return Path(frame.f_code.co_filename).name


def _marked(result: Any, device: torch.device | None, given: list[Tensor]) -> Any:
    """``result`` with its new tensors marked as on ``device``."""
    if device is not None:
        for found in _tensors(result):
            if not any(found is t for t in given):
                setattr(found, MARK, device)
    return result
