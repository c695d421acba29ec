"""The files of DeepSpeed in a tag, found and read as data: no code of a file runs.

Layouts are those of DeepSpeed 0.19 (see deepspeed/utils/zero_to_fp32.py for its own reader).
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from internvl_ds.checkpoint.formats.allowed import reason_of, refused_class
from internvl_ds.checkpoint.formats.tensor_files import load_torch
from internvl_ds.checkpoint.frozen.frozen_file import joined
from internvl_ds.checkpoint.tag.discovery import file_sizes, read_manifest
from internvl_ds.checkpoint.tag.identity import (
    is_first_optim,
    model_names,
    optim_names,
    require_identity,
)
from internvl_ds.checkpoint.tag.manifest import Identity
from internvl_ds.errors import CheckpointError, few


def read_shard(path: Path | str, *, mmap: bool = False) -> Any:
    """Reads one file that torch.save wrote. CheckpointError, naming it, for anything in it but
    tensors, plain types and what `allowed.allowed_globals` lists.
    """
    try:
        return load_torch(path, mapped=mmap)
    except pickle.UnpicklingError as error:
        class_name = refused_class(error)
        if class_name is None:
            raise CheckpointError(f'{path}: cannot be read: {reason_of(error)}') from error
        raise CheckpointError(
            f'{path}: refused, because it holds more than tensors and plain data: {class_name}'
        ) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f'{path}: cannot be read: {error or repr(error)}') from error


class ShardFiles:
    """The shards of one tag, ours or plain DeepSpeed's, and what all ranks share."""

    def __init__(self, tag: Path, contents: Mapping[Path, Any] | None = None) -> None:
        """Finds the files of the tag.

        Args:
            tag: the directory.
            contents: of a save under way, which no manifest lists yet: its files and their content.

        Raises:
            CheckpointError: when it has no model states, or its manifest cannot be read.
        """
        self.tag = tag
        manifest = None if contents else read_manifest(tag)
        self._header = None if manifest is None else manifest.header
        if contents:
            self._names = sorted(path.name for path in contents)
        else:
            self._names = sorted(file_sizes(tag) if manifest is None else manifest.files)
        self._contents = dict(contents or {})
        self.model_files = [tag / name for name in model_names(tag, self._names, self._stage_in)]

    @property
    def has_manifest(self) -> bool:
        """Whether this package wrote the tag; else it is plain DeepSpeed's."""
        return self._header is not None

    @cached_property
    def optim_files(self) -> list[Path]:
        """The files of the optimizer's states, in the order of the ranks."""
        bf16 = bool((self.ds_config.get('bf16') or {}).get('enabled'))
        return [self.tag / name for name in optim_names(self._names, self.world_size, bf16)]

    @property
    def unused(self) -> list[str]:
        """Of a tag without a manifest: files of weights or states of another layout."""
        if self._header is not None:
            return []
        files = {path.name for path in (*self.model_files, *self.optim_files)}
        kinds = ('.pt', '.pth', '.safetensors')
        return [name for name in self._names if name.endswith(kinds) and name not in files]

    def warn_unverified(self, logger: logging.Logger) -> None:
        """Warns of a tag without checksums."""
        if not self.has_manifest:
            logger.warning('%s has no manifest: it could not be verified', self.tag)

    @cached_property
    def head(self) -> Mapping[str, Any]:
        """The first rank's model states: what all ranks have in common is in it."""
        head = self.read(self.model_files[0])
        lacks = [k for k in ('module', 'dp_world_size', 'global_steps') if k not in head]
        if lacks:
            raise CheckpointError(
                f'{self.model_files[0]}: not the model states of DeepSpeed: has no {few(lacks)}'
            )
        return head

    def read(self, path: Path) -> Any:
        """The content of one file, mapped into memory; each file is read once.

        Raises:
            CheckpointError: as `read_shard`, and for a file of another rank or another save.
        """
        if path not in self._contents:
            content = read_shard(path, mmap=True)
            if not isinstance(content, Mapping):
                raise CheckpointError(
                    f'{path}: not the model states of DeepSpeed, nor its optimizer states'
                )
            if self._header is not None:
                require_identity(path, content.get(Identity.KEY), self._header)
            self._contents[path] = joined(self.tag, path, content)
        return self._contents[path]

    def _stage_in(self, name: str) -> int:
        return int(self.read(self.tag / name).get('optimizer_state_dict', {}).get('zero_stage', 0))

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that the tag was saved at."""
        zero = self.ds_config.get('zero_optimization') or {}
        return int(zero.get('stage', 0))

    @property
    def world_size(self) -> int:
        """The number of data-parallel ranks that saved it."""
        return int(self.head['dp_world_size'])

    @property
    def global_steps(self) -> int:
        """Updates counted by the engine that saved it."""
        return int(self.head['global_steps'])

    @property
    def updates(self) -> int:
        """The parameters whose state was applied, of these."""
        return self.global_steps - int(self.head.get('skipped_steps') or 0)

    @property
    def fresh(self) -> bool:
        """Whether it was saved before the first update."""
        return not self.updates

    @cached_property
    def ds_config(self) -> Mapping[str, Any]:
        """The ds_config of the saving run; if it was a path, as far as the files show it."""
        config = self.head.get('ds_config')
        if isinstance(config, Mapping):
            return config
        stages = [self._stage_in(n) for n in self._names if is_first_optim(n)]
        dtypes = {tensor.dtype for tensor in self.head['module'].values()}
        return {
            'zero_optimization': {'stage': max(stages, default=0)},
            'bf16': {'enabled': torch.bfloat16 in dtypes},
            'fp16': {'enabled': torch.float16 in dtypes},
        }
