"""A CUDA device played on the CPU: mixed devices raise, and waits for the device are counted.

    with FakeCuda() as cuda:
        model.to("cuda")                              # or a trainer's train(): see below
        packed_logps(model, pack(…, device="cuda")).logps.sum().backward()
    assert cuda.syncs == []                           # `.item()`, `.tolist()`, boolean masks …
    assert len(cuda.uploads) == 2                     # copies from the host

Every tensor stays an ordinary CPU tensor, so that all kernels, autograd included, run as they are.
What lies "on the device" is known by its storage: made there by a factory with `device="cuda"`,
copied there, or computed from what lies there. Two modes do the work. One sees Python's calls: it
answers `.device` and `.is_cuda`, and takes devices and pinned memory out of arguments. The other
sees the operators below, those of the backward pass included: it spreads the marks, and refuses an
operator that is given a device tensor and a host tensor of one dimension or more, as CUDA would.

Inside, accelerate and transformers believe in this device too: a trainer that is built there,
with `use_cpu=True`, puts its model and batches on it, and `train()` runs whole steps. Not played:
streams, CUDA's random numbers, gradient checkpointing (it asks CUDA for its random state).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ROOT = f"{Path(__file__).parents[2]}/"
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

# Operators that make the host wait for their result, or for the size of it.
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# Copies may cross devices; the mode above counts those that Python asks for.
COPIES = {aten.copy_.default, aten._to_copy.default}
JOINING = {aten.cat.default, aten.stack.default}  # these refuse even numbers of the host
BENEATH = ("/torch/", "/jaxtyping/", "beartype", "contextlib", "<string>")  # parts of paths
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray}  # with a device: a copy from a list


class Event(NamedTuple):
    """Something that crossed between host and device, and the line that asked for it.

    pinned: an upload from pinned memory that does not wait; every other upload does.
    """

    what: str
    site: str
    pinned: bool = False

    def __str__(self) -> str:
        return f"{self.what} at {self.site}"


class MixedDevices(RuntimeError):
    """An operator was given tensors of the device and of the host."""


class FakeCuda:
    """A context in which `cuda` is a device; collects `syncs` and `uploads` (lists of Event)."""

    device = CUDA

    def __init__(self) -> None:
        self.syncs: list[Event] = []
        self.uploads: list[Event] = []
        self._storages: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        # Where tensors lie that an operator makes out of nothing; None outside calls from Python.
        self.makes_on_device: bool | None = None
        self._stack = ExitStack()
        self.has_the_loss = True  # of the backward pass that runs

    def __enter__(self) -> FakeCuda:
        self._stack.enter_context(_believed_in())
        self._stack.enter_context(_Operators(self))
        self._stack.enter_context(_Calls(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def syncs_in(self, part: str) -> list[Event]:
        """The waits whose line has `part` in its path, e.g. `posttrain/packed`."""
        return [event for event in self.syncs if part in event.site]

    def uploads_in(self, part: str) -> list[Event]:
        """The copies from the host whose line has `part` in its path."""
        return [event for event in self.uploads if part in event.site]

    def holds(self, tensor: Tensor) -> bool:
        """True for a tensor that lies on the device."""
        return _knows(self._storages, tensor)

    def add(self, tensor: Tensor) -> None:
        """Mark the storage of a tensor as lying on the device."""
        _note(self._storages, tensor)

    def pin(self, tensor: Tensor) -> None:
        """Mark the storage of a host tensor as pinned."""
        _note(self._pinned, tensor)

    def note_sync(self, what: str) -> None:
        """Count one wait of the host for the device."""
        self.syncs.append(Event(what, _site()))

    def note_upload(self, what: str, source: object = None, *, non_blocking: bool = False) -> None:
        """Count one copy from the host to the device."""
        pinned = isinstance(source, Tensor) and _knows(self._pinned, source)
        self.uploads.append(Event(what, _site(), pinned and non_blocking))


def _tensors(tree: object) -> Iterator[Tensor]:
    """The tensors in lists, tuples and dictionaries; faster than torch's tree_leaves."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from _tensors(part)


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """A tensor's memory; None for one that has none, as on `meta`."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # below grad, jvp and vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if not torch._C._has_storage(tensor) or tensor.is_meta:
        return None
    return tensor.untyped_storage()


def _knows(marks: dict[int, StorageWeakRef], tensor: Tensor) -> bool:
    storage = _storage(tensor)
    return storage is not None and storage._cdata in marks


def _note(marks: dict[int, StorageWeakRef], tensor: Tensor) -> None:
    storage = _storage(tensor)
    if storage is None or storage._cdata in marks:
        return
    # A weak reference keeps the storage's address from being used anew, not its memory.
    marks[storage._cdata] = StorageWeakRef(storage)
    if len(marks) % 4096 == 0:
        for other in [k for k, reference in marks.items() if reference.expired()]:
            del marks[other]


def _site() -> str:
    """The innermost line outside torch: `posttrain/…/file.py:12 in function`."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if path != __file__ and not any(part in path for part in BENEATH):
            break
        frame = frame.f_back
    _, is_installed, rest = frame.f_code.co_filename.rpartition("/site-packages/")
    path = rest if is_installed else frame.f_code.co_filename.removeprefix(ROOT)
    return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"


class _Operators(TorchDispatchMode):
    """Spreads the marks over results, refuses mixtures, counts operators that wait."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        del types
        inputs = list(_tensors((args, kwargs)))
        on_device = [x for x in inputs if self.cuda.holds(x)]
        if on_device and operator not in COPIES:
            self._check(operator, inputs, args)
        result = operator(*args, **(kwargs or {}))
        made_here = self.cuda.makes_on_device
        if made_here is None:  # zeros that the engine makes for a gradient that nobody gave
            made_here = self.cuda.has_the_loss and torch._C._current_autograd_node() is not None
        if (on_device and operator is not aten.copy_.default) or (made_here and not inputs):
            for output in _tensors(result):
                self.cuda.add(output)
        return result

    def _check(self, operator: Any, inputs: list[Tensor], args: tuple) -> None:
        if operator in WAITING or (operator in INDEXING and _indexes_by_mask(operator, args)):
            self.cuda.note_sync(str(operator))
        host = [x for x in inputs if not self.cuda.holds(x) and not x.is_meta]
        if operator in INDEXING and self.cuda.holds(args[0]):
            # Indices may lie on the host, lists among them: they are copied, and waited for.
            places = [x for x in args[1] if isinstance(x, Tensor)]
            for place in (x for x in places if not self.cuda.holds(x)):
                self.cuda.note_upload(f"indices of {operator}", place)
            host = [x for x in host if all(x is not place for place in places)]
        if any(x.dim() > 0 or operator in JOINING for x in host):
            shapes = ", ".join(
                f"{'cuda' if self.cuda.holds(x) else 'cpu'} {tuple(x.shape)}" for x in inputs
            )
            raise MixedDevices(f"{operator} at {_site()}: tensors of two devices ({shapes})")


def _indexes_by_mask(operator: Any, args: tuple) -> bool:
    """True for x[mask] and x[mask] = values, whose size the host must know."""
    masks = [x for x in args[1] if isinstance(x, Tensor) and x.dtype == torch.bool]
    # One number written by a mask is a masked_fill, which waits for nothing.
    return bool(masks) and (operator is aten.index.Tensor or args[2].numel() != 1)


class _Calls(TorchFunctionMode):
    """Takes `cuda` and pinned memory out of calls, and answers where a tensor lies."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, function, types, args=(), kwargs=None):
        del types
        kwargs = dict(kwargs or {})
        special = SPECIAL.get(function) or GETTERS.get(getattr(function, "__self__", None))
        if special:
            return special(self, function, args, kwargs)
        return self._made(function, args, kwargs)

    def _made(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Any other call; with a device it makes its result there."""
        pinned = kwargs.pop("pin_memory", False)
        on_cuda = "device" in kwargs and _is_cuda(kwargs["device"])
        if on_cuda:
            kwargs["device"] = CPU
            if isinstance(kwargs.get("generator"), torch.Generator):
                raise MixedDevices(f"{function} at {_site()}: a generator of the host")
            if function in FROM_HOST:
                self.cuda.note_upload(f"{function.__name__}(…, device)", args[0])
        # A mask that attention makes inside lies where its queries lie; `torch.zeros(3)` does not.
        before = self.cuda.makes_on_device
        self.cuda.makes_on_device = any(self.cuda.holds(x) for x in _tensors((args, kwargs)))
        try:
            result = function(*args, **kwargs)
        finally:
            self.cuda.makes_on_device = before
        if on_cuda:
            self.cuda.add(result)
        elif pinned:
            self.cuda.pin(result)
        return result

    def _to(self, function: Any, args: tuple, kwargs: dict) -> Tensor:
        del function
        tensor, *others = args
        like = next((x for x in (*others, kwargs.get("other")) if isinstance(x, Tensor)), None)
        if like is not None:
            device, dtype, non_blocking = self._device_of(like), like.dtype, False
        else:
            copying = kwargs.pop("copy", False)
            memory_format = kwargs.pop("memory_format", None)
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*others, **kwargs)
            kwargs = {"copy": copying, "memory_format": memory_format}
        kwargs = {name: value for name, value in kwargs.items() if value and name != "other"}
        result = tensor.to(dtype or tensor.dtype, **kwargs)
        return result if device is None else self._move(tensor, result, device, non_blocking)

    def _move(self, tensor: Tensor, result: Tensor, device: Any, non_blocking: bool) -> Tensor:
        """`result`, computed from `tensor`, as a tensor of the device that was asked for."""
        was = self.cuda.holds(tensor)
        if was == _is_cuda(device) or torch.device(device).type == "meta":
            return result
        if was:
            self.cuda.note_sync("a copy to the host")
            return _unmarked(result)
        self.cuda.note_upload("a copy", tensor, non_blocking=non_blocking)
        result = result.clone()  # its own storage: the source stays on the host
        self.cuda.add(result)
        return result

    def _cuda(self, function: Any, args: tuple, kwargs: dict) -> Tensor:
        del function
        return self._move(args[0], args[0], CUDA, kwargs.get("non_blocking", False))

    def _cpu(self, function: Any, args: tuple, kwargs: dict) -> Tensor:
        del function, kwargs
        return self._move(args[0], args[0], CPU, False)

    def _pin_memory(self, function: Any, args: tuple, kwargs: dict) -> Tensor:
        del function, kwargs
        result = args[0].clone()
        self.cuda.pin(result)
        return result

    def _copy(self, function: Any, args: tuple, kwargs: dict) -> Tensor:
        """`target.copy_(source)`, either way."""
        target, source = args[:2]
        there, here = self.cuda.holds(target), self.cuda.holds(source)
        if there and not here:
            non_blocking = kwargs.get("non_blocking", False)
            self.cuda.note_upload("copy_", source, non_blocking=non_blocking)
        elif here and not there:
            self.cuda.note_sync("copy_ to the host")
        return function(*args, **kwargs)

    def _read(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """`.tolist()` and `.numpy()` read memory without an operator that could be seen."""
        if self.cuda.holds(args[0]):
            self.cuda.note_sync(function.__name__)
            if function is Tensor.numpy:
                raise TypeError(f"numpy() of a device tensor at {_site()}: copy it to the host")
        return function(*args, **kwargs)

    def _mm(self, function: Any, args: tuple, kwargs: dict) -> Tensor:
        """A product with `out_dtype`, which the CPU has not."""
        wanted = kwargs.pop("out_dtype", None)
        if wanted is None:
            return function(*args, **kwargs)
        left, right = (x.to(wanted) for x in args[:2])
        return function(left, right, **kwargs)

    def _backward(self, function: Any, args: tuple, kwargs: dict) -> None:
        """Runs the engine itself, with this mode on: in the handler of a call it is off."""
        names = ("grad_tensors", "retain_graph", "create_graph", "inputs")
        if function is torch.autograd.backward:
            names = ("grad_tensors", "retain_graph", "create_graph", "grad_variables", "inputs")
        given = {**kwargs, **dict(zip(names, args[1:], strict=False))}
        gradient = given.get("gradient", given.get("grad_tensors"))
        gradient = torch.ones_like(args[0]) if gradient is None else gradient
        create = bool(given.get("create_graph"))
        retain = create if given.get("retain_graph") is None else given["retain_graph"]
        self.cuda.has_the_loss = self.cuda.holds(args[0])
        with self:
            torch.autograd.graph._engine_run_backward(
                (args[0],),
                (gradient,),
                retain,
                create,
                tuple(given.get("inputs") or ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def _grad(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Without `_made`, so that the engine's own tensors are known for what they are."""
        return function(*args, **kwargs)

    def _device_of(self, tensor: Tensor) -> torch.device:
        return CUDA if self.cuda.holds(tensor) else tensor.device

    def _device_getter(self, function: Any, args: tuple, kwargs: dict) -> torch.device:
        del function, kwargs
        return self._device_of(args[0])

    def _is_cuda_getter(self, function: Any, args: tuple, kwargs: dict) -> bool:
        del function, kwargs
        return self.cuda.holds(args[0])

    def _is_cpu_getter(self, function: Any, args: tuple, kwargs: dict) -> bool:
        return function(*args, **kwargs) and not self.cuda.holds(args[0])


SPECIAL = {
    Tensor.to: _Calls._to,
    Tensor.cuda: _Calls._cuda,
    Tensor.cpu: _Calls._cpu,
    Tensor.pin_memory: _Calls._pin_memory,
    Tensor.copy_: _Calls._copy,
    Tensor.tolist: _Calls._read,
    Tensor.numpy: _Calls._read,
    Tensor.backward: _Calls._backward,
    torch.autograd.backward: _Calls._backward,
    torch.autograd.grad: _Calls._grad,
    torch.mm: _Calls._mm,
}
GETTERS = {
    Tensor.device: _Calls._device_getter,
    Tensor.is_cuda: _Calls._is_cuda_getter,
    Tensor.is_cpu: _Calls._is_cpu_getter,
}


def _is_cuda(device: Any) -> bool:
    if isinstance(device, int):
        return True
    return device is not None and torch.device(device).type == "cuda"


def _unmarked(tensor: Tensor) -> Tensor:
    """A copy in memory of its own that no mark follows."""
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    with torch.no_grad():
        return out.copy_(tensor)


@contextmanager
def _believed_in() -> Iterator[None]:
    """What asks for the machine rather than for a tensor is told of the device."""
    from accelerate.state import AcceleratorState, PartialState
    from transformers import TrainingArguments

    autocast, group = torch.autocast.__init__, torch._C._group_tensors_by_device_and_dtype

    def on_cpu(self, device_type, *args, **kwargs):
        autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def enabled(device_type="cuda", _plain=torch.is_autocast_enabled):
        return _plain("cpu" if device_type == "cuda" else device_type)

    def dtype(device_type, _plain=torch.get_autocast_dtype):
        return _plain("cpu" if device_type == "cuda" else device_type)

    def grouped(lists, with_indices=False):
        """Keys with the device that tensors claim, not with the one that holds them."""
        found = group(lists, with_indices)
        return {
            (next(t.device for t in tensors[0] if t is not None), kind): (tensors, indices)
            for (_, kind), (tensors, indices) in found.items()
        }

    always = property(lambda _self: CUDA, lambda self, found: self.__dict__.update(device=found))
    with (
        patch.object(torch.autocast, "__init__", on_cpu),
        patch.object(torch, "is_autocast_enabled", enabled),
        patch.object(torch, "get_autocast_dtype", dtype),
        patch.object(torch.cuda, "get_device_capability", lambda _device=None: (7, 5)),
        patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped),
        patch.object(TrainingArguments, "device", always),
        patch.object(PartialState, "device", always, create=True),
        patch.object(AcceleratorState, "device", always, create=True),
    ):
        yield
    # The states outlive this; who asks them next is on the CPU again.
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        if shared and shared.get("device") is None:
            shared["device"] = CPU
