"""Whether a save keeps frozen parameters apart, and how: CHECKPOINT.FROZEN."""

from __future__ import annotations

import logging
from pathlib import Path

from yacs.config import CfgNode

from internvl_ds.checkpoint.checkpoint_engine import ShardWriter
from internvl_ds.checkpoint.frozen.omitting import Omitting, omitting
from internvl_ds.checkpoint.frozen.sharing import Sharing, frozen_mode, sharing
from internvl_ds.config.choices import frozen_of
from internvl_ds.zero.wrapper import Wrapper


def apart_of(
    wrapper: Wrapper, config: CfgNode, staging: Path, writer: ShardWriter, logger: logging.Logger
) -> Sharing | Omitting | None:
    """How a save into ``staging`` keeps what is frozen apart; None where the tag holds it."""
    mode, is_asked = frozen_mode(wrapper, config), frozen_of(config) != 'auto'
    if mode == 'omit':
        return omitting(wrapper, writer.compared)
    if mode == 'keep':
        return None
    apart = sharing(wrapper, staging.parent, staging, writer.seen)
    if not (is_asked or apart.has_links()):
        return None
    if not is_asked and writer.last_size is None:
        logger.info(
            'most parameters are frozen: they stand in a file that the tags share '
            "(CHECKPOINT.FROZEN 'auto'). Plain DeepSpeed loads such a tag with "
            "load_module_strict=False; 'keep' writes them into each"
        )
    return apart
