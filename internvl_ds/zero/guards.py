"""Makes an engine refuse calls after which training would be wrong.

Each is one of plain PyTorch that DeepSpeed takes, and answers with nothing or with half of it.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad
from torch.utils._pytree import tree_leaves

from internvl_ds.dist.rendezvous import rank
from internvl_ds.errors import ConfigError, few
from internvl_ds.zero.module_state import BARE
from internvl_ds.zero.parameters import is_sharded, whole_numel
from internvl_ds.zero.passes.agreement import Agreement, parameters_of
from internvl_ds.zero.passes.effect import ZeroEffect
from internvl_ds.zero.passes.unused import LeaveOut, Unused
from internvl_ds.zero.wrapper import Wrapper, replaced

try:
    from deepspeed.runtime.engine import _ENGINE_BACKWARD_GRAPH_TRACKER as _TRACKER
    from deepspeed.utils.torch import is_functorch_transforming
except ImportError:  # before DeepSpeed 0.19, whose engines know of no other backward
    _TRACKER = is_functorch_transforming = None

# Before DeepSpeed 0.18 an engine sees no backward but its own.
_SEES_BACKWARDS = hasattr(DeepSpeedEngine, '_backward_prologue_per_tensor')

_log = logging.getLogger(__name__)

_INSTEAD = (
    'write grad_norm = loss_scaler(loss, optimizer, clip_grad=config.TRAIN.CLIP_GRAD, '
    'parameters=engine.parameters(), update_grad=is_boundary), with loss_scaler = '
    'NativeScalerWithGradNormCount(), in fp32 (AMP_OPT_LEVEL O0) too; or engine.backward(loss) and '
    'engine.step()'
)
_OTHER_BACKWARD = (
    'loss.backward() through an engine: DeepSpeed reduces, clips and counts in engine.backward and '
    'engine.step. Instead of loss.backward(), clip_grad_norm_ and optimizer.step() '
    f'{_INSTEAD}. For gradients of inputs call engine.module.'
)
_AVERAGE = (
    "keep an average with internvl_ds.ShardedEma(engine, decay); at ZeRO stages 0 to 2 timm's "
    'ModelEma*(engine.module, decay) and update(engine.module) will do too'
)

# Optimizer of a client -> the wrapper of its engine, which keeps neither alive.
_guarded: weakref.WeakKeyDictionary[Any, Wrapper] = weakref.WeakKeyDictionary()
_zero_engines: weakref.WeakSet[DeepSpeedEngine] = weakref.WeakSet()
_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Of engines that are in a forward pass, and of those whose module a script has called itself.
_called: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_called_bare: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def require_unsharded(client: torch.optim.Optimizer | None) -> None:
    """Refuses torch's own ZeRO, which an engine would step and shard once more.

    Raises:
        ConfigError: says what to write.
    """
    if isinstance(client, ZeroRedundancyOptimizer):
        inner = type(client.optim).__name__
        raise ConfigError(
            f'the optimizer is a ZeroRedundancyOptimizer around {inner}: give initialize the '
            f'{inner} itself, and ZeRO stage 1, 2 or 3 in the ds_config (stage 1 is what '
            'TRAIN.OPTIMIZER.USE_ZERO gives)'
        )


def guard(wrapper: Wrapper, effect: Callable[[Any, Any], ZeroEffect]) -> None:
    """Installs the refusals on an engine, once; ``effect``: see `Unused`."""
    engine, client = wrapper.engine, wrapper.client
    engine.register_forward_pre_hook(_require_own_precision)
    engine.register_forward_pre_hook(_begin_forward)
    engine.register_forward_hook(_end_forward, always_call=True)
    _modules.add(engine.module)
    engine.module.register_forward_pre_hook(_require_unwrapped)
    # What DistributedDataParallel, DataParallel and copy.deepcopy ask a module for first.
    engine._ddp_params_and_buffers_to_ignore = _Refusal(f'DistributedDataParallel(engine): {BARE}')
    engine._replicate_for_data_parallel = _Refusal(f'DataParallel(engine): {BARE}')
    engine.__deepcopy__ = _Refusal(f'an engine has no copies (ModelEma(engine), ...): {_AVERAGE}')
    if wrapper.sharded:
        engine.register_state_dict_pre_hook(_require_values)
        engine.module.__deepcopy__ = _Refusal(
            'a copy of a module of ZeRO stage 3 holds no values and cannot run (ModelEma*'
            f'(engine.module), ...): {_AVERAGE}'
        )
    if client is None:
        return
    for part in {client, wrapper.optimizer}:
        part.consolidate_state_dict = _Consolidation()
    if _SEES_BACKWARDS:
        for name in ('_backward_prologue', '_backward_prologue_per_tensor'):
            setattr(engine, name, functools.partial(_in_backward, weakref.ref(engine), name))
    else:
        engine.register_forward_hook(functools.partial(_watch_outputs, weakref.ref(wrapper)))
    if client not in _guarded:
        client.register_step_pre_hook(_before_client_step)
    _guarded[client] = wrapper
    agreement = Agreement(wrapper, Unused(wrapper, effect)) if wrapper.partitioned else None
    if agreement is None:
        apply = LeaveOut(wrapper).apply
        client.register_step_pre_hook(lambda *_: apply() if wrapper.alive else None)
    else:
        wrapper.forget_passes = agreement.forget
    engine.step = functools.partial(_engine_step, weakref.ref(wrapper))
    engine.backward = functools.partial(_backward, weakref.ref(wrapper), agreement, iter([True]))
    if wrapper.optimizer is not client:
        wrapper.optimizer.step = functools.partial(_step, wrapper, agreement)
    if wrapper.partitioned:
        _zero_engines.add(engine)
        _watch_clipping()


def _engine_step(ref: weakref.ref[Wrapper], *args: Any, **kwargs: Any) -> Any:
    """Replaces ``engine.step``."""
    wrapper = ref()
    assert wrapper is not None
    with replaced(wrapper, 'in_step', True):
        return type(wrapper.engine).step(wrapper.engine, *args, **kwargs)


def _backward(
    ref: weakref.ref[Wrapper],
    agreement: Agreement | None,
    firsts: Iterator[bool],
    loss: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Replaces ``engine.backward``; compares the parameters of the first loss."""
    wrapper = ref()
    assert wrapper is not None
    wrapper.require_unfrozen()
    if next(firsts, False) and isinstance(loss, torch.Tensor):
        used = parameters_of(loss)
        _require_own_parameters(wrapper, used)
        if agreement is not None:
            agreement.before(used)
    if isinstance(loss, torch.Tensor) and not loss.requires_grad:
        raise ConfigError(
            'the loss of this rank requires no gradient: no trained parameter is in it, or it was '
            'computed under no_grad or detached; add 0 times an output of the model to it'
        )
    with replaced(wrapper, 'in_backward', True):
        result = type(wrapper.engine).backward(wrapper.engine, loss, *args, **kwargs)
    if agreement is not None:
        agreement.after()
    return result


def _require_own_parameters(wrapper: Wrapper, used: Container[int]) -> None:
    for other in list(_guarded.values()):
        if other is wrapper or not other.alive or other.engine.module not in _called_bare:
            continue
        names = [name for p, name in other.names.items() if id(p) in used]
        if names:
            raise ConfigError(
                f"the loss of this engine goes through another engine's module to {few(names)}, "
                'whose gradients would be left in that engine: call requires_grad_(False) of that '
                'module before this forward pass and requires_grad_(True) after it'
            )


class _Refusal:
    """Raises when it is called or iterated over."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ConfigError(self._message)

    __iter__ = __call__


class _Consolidation:
    """Replaces ZeroRedundancyOptimizer.consolidate_state_dict, which the original calls."""

    told = False

    def __call__(self, to: int = 0) -> None:
        """Does nothing: each rank saves its own part."""
        if not _Consolidation.told and rank() == 0:
            _log.warning(
                'optimizer.consolidate_state_dict(to=%d) does nothing over an engine: '
                'save_checkpoint, which every rank calls, saves each part where it is',
                to,
            )
        _Consolidation.told = True


def _begin_forward(engine: DeepSpeedEngine, _: Any) -> None:
    _called.add(engine.module)


def _end_forward(engine: DeepSpeedEngine, *_: Any) -> None:
    _called.discard(engine.module)


def _require_unwrapped(module: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling():
        return  # by an engine; torch could not compile what follows
    if module in _modules and module not in _called and torch.is_grad_enabled():
        _called_bare.add(module)
    active = DistributedDataParallel._get_active_ddp_module()
    if active is None or module not in _modules:  # a copy has the hook, too
        return
    if any(inner is module for inner in active.modules()):
        raise ConfigError(f"an engine's module inside a DistributedDataParallel: {BARE}")


def _require_own_precision(engine: DeepSpeedEngine, _: Any) -> None:
    device = engine.device.type
    if not torch.is_autocast_enabled(device):
        return
    dtype, autocasts = torch.get_autocast_dtype(device), engine.torch_autocast_enabled()
    if not autocasts or engine.torch_autocast_dtype() != dtype:
        of_engine = next((p.dtype for p in engine.module.parameters()), torch.float32)
        precision = f'autocast {engine.torch_autocast_dtype()}' if autocasts else f'{of_engine}'
        raise ConfigError(
            f'engine(...) inside torch.autocast({dtype}), and the engine computes in {precision} '
            'as AMP_OPT_LEVEL, AMP_TYPE and the ds_config say: leave torch.autocast out of the '
            'script (in bf16 and fp16 give the engine inputs of that dtype), or set AMP_OPT_LEVEL '
            f'O1 and AMP_TYPE {str(dtype).removeprefix("torch.")}'
        )


def _in_backward(ref: weakref.ref[DeepSpeedEngine], name: str, *args: Any) -> Any:
    """Replaces DeepSpeed's hook for a backward that reaches the engine's outputs."""
    engine = ref()
    assert engine is not None  # the graph keeps it
    is_own = engine._running_engine_backward or engine._manual_backward_expected  # scale(loss)
    is_anothers = not is_own and _TRACKER is not None and _TRACKER.is_current_graph_registered()
    transforms = is_functorch_transforming is not None and is_functorch_transforming()
    if not (is_own or is_anothers or transforms):
        raise ConfigError(_OTHER_BACKWARD)
    if is_anothers and engine.zero_optimization_stage() == 0:
        raise ConfigError(
            "another engine's backward comes through an engine of ZeRO stage 0, which DeepSpeed "
            'does not do: where only gradients of inputs are wanted, call engine.module in place '
            'of the engine; for its own gradients too, ZeRO stage 1'
        )
    return getattr(type(engine), name)(engine, *args)


def _watch_outputs(ref: weakref.ref[Wrapper], _: Any, __: Any, outputs: Any) -> None:
    for tensor in tree_leaves(outputs):
        if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
            tensor.register_hook(functools.partial(_require_own_backward, ref))


def _require_own_backward(ref: weakref.ref[Wrapper], _: torch.Tensor) -> None:
    if (wrapper := ref()) is not None and not wrapper.in_backward:
        raise ConfigError(_OTHER_BACKWARD)


def _before_client_step(optimizer: Any, *_: Any) -> None:
    wrapper = _guarded[optimizer]
    if wrapper.alive and wrapper.client is optimizer:
        _require_engine_step(wrapper)
        wrapper.before_write()


def _step(wrapper: Wrapper, agreement: Agreement | None, closure: Any = None) -> None:
    """Replaces the step of DeepSpeed's optimizer."""
    if not wrapper.alive:
        return
    _require_engine_step(wrapper)
    if agreement is not None:
        agreement.require()
    wrapper.before_write()
    wrapper.complete_gradients()
    # DeepSpeed before 0.19 gathers into views of its flat weights, which autograd would refuse.
    with wrapper.stepping(), torch.no_grad():
        type(wrapper.optimizer).step(wrapper.optimizer)
    wrapper.clear_gradients()


def _require_engine_step(wrapper: Wrapper) -> None:
    if not wrapper.in_step:
        raise ConfigError(
            'optimizer.step() of an engine: neither reduces nor counts, and at ZeRO stages 1 to 3 '
            f'has no gradients. Instead of loss.backward(), clip_grad_norm_ and optimizer.step() '
            f'(or a GradScaler of the script) {_INSTEAD}'
        )


def _require_values(engine: DeepSpeedEngine, *_: Any) -> None:
    if any(p.numel() != whole_numel(p) for p in engine.module.parameters()):
        raise ConfigError(
            'engine.state_dict() at ZeRO stage 3 holds no values: save with save_checkpoint, of '
            f'which `ckpt export` makes one file; {_AVERAGE}'
        )


def _watch_clipping() -> None:
    """Makes torch's clip_grad_norm_ refuse parameters whose gradients ZeRO keeps; process-wide.

    It would find ``p.grad`` None and return 0, or clip a rank's own part of the gradients.
    """
    function = clip_grad._clip_grads_with_norm_
    if getattr(function, 'func', None) is not _clip:
        clip_grad._clip_grads_with_norm_ = functools.partial(_clip, function)


def _clip(function: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces the function that clip_grad_norm_ calls with the norm."""
    for p in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
        if p.requires_grad and _is_of_zero(p):
            raise ConfigError(
                'clip_grad_norm_ of parameters of a ZeRO engine: their gradients are not in '
                'p.grad, so it would return 0 and clip nothing. Pass clip_grad= to '
                'loss_scaler(loss, optimizer, ...), which returns the norm, or set '
                'TRAIN.CLIP_GRAD (/gradient_clipping) for engine.step(); get_grad_norm reads '
                'the norm between engine.backward and engine.step'
            )
    return function(parameters, *args, **kwargs)


def _is_of_zero(parameter: torch.Tensor) -> bool:
    """Whether the gradient of a parameter is ZeRO's; the same on all ranks."""
    if is_sharded(parameter) or any(parameter is flat for flat in _flat_partitions()):
        return True
    if not hasattr(parameter, '_hp_mapping'):
        return False
    # Only ranks that own a part have a mapping, and nobody once the engine is destroyed.
    engine = next((e for e in _zero_engines if parameter in e.param_names), None)
    parts = engine.module.parameters() if engine is not None else ()
    return any(getattr(part, '_hp_mapping', None) is not None for part in parts)


def _flat_partitions() -> Iterator[torch.Tensor]:
    """The flat partitions in optimizer.param_groups of ZeRO engines."""
    for engine in _zero_engines:
        for group in engine.basic_optimizer.param_groups:
            yield from group['params']
