"""DeepSpeed's accelerator of the device in device.cpp, for ranks that `install` it."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

NAME = 'fake'


def load() -> ModuleType:
    """Compiles the device where it was not yet; half a minute of one core."""
    from torch.utils import cpp_extension

    source = Path(__file__).with_name('device.cpp')
    return cpp_extension.load('internvl_ds_test_device', [str(source)], extra_cflags=['-O0', '-w'])


class FakeAccelerator(CPU_Accelerator):
    """As a GPU's, but for streams: what runs is over when a call returns."""

    def __init__(self, device: ModuleType) -> None:
        super().__init__()
        self._name, self._device = NAME, device

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f'{NAME}:{device_index}'

    def device(self, device_index: int | None = None) -> Any:
        return torch.device(NAME, device_index or 0)

    def set_device(self, device_index: Any) -> None:
        self._device.set_device(getattr(device_index, 'index', device_index))

    def current_device(self) -> int:
        return int(self._device.current_device())

    def current_device_name(self) -> str:
        return f'{NAME}:{self.current_device()}'

    def device_count(self) -> int:
        return 8

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == NAME


def _let_parameters_move() -> None:
    """Has ``p.data = another device's`` keep the parameter's object, as on CUDA."""
    plain = torch.Tensor.data

    def move(tensor: torch.Tensor, value: torch.Tensor) -> None:
        # In inference mode another tensor, of the host too, is of another kind to this device.
        if (
            tensor.device.type == value.device.type
            and tensor.is_inference() == value.is_inference()
        ):
            plain.__set__(tensor, value)
        else:
            moved = value.detach().requires_grad_(tensor.requires_grad)
            torch._C._swap_tensor_impl(tensor, moved)

    torch.Tensor.data = property(plain.__get__, move)  # type: ignore[assignment, method-assign]
    torch._has_compatible_shallow_copy_type = lambda a, b: True


def install() -> None:
    """Makes this process's accelerator the fake one. Before anything asks for a device."""
    device = load()
    torch.utils.rename_privateuse1_backend(NAME)
    module = ModuleType(f'torch.{NAME}')
    accelerator = FakeAccelerator(device)
    stand_ins: dict[str, Any] = {
        'is_available': lambda: True, 'is_initialized': lambda: True,
        '_is_in_bad_fork': lambda: False, 'manual_seed_all': lambda seed: None,
        'get_rng_state': lambda device=None: torch.get_rng_state(),
        'set_rng_state': lambda state, device=None: None,
        'get_amp_supported_dtype': lambda: [torch.float16, torch.bfloat16],
        'synchronize': lambda device=None: None,
    }  # fmt: skip
    for name in ('device_count', 'current_device', 'set_device'):
        stand_ins[name] = getattr(accelerator, name)
    vars(module).update(stand_ins)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    device.register_hooks()
    _let_parameters_move()
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign, assignment]
    set_accelerator(accelerator)
    assert get_accelerator() is accelerator
    os.environ['DS_ACCELERATOR'] = NAME
