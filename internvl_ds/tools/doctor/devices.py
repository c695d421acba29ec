"""The device that DeepSpeed chose, its memory, the engines that it has, and nvcc."""

from __future__ import annotations

import os
from typing import Any

from internvl_ds.tools.doctor.compilers import has_gpu
from internvl_ds.tools.doctor.probe_result import ProbeResult, fault, ok, warn

_GB = 1e9


def describe(accelerator: Any) -> list[ProbeResult]:
    """Findings about a DeepSpeed accelerator; imports parts of DeepSpeed and torch."""
    name = accelerator.device_name()
    engines = {'bf16': accelerator.is_bf16_supported(), 'fp16': accelerator.is_fp16_supported()}
    there = [engine for engine, supported in engines.items() if supported]
    if name == 'cpu':
        return [_cpu(), _engines(name, there)]
    if name != 'cuda':
        return [_others(accelerator), _engines(name, there)]
    return [_cuda(accelerator.device_count()), _engines(name, there), _nvcc()]


def _cpu() -> ProbeResult:
    found = "cpu: torch's gloo between ranks"
    if not has_gpu():
        return ok('accelerator', found)
    hiding = [v for v in ('DS_ACCELERATOR', 'CUDA_VISIBLE_DEVICES') if v in os.environ]
    if hiding:
        settings = ', '.join(f'{v}={os.environ[v]!r}' for v in hiding)
        return warn('accelerator', f'{found}; there is a GPU, and the environment has {settings}')
    return fault(
        'accelerator',
        f'{found}, though there is an NVIDIA driver',
        'a run would train on the CPU without a word. torch sees no GPU: is it a CPU build, or is '
        "the driver older than its CUDA? python -c 'import torch; torch.cuda.init()' says",
    )


def _others(accelerator: Any) -> ProbeResult:
    """An accelerator that this package was never run on."""
    found = f'{accelerator.device_name()}, {accelerator.device_count()} devices'
    return warn('accelerator', found, 'this package was never run on such a device')


def _cuda(count: int) -> ProbeResult:
    """Asks every GPU for its memory, which a broken one, or one that is taken, does not tell."""
    import torch

    kinds, taken = set(), []
    for index in range(count):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            return fault(
                'accelerator',
                f'cuda:{index} of {count}: {str(error).splitlines()[0]}',
                'a rank that is given this GPU dies at its start: nvidia-smi says more; leave it '
                'out by CUDA_VISIBLE_DEVICES',
            )
        kinds.add(f'{torch.cuda.get_device_name(index)} of {total / _GB:.0f} GB')
        if free < 0.9 * total:
            taken.append(f'{index} ({free / _GB:.0f} GB free)')
    found = f'cuda, {count} x {" and ".join(sorted(kinds))}'
    if taken:
        advice = 'other processes hold the rest: nvidia-smi names them'
        return warn('accelerator', f'{found}; partly taken: {", ".join(taken)}', advice)
    return ok('accelerator', found)


def _engines(device: str, engines: list[str]) -> ProbeResult:
    found = f'fp32, torch autocast, {", ".join(engines) or "no half-precision engine"}'
    if 'fp16' in engines:
        return ok('precisions', found)
    return warn(
        'precisions',
        f'{found}; no fp16 engine on this {device}',
        'AMP_OPT_LEVEL O2 with AMP_TYPE float16 is refused; bfloat16 and O1 work',
    )


def _nvcc() -> ProbeResult:
    """Asks DeepSpeed whether it would build GPU ops: it knows which CUDA versions go together."""
    import torch
    from deepspeed.ops.op_builder import builder

    has = f'torch has CUDA {torch.version.cuda}'
    without = 'torch.optim.AdamW needs none of them; FusedAdam and optimizer offload do'
    try:
        version = '.'.join(map(str, builder.installed_cuda_version('')))
        builder.assert_no_cuda_mismatch('')
    except builder.MissingCUDAException:
        return warn('nvcc', f'none; {has}', f'GPU ops cannot be built: {without}')
    except builder.CUDAMismatchException:
        return fault(
            'nvcc',
            f'CUDA {version}; {has}',
            f'DeepSpeed refuses to build GPU ops: {without}. Set CUDA_HOME to the CUDA that torch '
            'has',
        )
    return ok('nvcc', f'CUDA {version}; {has}')
