"""Which files of a directory make up a tag, and whose they are. Files only; knows no ranks.

A tag with a manifest is what the manifest lists. A tag without one, as plain DeepSpeed writes it,
is what DeepSpeed itself would look for; whatever else lies there belongs to nobody.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from internvl_ds.checkpoint.tag.manifest import Header, Identity, file_rank
from internvl_ds.errors import CheckpointError, few

# As DeepSpeed 0.19 names them (engine.py, _get_ckpt_name and _get_zero_ckpt_name).
_MODEL = re.compile(r'(zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt')
_OPTIM = re.compile(r'(bf16_)?zero_pp_rank_\d+_mp_rank_00_optim_states\.pt')


def model_names(tag: Path, names: Iterable[str], zero_stage: Callable[[str], int]) -> list[str]:
    """The files of the model's states, in the order of the ranks.

    Args:
        tag: the directory, for the CheckpointError where there are none, or they are of
            model-parallel ranks.
        names: what its manifest lists, or what lies there.
        zero_stage: the ZeRO stage of a file of optimizer states; asked only where ``names`` are of
            two tags, one copied over the other.
    """
    matches = {name: match for name in names if (match := _MODEL.fullmatch(name))}
    if not matches:
        raise CheckpointError(f'{tag}: no *_model_states.pt, so it is no DeepSpeed checkpoint')
    slices = [name for name, match in matches.items() if match[1]]  # of stage 3
    whole = [name for name in matches if name not in slices]
    if slices and whole:
        # The optimizer's files have the same names in both, and say which tag was saved last.
        optim = [n for n in names if is_first_optim(n)]
        whole = [] if optim and zero_stage(optim[0]) == 3 else whole
    files = whole or slices
    parallel = [name for name in files if matches[name][2] != '00']
    if parallel:
        raise CheckpointError(
            f'{tag}: {few(parallel)}: of model-parallel ranks, and only data-parallel tags are read'
        )
    return sorted(files, key=file_rank)


def optim_names(names: Iterable[str], ranks: int, bf16: bool) -> list[str]:
    """The files of the optimizer's states, in the order of the ranks.

    Args:
        names: what the manifest lists, or what lies there.
        ranks: how many ranks saved the tag: files of others are of another save.
        bf16: whether the bf16 engine saved it, whose files are named so.
    """
    candidates = [name for name in names if _OPTIM.fullmatch(name) and file_rank(name) < ranks]
    of_engine = [name for name in candidates if name.startswith('bf16_') == bf16]
    return sorted(of_engine or candidates, key=file_rank)


def is_first_optim(name: str) -> bool:
    """Whether a file is of rank 0's optimizer states."""
    return bool(_OPTIM.fullmatch(name)) and file_rank(name) == 0


def require_identity(path: Path, entry: Any, header: Header) -> None:
    """Raises CheckpointError for another rank's or another save's file, whatever its checksum.

    Args:
        path: of the file.
        entry: what the file says of itself, as `Identity.to_dict` gives it; None for nothing.
        header: of the tag that it lies in; one of an earlier version does not say its save.
    """
    rank = file_rank(path.name)
    right = Identity(header.tag, header.save, rank).to_dict()
    linked = [Identity(tag, save, rank).to_dict() for save, tag in header.linked.items()]
    if not header.save or entry in (right, *linked):
        return
    text = 'what does not say whose it is' if entry is None else Identity.describe(entry)
    raise CheckpointError(
        f'{path}: holds {text}, and {Identity.describe(right)} belongs here: it was copied from '
        'elsewhere. Put the right file back, or take another tag.'
    )
