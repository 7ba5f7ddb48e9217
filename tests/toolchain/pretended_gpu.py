"""Tensors on a GPU that is not there: they say that they are on cuda:0, compute on the CPU, and meet no other tensors.

As with a real GPU, an operator that gets tensors of both kinds fails, single numbers on the CPU apart, and so does
`numpy()`. A forgotten `.to(device)` shows without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
_OF_TENSORS: Any = Tensor
_READS_DEVICE: dict[Any, Any] = {
    _OF_TENSORS.device.__get__: lambda: GPU,
    _OF_TENSORS.is_cuda.__get__: lambda: True,
    _OF_TENSORS.get_device: lambda: 0,
}
# One tensor decides where these work; the others may be elsewhere.
_MIXED = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.module_load}


class OnGpu(Tensor):
    """A tensor that says that it is on the GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            with torch._C.DisableTorchFunction():
                copied = self.detach().clone().as_subclass(OnGpu)
                copied.requires_grad_(self.requires_grad)
            if isinstance(self, nn.Parameter):
                copied._is_param = True
            memo[id(self)] = copied
        return memo[id(self)]  # type: ignore[no-any-return]


class PretendedGpu(TorchFunctionMode):
    """While it is on, `device="cuda"` and `.to("cuda")` make such tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (8 << 30, 16 << 30),
    "memory_reserved": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
}


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """A GPU that modules and tensors can be moved to."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with mock.patch.multiple(torch.cuda, **_CUDA), PretendedGpu():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if type(tensor) is OnGpu]
    if there and func in _READS_DEVICE:
        return _READS_DEVICE[func]()
    if there and func is Tensor.numpy:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    if func is torch._has_compatible_shallow_copy_type:  # asked by `Module.to`
        return type(args[0]) is type(args[1])
    moved = _moved(func, args, kwargs)
    if func not in _MIXED and moved is None and there:
        elsewhere = [tensor for tensor in tensors if type(tensor) is not OnGpu and _dim(tensor) > 0]
        if elsewhere:
            raise RuntimeError(f"Expected all tensors to be on the same device, in {func}: {len(elsewhere)} are on cpu")
    if moved is not None:
        args, kwargs = _without_device(args), _without_device(kwargs)
    with torch._C.DisableTorchFunction():
        result = func(*args, **kwargs)
        if moved is not None:
            return tree_map(lambda value: _placed(value, moved, []), result)
        return tree_map(lambda value: _placed(value, _stays(func, args, kwargs, there), tensors), result)


def _stays(func: Any, args: Any, kwargs: Any, there: Sequence[Tensor]) -> bool:
    if func is Tensor.module_load and kwargs.get("assign"):
        return type(args[1]) is OnGpu
    return type(args[0]) is OnGpu if func in _MIXED else bool(there)


def _placed(value: Any, on_gpu: bool, given: list[Tensor]) -> Any:
    """A result as a tensor of the right kind; what was given and is returned stays what it is."""
    if not isinstance(value, Tensor) or any(value is tensor for tensor in given):
        return value
    kind = OnGpu if on_gpu else Tensor
    return value if type(value) is kind else value.as_subclass(kind)


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> bool | None:
    """Whether a call puts its result on the GPU (True) or the CPU (False); None where it does not say."""
    if func is Tensor.cpu:
        return False
    if func is Tensor.cuda:
        return True
    if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
        return type(args[1]) is OnGpu
    named = [kwargs.get("device"), *(args[1:2] if func is Tensor.to else ())]
    for device in named:
        if str(device).partition(":")[0] in ("cpu", "cuda", "meta"):
            return str(device).startswith("cuda")
    return None


def _without_device(given: Any) -> Any:
    """The same arguments for the CPU."""

    def on_cpu(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, (torch.device, str)) and str(value)[:4] == "cuda" else value

    return tree_map(on_cpu, given)


def _dim(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.dim()
