# ruff: noqa
"""A training script with the call sites of InternVL's classification/main.py, in its order.

`ported.py` is `plain.py` moved onto an engine; `docs/porting.md` shows each line that differs.
"""

import argparse
import datetime
import functools
import os
import random
import time
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import AverageMeter, ModelEma, accuracy

from tests.whole.port.parts import DEVICE, build_loader, build_model, build_optimizer
from tests.whole.port.parts import build_scheduler, create_logger, end_here, get_config, record
from tests.whole.port.plain_utils import MyAverageMeter
from tests.whole.port.plain_utils import NativeScalerWithGradNormCount as NativeScaler
from tests.whole.port.plain_utils import (
    auto_resume_helper,
    get_grad_norm,
    load_checkpoint,
    load_ema_checkpoint,
    load_pretrained,
    reduce_tensor,
    save_checkpoint,
)


def parse_option(arguments=None):
    parser = argparse.ArgumentParser('training and evaluation', add_help=False)
    parser.add_argument('--opts', default=None, nargs='+')
    parser.add_argument('--batch-size', type=int)
    parser.add_argument('--pretrained')
    parser.add_argument('--resume')
    parser.add_argument('--accumulation-steps', type=int, default=1)
    parser.add_argument('--amp-opt-level', default='O1', choices=['O0', 'O1', 'O2'])
    parser.add_argument('--output', default='work_dirs')
    parser.add_argument('--eval', action='store_true')
    parser.add_argument('--throughput', action='store_true')
    parser.add_argument('--save-ckpt-num', default=1, type=int)
    parser.add_argument('--use-zero', action='store_true')
    args, _ = parser.parse_known_args(arguments)
    return args, get_config(args)


@torch.no_grad()
def throughput(data_loader, model, logger):
    model.eval()
    for images, _ in data_loader:
        images = images.to(DEVICE)
        for _ in range(2):
            model(images)
        start = time.time()
        for _ in range(3):
            model(images)
        logger.info(f'throughput {3 * images.shape[0] / (time.time() - start)}')
        return


def main(config, logger):
    dataset_train, dataset_val, data_loader_train, data_loader_val, mixup_fn = build_loader(config)

    model = build_model(config)
    model.to(DEVICE)
    logger.info(str(model))

    optimizer = build_optimizer(config, model)

    # setup automatic mixed-precision loss scaling and op casting
    amp_autocast = suppress
    loss_scaler = None
    if config.AMP_OPT_LEVEL != 'O0':
        amp_autocast = functools.partial(torch.autocast, DEVICE)
        loss_scaler = NativeScaler()

    model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

    model_without_ddp = model.module

    n_parameters = sum(p.numel() for p in model.parameters())
    logger.info(f'number of params: {n_parameters}')
    record(config, parameters=n_parameters)

    lr_scheduler = (
        build_scheduler(config, optimizer, len(data_loader_train)) if not config.EVAL_MODE else None
    )

    if config.AUG.MIXUP > 0.0:
        criterion = SoftTargetCrossEntropy()
    elif config.MODEL.LABEL_SMOOTHING > 0.0:
        criterion = LabelSmoothingCrossEntropy(smoothing=config.MODEL.LABEL_SMOOTHING)
    else:
        criterion = torch.nn.CrossEntropyLoss()

    max_accuracy = 0.0
    max_ema_accuracy = 0.0
    if config.MODEL.RESUME == '' and config.TRAIN.AUTO_RESUME:
        resume_file = auto_resume_helper(config.OUTPUT)
        if resume_file:
            config.defrost()
            config.MODEL.RESUME = resume_file
            config.freeze()
            logger.info(f'auto resuming from {resume_file}')
        else:
            logger.info(f'no checkpoint found in {config.OUTPUT}, ignoring auto resume')

    if config.MODEL.RESUME:
        max_accuracy = load_checkpoint(
            config, model_without_ddp, optimizer, lr_scheduler, loss_scaler, logger
        )
        acc1, acc5, loss = validate(config, data_loader_val, model, amp_autocast=amp_autocast)
        record(config, resumed=[acc1, acc5, loss], max_accuracy=max_accuracy)
    elif config.MODEL.PRETRAINED:
        load_pretrained(config, model_without_ddp, logger)
        acc1, acc5, loss = validate(config, data_loader_val, model, amp_autocast=amp_autocast)
        record(config, pretrained=[acc1, acc5, loss])

    model_ema = None
    if config.TRAIN.EMA.ENABLE:
        model_ema = ModelEma(model, decay=config.TRAIN.EMA.DECAY)
        if config.MODEL.RESUME:
            load_ema_checkpoint(config, model_ema, logger)
            acc1, acc5, loss = validate(
                config, data_loader_val, model_ema.ema, amp_autocast=amp_autocast
            )
            record(config, resumed_ema=[acc1, acc5, loss])

    if config.THROUGHPUT_MODE:
        throughput(data_loader_val, model, logger)

    if config.EVAL_MODE:
        return

    start_time = time.time()
    for epoch in range(config.TRAIN.START_EPOCH, config.TRAIN.EPOCHS):
        data_loader_train.sampler.set_epoch(epoch)

        train_one_epoch(
            config,
            model,
            criterion,
            data_loader_train,
            optimizer,
            epoch,
            mixup_fn,
            lr_scheduler,
            logger,
            amp_autocast,
            loss_scaler,
            model_ema=model_ema,
        )
        last = epoch == config.TRAIN.EPOCHS - 1
        if (epoch % config.SAVE_FREQ == 0 or last) and config.TRAIN.OPTIMIZER.USE_ZERO:
            optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0 and (epoch % config.SAVE_FREQ == 0 or last):
            save_checkpoint(
                config,
                epoch,
                model_without_ddp,
                max_accuracy,
                optimizer,
                lr_scheduler,
                loss_scaler,
                logger,
                model_ema=model_ema,
            )
        if data_loader_val is not None and epoch % config.EVAL_FREQ == 0:
            acc1, acc5, loss = validate(
                config, data_loader_val, model, epoch, amp_autocast=amp_autocast
            )
            logger.info(f'Accuracy on the {len(dataset_val)} test images: {acc1:.1f}%')
            record(config, epoch=epoch, val=[acc1, acc5, loss])
            if dist.get_rank() == 0 and acc1 > max_accuracy:
                save_checkpoint(
                    config,
                    epoch,
                    model_without_ddp,
                    max_accuracy,
                    optimizer,
                    lr_scheduler,
                    loss_scaler,
                    logger,
                    model_ema=model_ema,
                    best='best',
                )
            max_accuracy = max(max_accuracy, acc1)
            logger.info(f'Max accuracy: {max_accuracy:.2f}%')

            if config.TRAIN.EMA.ENABLE:
                acc1, acc5, loss = validate(
                    config, data_loader_val, model_ema.ema, epoch, amp_autocast=amp_autocast
                )
                record(config, epoch=epoch, val_ema=[acc1, acc5, loss])
                if dist.get_rank() == 0 and acc1 > max_ema_accuracy:
                    save_checkpoint(
                        config,
                        epoch,
                        model_without_ddp,
                        max_accuracy,
                        optimizer,
                        lr_scheduler,
                        loss_scaler,
                        logger,
                        model_ema=model_ema,
                        best='ema_best',
                    )
                max_ema_accuracy = max(max_ema_accuracy, acc1)
                logger.info(f'Max ema accuracy: {max_ema_accuracy:.2f}%')

    total_time = time.time() - start_time
    logger.info(f'Training time {datetime.timedelta(seconds=int(total_time))}')


def train_one_epoch(
    config,
    model,
    criterion,
    data_loader,
    optimizer,
    epoch,
    mixup_fn,
    lr_scheduler,
    logger,
    amp_autocast=suppress,
    loss_scaler=None,
    model_ema=None,
):
    model.train()
    optimizer.zero_grad()

    num_steps = len(data_loader)
    loss_meter = AverageMeter()
    norm_meter = MyAverageMeter(300)

    amp_type = torch.float16 if config.AMP_TYPE == 'float16' else torch.bfloat16
    for idx, (samples, targets) in enumerate(data_loader):
        end_here(epoch, idx)
        samples = samples.to(DEVICE, non_blocking=True)
        targets = targets.to(DEVICE, non_blocking=True)

        if mixup_fn is not None:
            samples, targets = mixup_fn(samples, targets)

        if config.AMP_OPT_LEVEL != 'O0':
            with amp_autocast(dtype=amp_type):
                outputs = model(samples)
        else:
            with amp_autocast():
                outputs = model(samples)

        if config.TRAIN.ACCUMULATION_STEPS > 1:
            if config.AMP_OPT_LEVEL != 'O0':
                with amp_autocast(dtype=amp_type):
                    loss = criterion(outputs, targets)
                    loss = loss / config.TRAIN.ACCUMULATION_STEPS
            else:
                with amp_autocast():
                    loss = criterion(outputs, targets)
                    loss = loss / config.TRAIN.ACCUMULATION_STEPS
            if config.AMP_OPT_LEVEL != 'O0':
                is_second_order = (
                    hasattr(optimizer, 'is_second_order') and optimizer.is_second_order
                )
                grad_norm = loss_scaler(
                    loss,
                    optimizer,
                    clip_grad=config.TRAIN.CLIP_GRAD,
                    parameters=model.parameters(),
                    create_graph=is_second_order,
                    update_grad=(idx + 1) % config.TRAIN.ACCUMULATION_STEPS == 0,
                )
                if (idx + 1) % config.TRAIN.ACCUMULATION_STEPS == 0:
                    optimizer.zero_grad()
                    if model_ema is not None:
                        model_ema.update(model)
            else:
                loss.backward()
                if config.TRAIN.CLIP_GRAD:
                    grad_norm = torch.nn.utils.clip_grad_norm_(
                        model.parameters(), config.TRAIN.CLIP_GRAD
                    )
                else:
                    grad_norm = get_grad_norm(model.parameters())
                if (idx + 1) % config.TRAIN.ACCUMULATION_STEPS == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    if model_ema is not None:
                        model_ema.update(model)
            if (idx + 1) % config.TRAIN.ACCUMULATION_STEPS == 0:
                lr_scheduler.step_update(epoch * num_steps + idx)
        else:
            if config.AMP_OPT_LEVEL != 'O0':
                with amp_autocast(dtype=amp_type):
                    loss = criterion(outputs, targets)
            else:
                with amp_autocast():
                    loss = criterion(outputs, targets)
            optimizer.zero_grad()
            if config.AMP_OPT_LEVEL != 'O0':
                is_second_order = (
                    hasattr(optimizer, 'is_second_order') and optimizer.is_second_order
                )
                grad_norm = loss_scaler(
                    loss,
                    optimizer,
                    clip_grad=config.TRAIN.CLIP_GRAD,
                    parameters=model.parameters(),
                    create_graph=is_second_order,
                    update_grad=(idx + 1) % config.TRAIN.ACCUMULATION_STEPS == 0,
                )
                if model_ema is not None:
                    model_ema.update(model)
            else:
                loss.backward()
                if config.TRAIN.CLIP_GRAD:
                    grad_norm = torch.nn.utils.clip_grad_norm_(
                        model.parameters(), config.TRAIN.CLIP_GRAD
                    )
                else:
                    grad_norm = get_grad_norm(model.parameters())
                optimizer.step()
                if model_ema is not None:
                    model_ema.update(model)

            lr_scheduler.step_update(epoch * num_steps + idx)

        loss_meter.update(loss.item(), targets.size(0))
        if grad_norm is not None:
            norm_meter.update(grad_norm.item())

        lr = optimizer.param_groups[0]['lr']
        boundary = (idx + 1) % config.TRAIN.ACCUMULATION_STEPS == 0
        record(config, at=[epoch, idx], loss=loss.item(), lr=lr)
        if boundary:
            record(config, update=[epoch, idx], norm=grad_norm.item())
        if idx % config.PRINT_FREQ == 0:
            logger.info(
                f'Train: [{epoch}/{config.TRAIN.EPOCHS}][{idx}/{num_steps}] lr {lr:.6f} '
                f'loss {loss_meter.val:.4f} ({loss_meter.avg:.4f}) '
                f'grad_norm {norm_meter.val:.4f} ({norm_meter.avg:.4f}/{norm_meter.var:.4f})'
            )


@torch.no_grad()
def validate(config, data_loader, model, epoch=None, amp_autocast=suppress):
    criterion = torch.nn.CrossEntropyLoss()
    model.eval()

    loss_meter = AverageMeter()
    acc1_meter = AverageMeter()
    acc5_meter = AverageMeter()

    amp_type = torch.float16 if config.AMP_TYPE == 'float16' else torch.bfloat16
    for images, target in data_loader:
        images = images.to(DEVICE, non_blocking=True)
        target = target.to(DEVICE, non_blocking=True)
        if config.AMP_OPT_LEVEL != 'O0':
            with amp_autocast(dtype=amp_type):
                output = model(images)
        else:
            with amp_autocast():
                output = model(images)

        loss = criterion(output, target)
        acc1, acc5 = accuracy(output, target, topk=(1, 5))

        acc1 = reduce_tensor(acc1)
        acc5 = reduce_tensor(acc5)
        loss = reduce_tensor(loss)

        loss_meter.update(loss.item(), target.size(0))
        acc1_meter.update(acc1.item(), target.size(0))
        acc5_meter.update(acc5.item(), target.size(0))

    return acc1_meter.avg, acc5_meter.avg, loss_meter.avg


def start(arguments=None):
    _, config = parse_option(arguments)

    if not dist.is_initialized():  # the test runs several settings in one process
        dist.init_process_group(backend='nccl' if DEVICE == 'cuda' else 'gloo')
    dist.barrier()

    seed = config.SEED + dist.get_rank()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)

    scale = config.DATA.BATCH_SIZE * dist.get_world_size() / 512.0
    if config.TRAIN.ACCUMULATION_STEPS > 1:
        scale = scale * config.TRAIN.ACCUMULATION_STEPS
    config.defrost()
    config.TRAIN.BASE_LR = config.TRAIN.BASE_LR * scale
    config.TRAIN.WARMUP_LR = config.TRAIN.WARMUP_LR * scale
    config.TRAIN.MIN_LR = config.TRAIN.MIN_LR * scale
    config.freeze()

    os.makedirs(config.OUTPUT, exist_ok=True)
    logger = create_logger(config.OUTPUT, dist.get_rank(), config.MODEL.NAME)
    logger.info(config.dump())

    main(config, logger)


if __name__ == '__main__':
    start()
