"""The ten names over plain PyTorch: what the original's utils.py does, in fewer words."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import get_state_dict


def load_checkpoint(
    config: Any, model: Any, optimizer: Any, lr_scheduler: Any, scaler: Any, logger: Any
) -> float:
    state = torch.load(config.MODEL.RESUME, map_location='cpu', weights_only=False)
    logger.info(model.load_state_dict(state['model'], strict=False))
    if config.EVAL_MODE:
        return 0.0
    optimizer.load_state_dict(state['optimizer'])
    lr_scheduler.load_state_dict(state['lr_scheduler'])
    scaler_state = state.get('amp')
    if scaler is not None and scaler_state is not None:
        scaler.load_state_dict(scaler_state)
    config.defrost()
    config.TRAIN.START_EPOCH = state['epoch'] + 1
    config.freeze()
    return float(state['max_accuracy'])


def load_ema_checkpoint(config: Any, model_ema: Any, logger: Any) -> float:
    state = torch.load(config.MODEL.RESUME, map_location='cpu', weights_only=False)
    prefix = 'module.' if model_ema.ema_has_module else ''
    weights = {prefix + name: value for name, value in state['model_ema'].items()}
    logger.info(model_ema.ema.load_state_dict(weights))
    return float(state.get('max_accuracy_ema') or 0.0)


def load_pretrained(config: Any, model: Any, logger: Any) -> None:
    state = torch.load(config.MODEL.PRETRAINED, map_location='cpu', weights_only=False)
    logger.info(model.load_state_dict(state['model'], strict=False))


def save_checkpoint(
    config: Any, epoch: int, model: Any, max_accuracy: float, optimizer: Any, lr_scheduler: Any,
    scaler: Any, logger: Any, model_ema: Any = None, max_accuracy_ema: Any = None,
    ema_decay: Any = None, model_ems: Any = None, max_accuracy_ems: Any = None,
    ems_model_num: Any = None, best: str | None = None,
) -> None:  # fmt: skip
    state = {
        'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'epoch': epoch,
        'lr_scheduler': lr_scheduler.state_dict(), 'max_accuracy': max_accuracy, 'config': config,
    }  # fmt: skip
    if model_ema is not None:
        state['model_ema'] = get_state_dict(model_ema)
    if scaler is not None:
        state['amp'] = scaler.state_dict()
    path = os.path.join(config.OUTPUT, f'ckpt_epoch_{best or epoch}.pth')
    torch.save(state, path)
    logger.info(f'{path} saved')
    old = epoch - config.SAVE_CKPT_NUM * config.SAVE_FREQ
    if os.path.exists(path := os.path.join(config.OUTPUT, f'ckpt_epoch_{old}.pth')):
        os.remove(path)


def auto_resume_helper(output_dir: str) -> str | None:
    names = [name for name in os.listdir(output_dir) if name.endswith('pth')]
    paths = [os.path.join(output_dir, name) for name in names]
    return max(paths, key=os.path.getmtime) if paths else None


def reduce_tensor(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def get_grad_norm(parameters: Any, norm_type: float = 2) -> torch.Tensor:
    norms = [p.grad.norm(norm_type) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


class NativeScalerWithGradNormCount:
    state_dict_key = 'amp_scaler'

    def __init__(self) -> None:
        self._scaler = torch.amp.GradScaler('cuda' if torch.cuda.is_available() else 'cpu')

    def __call__(
        self, loss: torch.Tensor, optimizer: Any, clip_grad: float | None = None,
        parameters: Any = None, create_graph: bool = False, update_grad: bool = True,
    ) -> torch.Tensor | None:  # fmt: skip
        self._scaler.scale(loss).backward(create_graph=create_graph)
        if not update_grad:
            return None
        self._scaler.unscale_(optimizer)
        if clip_grad is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
        else:
            norm = get_grad_norm(parameters)
        self._scaler.step(optimizer)
        self._scaler.update()
        return norm

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)


class MyAverageMeter:
    def __init__(self, max_len: int = -1) -> None:
        self.values: list[float] = []
        self.max_len = max_len
        self.val = self.avg = self.var = 0.0

    def update(self, val: float) -> None:
        self.val = val
        if math.isfinite(val):
            self.values.append(val)
        if self.max_len > 0:
            self.values = self.values[-self.max_len :]
        if self.values:
            self.avg, self.var = float(np.mean(self.values)), float(np.std(self.values))
