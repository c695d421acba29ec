"""Whether DeepSpeed loads a tag into an engine directly, or the tag is resharded: their layouts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.load_context import Load
from internvl_ds.checkpoint.restore import model_shapes, require_same_model
from internvl_ds.checkpoint.tag.discovery import read_header
from internvl_ds.checkpoint.tag.verify import training_files
from internvl_ds.config.ds.resolve import precision_of
from internvl_ds.dist.rendezvous import rank, ranks_of_host, world_size
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.errors import CheckpointError
from internvl_ds.files.reading import interpreting
from internvl_ds.zero.partition import describe


class TagLayout(NamedTuple):
    """How a training state is partitioned, and the precision that it trains in."""

    zero_stage: int
    ranks: int
    precision: str

    def __str__(self) -> str:
        return describe(*self)


def fits_directly(load: Load, engine: DeepSpeedEngine, tag: Path) -> bool:
    """Whether DeepSpeed can load a tag itself. Collective: every rank calls it.

    What will be read is compared with its checksums, either way: CheckpointError for a damaged
    file, and for a tag of another model.
    """

    def same_layout() -> bool:
        with interpreting(tag, CheckpointError):
            return layout_of_tag(tag) == layout_of_engine(engine) and of_this_deepspeed(tag)

    def groups_fit() -> bool:
        with interpreting(tag, CheckpointError):
            shards = TagShards(tag)
            require_same_model(shards.shapes(), model_shapes(engine.module), str(tag))
            return same_groups(engine, shards)

    if load.from_rank_0('compare layouts', same_layout):
        load.verify(
            tag, lambda manifest: training_files(manifest, rank(), ranks_of_host()), shared=False
        )
        if load.from_rank_0('compare groups', groups_fit):
            return True
    load.verify(tag, training_files, shared=True)
    return False


def layout_of_tag(tag: Path) -> TagLayout:
    """The layout that a tag was saved with, from its manifest, or its shards without one."""
    header = read_header(tag)
    if header is not None:
        return TagLayout(header.zero_stage, header.world_size, header.precision)
    shards = TagShards(tag)
    return TagLayout(shards.zero_stage, shards.world_size, precision_of(shards.ds_config))


def of_this_deepspeed(tag: Path) -> bool:
    """Whether DeepSpeed may load a tag itself: ours, or of the running minor version.

    What earlier versions wrote differs in details: before 0.10 FusedAdam counted its updates in the
    parameter groups, which no other optimizer of today would find.
    """
    if read_header(tag) is not None:
        return True
    saved = str(TagShards(tag).head.get('ds_version')).split('.')
    return saved[:2] == deepspeed.__version__.split('.')[:2]


def layout_of_engine(engine: DeepSpeedEngine) -> TagLayout:
    """The layout that an engine would save with."""
    wrapper = wrapper_of(engine)
    return TagLayout(wrapper.stage, world_size(), precision_of(wrapper.ds_config))


def same_groups(engine: DeepSpeedEngine, shards: TagShards) -> bool:
    """Whether the parameter groups of a tag are those of an engine, and in its order."""
    tag_groups, engine_groups = shards.groups(), wrapper_of(engine).group_names()
    if [len(group) for group in tag_groups] != [len(group) for group in engine_groups]:
        return False
    return all(
        not a or not b or a == b
        for one, other in zip(tag_groups, engine_groups, strict=True)
        for a, b in zip(one, other, strict=True)
    )
