"""A device that pretends: tensors that say they are on ``cuda`` and refuse what a GPU refuses, on the processor.

Where there is no GPU this shows what would break on one by the code's own fault: tensors of two devices in one
operation, ``numpy`` of a tensor that is not on the processor, a generator of another device. It says nothing about
speed, precision or kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_AS_TENSOR = torch.as_tensor
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class PretendTensor(torch.Tensor):
    """A tensor of the processor that says it is elsewhere."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device="meta", requires_grad=False,
        )  # fmt: skip
        made.inner = inner.detach()
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The pretended device."""
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        """Whether it says so."""
        return True

    @property
    def is_meta(self) -> bool:
        """Not as far as anybody should know."""
        return False

    @property
    def data(self) -> PretendTensor:  # type: ignore[override]
        """The values, without their history."""
        return PretendTensor(self.inner)

    @data.setter
    def data(self, values: PretendTensor) -> None:
        self.inner = values.inner

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin: Any = PretendTensor(copy.deepcopy(self.inner, memo))  # views of one tensor stay views of one
        if isinstance(self, torch.nn.Parameter):
            twin = torch.nn.Parameter(twin, self.requires_grad)
        return memo.setdefault(id(self), twin)

    def __repr__(self) -> str:
        return f"pretend({self.inner!r})"

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """Let ``cuda`` exist, as far as it is pretended."""

    def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
        made = data if isinstance(data, torch.Tensor) else _AS_TENSOR(data)
        return made.to(device=made.device if device is None else device, dtype=dtype or made.dtype)

    # What torch asks the tensors' own classes below Python, where they are of the device "meta".
    foreach = patch("torch.nn.utils.clip_grad._device_has_foreach_support", return_value=True)
    with patch("torch.cuda._lazy_init"), patch("torch.as_tensor", as_tensor), foreach, _Mode():
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` then brings what it made through the mode
        try:
            yield DEVICE
        finally:
            torch._C._set_only_lift_cpu_tensors(False)


def _compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call an operation on the processor and say that the result is where its arguments are said to be."""
    name, generator, leaves = function.overloadpacket.__name__, kwargs.get("generator"), tree_leaves((args, kwargs))
    there = [one for one in leaves if isinstance(one, PretendTensor)]
    target = next((one for one in leaves if isinstance(one, torch.device)), None)
    elsewhere = bool(there) if target is None else target.type != "cpu"
    if name not in ("copy_", "_to_copy", "to"):
        _refuse_two(name, args, kwargs)
    if generator is not None and elsewhere and generator.device == _CPU:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    result = function(*tree_map(_plain, args), **tree_map(_plain, kwargs))
    if name == "copy_":
        return args[0]
    if name == "_local_scalar_dense" or not elsewhere:
        return result
    known = {id(one.inner): one for one in there}  # what was changed in place stays what it was
    return tree_map(lambda one: known[id(one)] if id(one) in known else _pretended(one), result)


def _refuse_two(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise where a GPU would for arguments of two devices: numbers and the indices of an indexing may differ."""
    parts = [args[0], *args[2:]] if name in _INDEXING else args
    tensors = [one for one in tree_leaves((parts, kwargs)) if isinstance(one, torch.Tensor) and one.dim() > 0]
    if len({isinstance(one, PretendTensor) for one in tensors}) == 2:
        shapes = [tuple(one.shape) for one in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got two: {shapes}")
    indices = tree_leaves(args[1]) if name in _INDEXING and not isinstance(args[0], PretendTensor) else ()
    if any(isinstance(one, PretendTensor) for one in indices):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")


def _plain(one: Any) -> Any:
    if isinstance(one, torch.device):
        return _CPU
    return one.inner if isinstance(one, PretendTensor) else one


def _pretended(one: Any) -> Any:
    return PretendTensor(one) if isinstance(one, torch.Tensor) else one
