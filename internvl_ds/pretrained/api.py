"""``load_pretrained``, before training, and ``convert_22k_head_to_1k``, before an engine exists."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from yacs.config import CfgNode

from internvl_ds.checkpoint.frozen.sources import named_in_config
from internvl_ds.checkpoint.restore import given_by_backbone
from internvl_ds.checkpoint.sources import downloads
from internvl_ds.config.choices import require_one_of
from internvl_ds.config.tree import checkpoint_option, get_option
from internvl_ds.dist.process_group import collectives_within, init_distributed
from internvl_ds.dist.rendezvous import agree, exchange, from_rank_0, rank
from internvl_ds.engine.registry import find_engine
from internvl_ds.errors import PretrainedError, RankError
from internvl_ds.files.addresses import shown
from internvl_ds.files.reading import interpreting
from internvl_ds.pretrained import apply, head, timm_weights, transforms, unwrapping
from internvl_ds.pretrained.classifier import classifier_layers
from internvl_ds.pretrained.known_formats import through_timm
from internvl_ds.pretrained.open_engine import open_engine
from internvl_ds.pretrained.open_source import open_source
from internvl_ds.pretrained.places import origins_in
from internvl_ds.pretrained.report import PretrainedReport
from internvl_ds.pretrained.transforms import Note, Specs, State, Step
from internvl_ds.zero.lazy_tensor import Flat
from internvl_ds.zero.origins import Origin, note_origins
from internvl_ds.zero.parameters import is_sharded, outside_zero_init, shard_alike, whole_shape

_M = TypeVar('_M', bound=nn.Module)

# First the keys get the model's names, then the tensors its sizes; the head comes after both.
_SIZING: tuple[Step, ...] = (
    transforms.resize_bias_tables,
    transforms.resize_absolute_pos_embeds,
    transforms.resize_pos_embeds,
    transforms.resize_patch_embeds,
)


@dataclass(frozen=True)
class Plan:
    """The values to write, decided before anything is written.

    Attributes:
        state: key of the model -> value, not read yet; only what the model has.
        rescale: layers of the model's own classifier that are scaled by 0.001.
        origins: key of the model -> where its value came from; None for what was made of others.
    """

    state: dict[str, Any]
    rescale: tuple[str, ...]
    report: PretrainedReport
    origins: Mapping[str, Origin | None] = field(default_factory=dict)


@named_in_config
def load_pretrained(config: CfgNode, model: nn.Module, logger: logging.Logger) -> PretrainedReport:
    """Loads the weights at MODEL.PRETRAINED into a module, adapted to it, before training.
    Collective: every rank calls it.

    Everything is checked before the first tensor of the model changes. A module built under
    ``deepspeed.zero.Init`` gets its slices tensor by tensor. Into an engine, or its module, they
    come as they would have before ``initialize``; a `ShardedEma` is made afterwards.

    Args:
        config: MODEL.PRETRAINED (a file, a directory, a tag or an address) and its settings are
            read, and TRAIN.RAND_INIT_FT_HEAD.
        model: a module on any device and of any dtype; or an engine that has not trained yet, or
            its module.
        logger: gets a line per step that did something, and the missing and unexpected keys.

    Returns:
        What was done, the same on every rank.

    Raises:
        PretrainedError: where the file cannot be read, has nothing or too little in common with the
            model, or does not fit it; and for an engine that has trained.
    """
    engine = find_engine(model)
    if engine is not None:
        with open_engine(engine) as module:
            return _load(config, module, logger, in_engine=True)
    return _load(config, model, logger, in_engine=False)


def _load(
    config: CfgNode, model: nn.Module, logger: logging.Logger, in_engine: bool
) -> PretrainedReport:
    apply.require_writable(model, 'load_pretrained', in_engine=in_engine)
    path = str(get_option(config, 'MODEL.PRETRAINED', ''))
    if not path:
        raise PretrainedError('MODEL.PRETRAINED is empty: there are no weights to load')
    if path == timm_weights.NAME:
        path = timm_weights.address_of(model)
    decide = functools.partial(_decide, config, path, model)
    return load_planned(config, model, decide, logger)


@outside_zero_init()
def load_planned(
    config: CfgNode,
    model: nn.Module,
    decide: Callable[[], Plan],
    logger: logging.Logger,
    *,
    alike: bool = False,
) -> PretrainedReport:
    """Decides what to write, and writes it. Collective: every rank calls it.

    Args:
        config: MODEL.PRETRAINED_READERS and CHECKPOINT.IO_TIMEOUT are read.
        model: as for `load_pretrained`.
        decide: reads files and changes nothing; no rank speaks to another in it.
        logger: gets the report.
        alike: whether ranks that hold whole models make sure that all decide the same, too.
    """
    readers = str(get_option(config, 'MODEL.PRETRAINED_READERS', 'all'))
    require_one_of('MODEL.PRETRAINED_READERS', readers, ('all', 'one'))
    is_partitioned = any(map(is_sharded, model.parameters()))
    values: Iterable[tuple[str, Any]]
    if readers == 'one':
        init_distributed(config)
        plan = _decide_on_rank_0(decide, checkpoint_option(config, 'IO_TIMEOUT'))
        values = _broadcast(plan.state)
    else:
        plan = _decide_alike(decide, config) if is_partitioned or alike else decide()
        values = plan.state.items()
    plan.report.log(logger)
    apply.rescale_head(model, plan.rescale)
    with collectives_within(checkpoint_option(config, 'IO_TIMEOUT')):
        all_tensors = all(isinstance(value, Tensor) for value in plan.state.values())
        if is_partitioned or readers == 'one' or not all_tensors:
            apply.write(model, values)
        else:
            apply.load_state(model, plan.state)
    note_origins(model, plan.origins)
    return plan.report


def convert_22k_head_to_1k(model: _M, logger: logging.Logger) -> _M:
    """Cuts an ImageNet-22K classifier (21841 rows) to the 1000 rows of ImageNet-1K.

    Weight and bias become new parameters, so call it before an optimizer or an engine takes them;
    on every rank where the head was built under zero.Init.

    Args:
        model: a module, or a wrapper that has it as ``.module``; changed in place.
        logger: gets what was done, or, for a head of another length, that nothing was.

    Returns:
        The same object.

    Raises:
        PretrainedError: for a DeepSpeed engine or its module.
    """
    wrapped = getattr(model, 'module', None)
    inner = wrapped if isinstance(wrapped, nn.Module) else model
    for part in (inner, model):
        apply.require_writable(part, 'convert_22k_head_to_1k')
    layers: list[Any] = [inner.get_submodule(name) for name in classifier_layers(inner)]
    layers = [part for part in layers if isinstance(getattr(part, 'weight', None), nn.Parameter)]
    kind = type(inner).__name__
    if not layers:
        logger.warning(f'{kind} has no head with a weight: unchanged')
        return model
    lengths = [whole_shape(layer.weight)[0] for layer in layers]
    if head.CLASSES_22K not in lengths:
        rows = f'{lengths[-1]} rows, not {head.CLASSES_22K}'
        logger.warning(f'the head of {kind} has {rows}: unchanged')
        return model
    for layer, length in zip(layers, lengths, strict=True):
        if length == head.CLASSES_22K:
            _cut(layer)
    logger.info(f'the head keeps the {head.CLASSES_1K} ImageNet-1K rows of its ImageNet-22K rows')
    return model


def _decide(config: CfgNode, path: str, model: nn.Module) -> Plan:
    """Opens the weights and adapts them. Reads files; no collective."""
    name, path = shown(path), downloads.local(path, config)
    source, front = open_source(config, path)
    try:
        with interpreting('the file', PretrainedError):
            plan = _adapt(config, name, source, model)
            return replace(plan, origins=origins_in(path, source, plan.state, model, front=front))
    except PretrainedError as error:
        raise PretrainedError(f'{name}: {error}') from error


def _adapt(config: CfgNode, path: str, source: State, model: nn.Module) -> Plan:
    specs, classifier = apply.describe(model), classifier_layers(model)
    rename = get_option(config, 'MODEL.PRETRAINED_RENAME', [])
    taking: tuple[Step, ...] = (
        unwrapping.unwrap_by(str(get_option(config, 'MODEL.PRETRAINED_KEY', '') or '')),
        transforms.rename_by(rename),
        unwrapping.drop_inner_wrappers,
        unwrapping.take_part,
    )
    raw, taking_notes = run_steps(taking, source, specs)
    naming: tuple[Step, ...] = (
        unwrapping.strip_prefixes,
        transforms.rename_internvit,
        functools.partial(through_timm, model, classifier, raw),
        transforms.drop_rebuilt,
    )
    state, naming_notes = run_steps(naming, raw, specs)
    notes = taking_notes + naming_notes
    apply.require_overlap(state, specs, notes)
    state, size_notes = run_steps(_SIZING, state, specs)
    rand_init = bool(get_option(config, 'TRAIN.RAND_INIT_FT_HEAD', False))
    layers = head.other_layers(classifier, state, specs)
    fit_head = functools.partial(head.fit_head, layers, rand_init)
    state, head_notes = run_steps((fit_head,), state, specs)
    apply.require_shapes(state, specs)
    rescale = layers if rand_init else ()
    given = given_by_backbone(model)  # by another file, a moment ago
    report = PretrainedReport(
        path=path,
        notes=notes + size_notes + head_notes,
        loaded=tuple(key for key in state if key in specs),
        missing=tuple(key for key in specs if key not in state and key not in given),
        unexpected=tuple(key for key in state if key not in specs),
        matched=_share_in(model, state, given, rescale),
    )
    report.require(float(get_option(config, 'MODEL.PRETRAINED_MIN_MATCH')))
    plan_state = {key: state[key] for key in report.loaded}
    for value in plan_state.values():
        if isinstance(value, Flat):
            value.pieces(0, value.numel)  # opens the shards that it lies in
    return Plan(plan_state, rescale, report)


def _share_in(
    model: nn.Module, state: State, given: Container[str], rescale: Sequence[str]
) -> float:
    head = tuple(f'{layer}.' for layer in rescale)
    names = [
        name
        for name, _ in model.named_parameters()
        if not name.startswith(head) and (name in state or name not in given)
    ]
    return sum(name in state for name in names) / len(names) if names else 1.0


def run_steps(steps: Iterable[Step], state: State, specs: Specs) -> tuple[State, tuple[Note, ...]]:
    notes: tuple[Note, ...] = ()
    for step in steps:
        result = step(state, specs)
        state, notes = result.state, notes + result.notes
    return state, notes


def _decide_alike(decide: Any, config: CfgNode) -> Plan:
    """Every rank decides for itself; raises unless all decided the same."""
    timeout = checkpoint_option(config, 'IO_TIMEOUT')
    plan: Plan = agree('read pretrained weights', decide, timeout, PretrainedError)
    summary = [plan.report.path, list(plan.state), [list(v.shape) for v in plan.state.values()]]
    answers = exchange('compare pretrained weights', summary, timeout)
    other = next((r for r, theirs in enumerate(answers) if theirs != answers[0]), None)
    if other is not None:
        raise RankError(
            f'load_pretrained: rank {other} would load {len(answers[other][1])} entries of '
            f'{answers[other][0]}, and rank 0 {len(answers[0][1])} of {answers[0][0]}: '
            'MODEL.PRETRAINED must be the same weights on all ranks'
        )
    return plan


def _decide_on_rank_0(decide: Any, timeout: float) -> Plan:
    """Rank 0 decides; the others get its plan without the values."""
    plans: list[Plan] = []

    def tell() -> list[Any]:
        plan = decide()
        plans.append(plan)
        values = [
            [key, list(value.shape), str(value.dtype).removeprefix('torch.')]
            for key, value in plan.state.items()
        ]
        origins = {key: origin and asdict(origin) for key, origin in plan.origins.items()}
        return [values, plan.rescale, asdict(plan.report), origins]

    values, rescale, fields, origins = from_rank_0('read pretrained weights', tell, timeout)
    if plans:
        return plans[0]
    state = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device='meta')
        for key, shape, dtype in values
    }
    fields['notes'] = [Note(**note) for note in fields['notes']]
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    known = {key: said and Origin.of(said) for key, said in origins.items()}
    return Plan(state, tuple(rescale), PretrainedReport(**{**fields, **lists}), known)


def _broadcast(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The values of rank 0, one at a time. Collective: every rank iterates over all of them."""
    device = get_accelerator().current_device_name()
    for key, value in state.items():
        if rank() == 0:
            tensor = transforms.read(value).detach().to(device).contiguous()
        else:
            tensor = torch.empty(value.shape, dtype=value.dtype, device=device)
        if tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), 0)
        yield key, tensor


def _cut(layer: Any) -> None:
    layer.weight = _take_rows(layer.weight)
    if isinstance(getattr(layer, 'bias', None), nn.Parameter):
        layer.bias = _take_rows(layer.bias)
    for name in ('out_features', 'out_channels'):  # of a Linear, of a convolution
        if getattr(layer, name, None) == head.CLASSES_22K:
            setattr(layer, name, head.CLASSES_1K)


def _take_rows(parameter: Any) -> nn.Parameter:
    sharded = is_sharded(parameter)
    with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
        rows = head.imagenet_22k_rows().to(parameter.device)
        result = nn.Parameter(parameter.detach()[rows], requires_grad=parameter.requires_grad)
    if sharded:
        shard_alike(parameter, result)
    return result
