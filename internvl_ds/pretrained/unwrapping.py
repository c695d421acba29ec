"""The weights within a checkpoint: the entry that holds them, the network, prefixes of names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from internvl_ds.checkpoint.sources.open_weights import AVERAGES
from internvl_ds.errors import PretrainedError, few
from internvl_ds.pretrained.transforms import (
    Note,
    Result,
    Specs,
    State,
    Step,
    is_weight,
    renamed,
)

# Where weights lie in a file, the first that it has: of the original, of timm, Lightning and
# mmpretrain, of DINO (whose own evaluation takes the teacher), averages where there are no others,
# and of I-JEPA.
_ENTRIES = (
    'model', 'module', 'state_dict', 'model_state_dict', 'model_state', 'teacher', 'student',
    *AVERAGES, 'encoder',
)  # fmt: skip
DEPTH = 4  # of entries within entries

_WRAPPERS = (
    'module.', '_orig_mod.', 'backbone.', 'vision_model.', 'model.', '_fsdp_wrapped_module.',
    '_checkpoint_wrapped_module.',
)  # fmt: skip
# Those of parts of a model that were compiled or wrapped one by one.
_INSIDE = re.compile(r'(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
# InternViT and others have it in names of their own: it is taken off only where that fits.
_ENCODER = 'encoder.'
_SIM_RENAMES = {
    'fc_norm.weight': 'clip.classifier_ln.weight',
    'fc_norm.bias': 'clip.classifier_ln.bias',
    'head.weight': 'clip.classifier.weight',
    'head.bias': 'clip.classifier.bias',
}


def unwrap(state: State, specs: Specs) -> Result:
    """Takes the state dict out of a checkpoint: the first of the known entries, else itself."""
    notes: tuple[Note, ...] = ()
    for _ in range(DEPTH):
        entries = [name for name in _ENTRIES if isinstance(state.get(name), Mapping)]
        if not entries or (notes and any(map(is_weight, state.values()))):
            break
        state = state[entries[0]]
        others = f'; MODEL.PRETRAINED_KEY takes another: {few(entries[1:])}' if entries[1:] else ''
        notes += (Note(f'took the {len(state)} entries under {entries[0]!r}{others}'),)
    return Result(_named(state), notes)


def unwrap_by(key: str) -> Step:
    """A step that takes what lies under ``key``, MODEL.PRETRAINED_KEY; '' is `unwrap`.

    The key is of an entry of the file, or of one within another (``ckpt.model``), or the first
    part of the tensors' names (``teacher`` of ``teacher.norm.weight``).
    """

    def take(state: State, specs: Specs) -> Result:
        inner = _entry(state, key)
        if inner is None:
            weights = unwrap(state, specs).state
            start = f'{key}.'
            inner = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        if not inner:
            entries = [str(name) for name, value in state.items() if isinstance(value, Mapping)]
            raise PretrainedError(
                f'has nothing under MODEL.PRETRAINED_KEY {key!r}; entries that hold others: '
                f'{few(entries) or "none"}'
            )
        return Result(_named(inner), (Note(f'took the {len(inner)} entries under {key!r}'),))

    return take if key else unwrap


def drop_inner_wrappers(state: State, specs: Specs) -> Result:
    """Takes the wrappers of parts out of the names: ``blocks.0._orig_mod.norm1.weight``."""
    if any(map(_INSIDE.search, specs)):
        return Result(state)
    count = sum(_INSIDE.search(key) is not None for key in state)
    if not count:
        return Result(state)
    note = Note(f'took the names of wrappers out of {count} keys')
    return Result(renamed(state, {key: _INSIDE.sub('', key) for key in state}), (note,))


def take_part(state: State, specs: Specs) -> Result:
    """Keeps one network of a checkpoint of several: a student, a teacher, or SIM's backbone.

    Of these and all entries the one is kept of which the most names are the model's; where that
    does not decide, the first key does, as in the original.
    """
    first = next(iter(state), '')
    pair = ('student' in first or 'teacher' in first) - 0.5
    sim = ('mask_token' in first) - 0.5
    parts = [
        (0.0, Result(state)),
        (pair, _student(state)),
        (pair, _teacher(state)),
        (sim, _sim(state)),
    ]
    ranks = [
        (_matches(part.state, specs), bool(part.state), preference, -place)
        for place, (preference, part) in enumerate(parts)
    ]
    return parts[ranks.index(max(ranks))][1]


def strip_prefixes(state: State, specs: Specs) -> Result:
    """Takes off prefixes of wrappers that the model does not have: ``module.`` and the like."""
    prefixes = _prefixes(state, specs)
    notes: list[Note] = []
    count = -1
    while len(notes) != count:
        count = len(notes)
        for prefix in prefixes:
            keys = sum(key.startswith(prefix) for key in state)
            if keys:
                state = renamed(state, {key: key.removeprefix(prefix) for key in state})
                notes.append(Note(f'took the prefix {prefix} off {keys} keys'))
    return Result(state, tuple(notes))


def _entry(state: State, key: str) -> State | None:
    """The mapping under a key, or under its parts between dots."""
    inner = state.get(key)
    if inner is None and '.' in key:
        front, _, rest = key.partition('.')
        within = state.get(front)
        return _entry(within, rest) if isinstance(within, Mapping) else None
    return inner if isinstance(inner, Mapping) else None


def _named(state: State) -> State:
    odd = next((key for key in state if not isinstance(key, str)), None)
    if odd is not None:
        raise PretrainedError(f'not a state dict: {odd!r} is a key, and keys are names')
    return state


def _student(state: State) -> Result:
    entries = {
        key.replace('student.', ''): value
        for key, value in state.items()
        if 'student' in key and 'student_proj' not in key and 'teacher' not in key
    }
    return Result(entries, (Note(f'took the student: {len(entries)} of {len(state)} entries'),))


def _teacher(state: State) -> Result:
    entries = {
        key.replace('teacher.', ''): value
        for key, value in state.items()
        if 'teacher.' in key and 'student' not in key
    }
    return Result(entries, (Note(f'took the teacher: {len(entries)} of {len(state)} entries'),))


def _sim(state: State) -> Result:
    """The backbone of a SIM checkpoint, with its CLIP classifier as norm and head."""
    entries = {
        key.replace('dcnv3.', ''): value
        for key, value in state.items()
        if ('dcnv3' in key or 'clip_projector' in key) and 'mm_dcnv3' not in key
    }
    if entries:
        entries |= {new: state[old] for new, old in _SIM_RENAMES.items() if old in state}
    note = Note(f'took the SIM backbone and classifier: {len(entries)} of {len(state)} entries')
    return Result(entries, (note,))


def _prefixes(state: State, specs: Specs) -> list[str]:
    """The prefixes to take off, wherever they stand."""
    foreign = [
        prefix
        for prefix in (*_WRAPPERS, _ENCODER)
        if not any(key.startswith(prefix) for key in specs)
    ]
    if _ENCODER not in foreign:
        return foreign
    without = [prefix for prefix in foreign if prefix != _ENCODER]
    return foreign if _hits(state, specs, foreign) > _hits(state, specs, without) else without


def _matches(state: State, specs: Specs) -> int:
    return _hits(state, specs, _prefixes(state, specs)) if state else 0


def _hits(state: State, specs: Specs, prefixes: list[str]) -> int:
    return sum(name in specs for name in _stripped(state, tuple(prefixes)))


def _stripped(state: State, prefixes: tuple[str, ...]) -> Iterator[str]:
    for name in state:
        while prefix := next((p for p in prefixes if name.startswith(p)), ''):
            name = name.removeprefix(prefix)
        yield name
