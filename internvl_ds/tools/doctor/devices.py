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
    precisions = _precisions(name, [engine for engine, usable in engines.items() if usable])
    if name == 'cpu':
        return [_cpu(), precisions]
    count = accelerator.device_count()
    if name != 'cuda':
        advice = 'this package was never run on such a device'
        return [warn('accelerator', f'{name}, {count} devices', advice), precisions]
    return [_cuda(count), precisions, _nvcc()]


def _cpu() -> ProbeResult:
    topic, text = 'accelerator', "cpu: torch's gloo between ranks"
    if not has_gpu():
        return ok(topic, text)
    hiding = [v for v in ('DS_ACCELERATOR', 'CUDA_VISIBLE_DEVICES') if v in os.environ]
    if hiding:
        settings = ', '.join(f'{v}={os.environ[v]!r}' for v in hiding)
        return warn(topic, f'{text}; there is a GPU, and the environment has {settings}')
    advice = (
        'a run would train on the CPU without a word. torch sees no GPU: is it a CPU build, or is '
        "the driver older than its CUDA? python -c 'import torch; torch.cuda.init()' says"
    )
    return fault(topic, f'{text}, though there is an NVIDIA driver', advice)


def _cuda(count: int) -> ProbeResult:
    """Asks every GPU for its memory, which a broken one, or one that is taken, does not tell."""
    import torch

    topic, kinds, busy = 'accelerator', set(), []
    for index in range(count):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            advice = (
                'a rank that is given this GPU dies at its start: nvidia-smi says more; leave it '
                'out by CUDA_VISIBLE_DEVICES'
            )
            return fault(topic, f'cuda:{index} of {count}: {str(error).splitlines()[0]}', advice)
        kinds.add(f'{torch.cuda.get_device_name(index)} of {total / _GB:.0f} GB')
        if free < 0.9 * total:
            busy.append(f'{index} ({free / _GB:.0f} GB free)')
    text = f'cuda, {count} x {" and ".join(sorted(kinds))}'
    if busy:
        advice = 'other processes hold the rest: nvidia-smi names them'
        return warn(topic, f'{text}; partly taken: {", ".join(busy)}', advice)
    return ok(topic, text)


def _precisions(device: str, engines: list[str]) -> ProbeResult:
    from internvl_ds.dist.device import emulates_bf16

    topic = 'precisions'
    text = f'fp32, torch autocast, {", ".join(engines) or "no half-precision engine"}'
    if emulates_bf16(device):
        advice = 'set AMP_TYPE float16: bf16 is computed in float32 and rounded, many times slower'
        return warn(topic, f'{text}; bf16 by emulation', advice)
    if 'fp16' in engines:
        return ok(topic, text)
    advice = 'AMP_OPT_LEVEL O2 with AMP_TYPE float16 is refused; bfloat16 and O1 work'
    return warn(topic, f'{text}; no fp16 engine on this {device}', advice)


def _nvcc() -> ProbeResult:
    """Asks DeepSpeed whether it would build GPU ops: it knows which CUDA versions go together."""
    import torch
    from deepspeed.ops.op_builder import builder

    ours = f'torch has CUDA {torch.version.cuda}'
    without = 'torch.optim.AdamW needs none of them; FusedAdam and optimizer offload do'
    try:
        version = '.'.join(map(str, builder.installed_cuda_version('')))
        builder.assert_no_cuda_mismatch('')
    except builder.MissingCUDAException:
        return warn('nvcc', f'none; {ours}', f'GPU ops cannot be built: {without}')
    except builder.CUDAMismatchException:
        advice = f'{without}. Set CUDA_HOME to the CUDA that torch has'
        text = f'CUDA {version}; {ours}'
        return fault('nvcc', text, f'DeepSpeed refuses to build GPU ops: {advice}')
    return ok('nvcc', f'CUDA {version}; {ours}')
