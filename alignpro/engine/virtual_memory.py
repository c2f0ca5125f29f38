"""Virtual memory of CUDA's driver: ranges of addresses, to which memory is mapped and from which it is taken away.

The driver's interface (`CUDA driver API, virtual memory management`_) is called directly, since PyTorch has none for it.
The layout of its structures is tested against ``cuda.h`` where that is installed.

.. _CUDA driver API, virtual memory management:
   https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import torch
from torch import Tensor

CU_MEM_ALLOCATION_TYPE_PINNED = 1
CU_MEM_LOCATION_TYPE_DEVICE = 1
CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3
CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0
CUDA_ERROR_OUT_OF_MEMORY = 2


_mapped: Counter[torch.device] = Counter()
_peak: Counter[torch.device] = Counter()


def peak_mapped_bytes(device: torch.device) -> int:
    """The peak of the memory mapped on a device since the last call; PyTorch's allocator does not count it."""
    device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    peak, _peak[device] = max(_peak[device], _mapped[device]), _mapped[device]
    return peak


class MemoryMapError(RuntimeError):
    """The driver cannot reserve or map memory."""


class OutOfMappedMemoryError(MemoryMapError, MemoryError):
    """The device has too little memory."""


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class AllocationFlags(ctypes.Structure):
    """CUmemAllocationProp.allocFlags."""

    _fields_ = (
        ("compressionType", ctypes.c_ubyte),
        ("gpuDirectRDMACapable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requestedHandleTypes", ctypes.c_int),
        ("location", Location),
        ("win32HandleMetaData", ctypes.c_void_p),
        ("allocFlags", AllocationFlags),
    )


class AccessDescription(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class CudaMemory:
    """A `DeviceMemory` of an NVIDIA GPU.

    Args:
        device: The GPU.

    Raises:
        OSError: There is no driver library.
        MemoryMapError: The driver or the GPU does not map virtual memory.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._location = Location(CU_MEM_LOCATION_TYPE_DEVICE, index)
        self._properties = AllocationProperties(type=CU_MEM_ALLOCATION_TYPE_PINNED, location=self._location)
        size = ctypes.c_size_t()
        self._call(
            "cuMemGetAllocationGranularity",
            ctypes.byref(size),
            ctypes.byref(self._properties),
            CU_MEM_ALLOC_GRANULARITY_MINIMUM,
        )
        self.granularity = size.value
        self.capacity = torch.cuda.get_device_properties(index).total_memory

    def reserve(self, size: int) -> int:
        """See `DeviceMemory.reserve`."""
        address = ctypes.c_uint64()
        self._call("cuMemAddressReserve", ctypes.byref(address), _size(size), _size(0), _address(0), _flags())
        return address.value

    def map(self, address: int, size: int) -> int:
        """See `DeviceMemory.map`."""
        handle = ctypes.c_uint64()
        created = ctypes.byref(handle), _size(size), ctypes.byref(self._properties), _flags()
        try:
            self._call("cuMemCreate", *created)
        except OutOfMappedMemoryError:
            torch.cuda.empty_cache()  # what PyTorch has cached is out of the driver's reach
            self._call("cuMemCreate", *created)
        try:
            self._call("cuMemMap", _address(address), _size(size), _size(0), handle, _flags())
        except MemoryMapError:
            self._call("cuMemRelease", handle)
            raise
        access = AccessDescription(self._location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        try:
            self._call("cuMemSetAccess", _address(address), _size(size), ctypes.byref(access), _size(1))
        except MemoryMapError:
            self._call("cuMemUnmap", _address(address), _size(size))
            self._call("cuMemRelease", handle)
            raise
        _mapped[self.device] += size
        _peak[self.device] = max(_peak[self.device], _mapped[self.device])
        return handle.value

    def unmap(self, address: int, size: int, handle: int) -> None:
        """See `DeviceMemory.unmap`."""
        self._call("cuMemUnmap", _address(address), _size(size))
        self._call("cuMemRelease", ctypes.c_uint64(handle))
        _mapped[self.device] -= size

    def free(self, address: int, size: int) -> None:
        """See `DeviceMemory.free`."""
        self._call("cuMemAddressFree", _address(address), _size(size))

    def synchronize(self) -> None:
        """See `DeviceMemory.synchronize`."""
        torch.cuda.synchronize(self.device)

    def tensor(self, address: int, rows: int, columns: int) -> Tensor:
        """See `DeviceMemory.tensor`."""
        return torch.as_tensor(_Pointer(address, rows, columns), device=self.device)

    def _call(self, name: str, *arguments: Any) -> None:
        with torch.cuda.device(self.device):
            code = getattr(self._driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            reason = text.value.decode() if text.value else f"error {code}"
            kind = OutOfMappedMemoryError if code == CUDA_ERROR_OUT_OF_MEMORY else MemoryMapError
            raise kind(f"{name}: {reason}")


class _Pointer:
    """Memory of a device as PyTorch takes it from other libraries."""

    def __init__(self, address: int, rows: int, columns: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (rows, columns),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def _size(value: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(value)


def _address(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)


def _flags() -> ctypes.c_ulonglong:
    return ctypes.c_ulonglong(0)
