"""The schema of a ds_config: keys, types and limits of the installed DeepSpeed.

Nothing here is a list of DeepSpeed's keys. They are read off the installed version: from what its
configuration reads (`introspect`), from its pydantic models, and from the signatures of the
optimizers and schedulers that a ds_config may name. Of ours are only notes on values whose type the
installed code does not tell; a note for a key that is not known to it has no effect.
"""

from __future__ import annotations

import enum
import functools
import inspect
import itertools
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DtypeEnum
from deepspeed.runtime.engine import DeepSpeedEngine
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from internvl_ds.config.ds.introspect import Path, Read, keys_in_source, keys_read

BOOL, INT, NUMBER, TEXT, LIST, OBJECT, NULL = (
    'true or false', 'a whole number', 'a number', 'a text', 'a list', 'an object', 'null'
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """The values that a key takes. The schema takes 'auto' everywhere; resolve decides on it.

    Attributes:
        kinds: the JSON types, in words; empty where the installed version does not tell.
        choices: all values there are; empty for any of the kinds.
        least, most: limits of a number, themselves allowed.
        above, below: limits of a number, themselves not allowed.
        items: what each entry of a list takes.
    """

    kinds: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    items: Value | None = None


@dataclass
class Key:
    """One key of a ds_config, or the whole of it.

    Attributes:
        keys: those below it, by every name that they have; None for a value.
        complete: whether `keys` are all that there may be.
        default: what holds where the key is left out; None also where that is not known.
        refused: why DeepSpeed refuses the key; '' where it does not.
        successor: for a deprecated key, the name of the one to use; '' where there is none.
        deprecated: whether the key is going to go.
        name: how it is written; for a pydantic field its alias.
        model: the pydantic model of a block.
        required: the keys below it that may not be left out.
    """

    name: str = ''
    value: Value = field(default_factory=Value)
    keys: dict[str, Key] | None = None
    complete: bool = True
    default: Any = None
    refused: str = ''
    deprecated: bool = False
    successor: str = ''
    model: type[BaseModel] | None = None
    required: tuple[str, ...] = ()


_DTYPES = tuple(n for d in DtypeEnum for n in d._all_values if isinstance(n, str))
# Types and limits that the installed code does not tell, because it looks at none of them.
_NOTES: tuple[tuple[Value, str], ...] = (
    (Value((INT,), above=0),
     'train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps vocabulary_size '
     'sequence_parallel_size data_parallel_size fp16/loss_scale_window fp16/min_loss_scale '
     'fp16/hysteresis flops_profiler/profile_step'),
    (Value((INT, NULL), above=0), 'steps_per_print activation_checkpointing/number_checkpoints'),
    (Value((INT,), least=0), 'fp16/initial_scale_power'),
    (Value((NUMBER,), least=0), 'gradient_clipping fp16/loss_scale'),
    (Value((NUMBER,), above=0), 'gradient_predivide_factor'),
    (Value((BOOL,)), 'optimizer/legacy_fusion'),
    (Value((TEXT,)), 'optimizer/type scheduler/type'),
    (Value((TEXT, NULL)), 'communication_data_type seq_parallel_communication_data_type log_level '
     'flops_profiler/output_file'),
    (Value((TEXT,), _DTYPES), 'torch_autocast/dtype'),
    (Value((TEXT, NULL), _DTYPES),
     'data_types/grad_accum_dtype data_types/param_dtype data_types/buffer_dtype'),
    (Value((LIST,), items=Value((TEXT,))), 'torch_autocast/lower_precision_safe_modules'),
    # of bf16, null only means that the old name is to be looked for
    (Value((OBJECT,)), 'bf16 optimizer/params scheduler/params'),
)  # fmt: skip


def build() -> Key:
    """Reads the schema off the installed DeepSpeed. Takes a fraction of a second; nothing starts.

    Below /optimizer/params and /scheduler/params nothing is known here: see `optimizer_params` and
    `scheduler_params`.
    """
    root = Key(keys={})
    for path, read in sorted(keys_read().items()):
        parent = functools.reduce(lambda node, name: (node.keys or {})[name], path[:-1], root)
        assert parent.keys is not None  # its path is shorter, so it came before, as a block
        # What is refused by name stands beside a model's own fields.
        parent.keys[path[-1]] = _key_of(path, read)
    for value, paths in _NOTES:
        for name in paths.split():
            if node := find(root, name.split('/')):
                node.value = value
    for name in ('optimizer', 'scheduler'):
        params = find(root, (name, 'params'))
        if params is not None:
            params.keys, params.complete = {}, False
    return root


installed = functools.cache(build)  # once a process


def find(root: Key, path: Iterable[str]) -> Key | None:
    """The key at a path; None where there is none."""
    node: Key | None = root
    for name in path:
        node = (node.keys or {}).get(name) if node else None
    return node


def walk(root: Key, path: Path = ()) -> Iterator[tuple[Path, Key]]:
    """Every key below one, with its path; a key of two names comes twice."""
    for name, key in (root.keys or {}).items():
        yield (*path, name), key
        yield from walk(key, (*path, name))


def optimizer_types() -> list[str]:
    """The names that /optimizer/type may have."""
    return [*DEEPSPEED_OPTIMIZERS, *_subclasses(torch.optim, torch.optim.Optimizer)]


def optimizer_params(name: str, params: Mapping[str, Any], on_cpu: bool) -> Key | None:
    """What /optimizer/params takes, by the signature of the class that the engine makes of it.

    Args:
        name: /optimizer/type, one of `optimizer_types`, DeepSpeed's own in any case of letters.
        params: as stated; ``torch_adam`` chooses another class.
        on_cpu: whether the optimizer's state is offloaded, which chooses another class too.

    Returns:
        None where the class cannot be told or looked at.
    """
    from deepspeed.ops import adagrad, adam, lamb, lion

    lower = name.lower()
    if lower not in DEEPSPEED_OPTIMIZERS:
        return _key_of_signature(getattr(torch.optim, name))
    is_adam, extra = lower in ('adam', 'adamw'), []
    if is_adam:
        for reader in ('_configure_basic_optimizer', 'get_optimizer_configuration'):
            if method := getattr(DeepSpeedEngine, reader, None):  # no second before 0.18
                extra += keys_in_source(method, 'optimizer_parameters')
    classes = {
        'adam': (adam.FusedAdam, adam.DeepSpeedCPUAdam),
        'adamw': (adam.FusedAdam, adam.DeepSpeedCPUAdam),
        'adagrad': (torch.optim.Adagrad, adagrad.DeepSpeedCPUAdagrad),
        'lamb': (lamb.FusedLamb, lamb.FusedLamb),
        'lion': (lion.FusedLion, lion.DeepSpeedCPULion),
    }.get(lower)
    if classes is None:
        return None
    optimizer = classes[1] if on_cpu else classes[0]
    if 'torch_adam' in extra and params.get('torch_adam') is True:
        optimizer = torch.optim.AdamW
    elif is_adam:
        extra = [key for key in extra if key != 'foreach']  # read for torch's class only
    key = _key_of_signature(optimizer)
    assert key.keys is not None
    for argument in extra:
        key.keys.setdefault(argument, Key(argument))
    return key


def scheduler_types() -> list[str]:
    """The names that /scheduler/type may have."""
    torch_has = torch.optim.lr_scheduler
    return [*lr_schedules.VALID_LR_SCHEDULES, *_subclasses(torch_has, torch_has.LRScheduler)]


def scheduler_params(name: str) -> Key:
    """What /scheduler/params takes, by the signature of the class of that name."""
    scheduler = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name)
    return _key_of_signature(scheduler)


def _subclasses(module: types.ModuleType, base: type) -> list[str]:
    """The names of a module's public classes below ``base``."""
    return [
        name for name, c in vars(module).items()
        if inspect.isclass(c) and issubclass(c, base) and c is not base and name[0] != '_'
    ]  # fmt: skip


def _key_of(path: Path, read: Read) -> Key:
    name = path[-1]
    if read.refused:
        return Key(name, refused=read.refused)
    if read.model is not None:
        return _key_of_model(name, read.model, read.takes_null)
    if read.is_block:
        block = Value((OBJECT, NULL) if read.takes_null else (OBJECT,))
        # Where all of a block is copied, and nothing of it read, nothing is known of it.
        return Key(name, block, keys={}, complete=not read.copied)
    default = next((d for d in read.defaults if d is not None), None)
    tells = default != 'auto' and None not in read.defaults
    kinds = _KIND_OF_DEFAULT.get(type(default), ()) if tells else ()
    return Key(name, Value(kinds), default=default)


_KIND_OF_DEFAULT: dict[type, tuple[str, ...]] = {
    bool: (BOOL,), int: (INT,), float: (NUMBER,), str: (TEXT,), list: (LIST,), dict: (OBJECT,)
}  # fmt: skip


def _key_of_model(name: str, model: type[BaseModel], null: bool = False) -> Key:
    keys: dict[str, Key] = {}
    # A validator that is called before the fields' types count may let other types pass.
    validators = model.__pydantic_decorators__.model_validators.values()
    rewrites = any(validator.info.mode == 'before' for validator in validators)
    for field_name, info in model.model_fields.items():
        alias = info.alias or field_name
        key = _key_of_field(alias, info)
        if rewrites:
            key.value = Value()
        keys.update(dict.fromkeys((alias, field_name), key))
    return Key(name, Value((OBJECT, NULL) if null else (OBJECT,)), keys, model=model)


def _key_of_field(name: str, info: FieldInfo) -> Key:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    model = _model_in(info.annotation)
    if model is not None:
        key = _key_of_model(name, model, null=type(None) in typing.get_args(info.annotation))
    else:
        value = _value_of(info.annotation)
        for limit in info.metadata:
            for here, there in (('least', 'ge'), ('most', 'le'), ('above', 'gt'), ('below', 'lt')):
                if (number := getattr(limit, there, None)) is not None:
                    value = replace(value, **{here: number})
        key = Key(name, value)
        key.default = None if info.is_required() else info.get_default(call_default_factory=False)
    key.deprecated, key.successor = bool(extra.get('deprecated')), str(extra.get('new_param') or '')
    return key


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model of a field that is a block, optional or not."""
    for part in (annotation, *typing.get_args(annotation)):
        if inspect.isclass(part) and issubclass(part, BaseModel):
            return part
    return None


def _value_of(annotation: Any) -> Value:
    """The JSON values of an annotation; any value if the annotation is not understood."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [_value_of(part) for part in inner]
        if any(not part.kinds for part in parts):
            return Value()
        has_choices = all(part.choices or part.kinds == (NULL,) for part in parts)
        return Value(
            kinds=tuple(dict.fromkeys(kind for part in parts for kind in part.kinds)),
            choices=tuple(c for part in parts for c in part.choices) if has_choices else (),
            items=next((part.items for part in parts if part.items), None),
        )
    if origin is typing.Literal:
        return Value((TEXT,), inner)
    if origin in (list, tuple, set):
        return Value((LIST,), items=_value_of(inner[0]) if origin is list and inner else None)
    if origin is dict:
        return Value((OBJECT,))
    if inspect.isclass(annotation):
        if issubclass(annotation, enum.Enum):
            choices = tuple(dict.fromkeys(member.value for member in annotation))
            return Value((INT if issubclass(annotation, int) else TEXT,), choices)
        kinds = (kind for base, kind in _KIND_OF_CLASS if issubclass(annotation, base))
        return Value(tuple(itertools.islice(kinds, 1)))
    return Value()


_KIND_OF_CLASS: tuple[tuple[type, str], ...] = (
    (bool, BOOL), (int, INT), (float, NUMBER), (str, TEXT), (pathlib.Path, TEXT), (dict, OBJECT),
    (list, LIST), (tuple, LIST), (type(None), NULL),
)  # fmt: skip


def _key_of_signature(called: Callable[..., Any]) -> Key:
    """The keyword arguments of a class, but for its first, which the engine gives."""
    try:
        hints = typing.get_type_hints(called.__init__)
    except NameError:
        hints = {}
    keys: dict[str, Key] = {}
    required, complete = [], True
    for name, parameter in list(inspect.signature(called).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            complete = complete and parameter.kind is not parameter.VAR_KEYWORD
            continue
        if parameter.default is parameter.empty:
            required.append(name)
        keys[name] = Key(name, _value_of_argument(hints.get(name), parameter.default))
        keys[name].default = parameter.default
    return Key('params', Value((OBJECT,)), keys, complete, required=tuple(required))


def _value_of_argument(hint: Any, default: Any) -> Value:
    """The values of an argument, looser than a field's: a list gives one for each group."""
    value = _value_of(hint) if hint is not None else Value()
    kinds = value.kinds or _KIND_OF_DEFAULT.get(type(default), ())
    if isinstance(default, tuple):
        kinds = (LIST,)
    if BOOL not in kinds and (INT in kinds or NUMBER in kinds):
        # 0 is the default of many a float; text stands for no number.
        kinds = tuple(dict.fromkeys((INT if hint is int else NUMBER, LIST, *kinds)))
    if default is None and kinds:
        kinds = tuple(dict.fromkeys((*kinds, NULL)))
    return Value(kinds, value.choices)
