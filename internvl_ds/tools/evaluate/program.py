"""What each rank does: build and load the model once, and evaluate it on one set after another."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode

from internvl_ds.checkpoint.restore import load_weights
from internvl_ds.config.tree import get_option, set_options
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.errors import ConfigError
from internvl_ds.files.addresses import shown
from internvl_ds.tools.evaluate.columns import COLUMNS
from internvl_ds.train.data import Loaders, build_loaders
from internvl_ds.train.setup import setup
from internvl_ds.train.validation import validate

Result = dict[str, Any]


def evaluate_variants(
    config: CfgNode,
    paths: Mapping[str, str],
    ds_config: str | None,
    name: str,
    logger: logging.Logger,
) -> Result:
    """Evaluates a checkpoint on data sets. Collective: every rank calls it.

    All data sets are opened before the model is built: a faulty one is an error at once.

    Args:
        config: of EVAL_MODE; MODEL.RESUME, or MODEL.PRETRAINED, are the weights.
        paths: DATA.DATASET -> DATA.DATA_PATH.
        ds_config: as for the training program.
        name: of the model, in the table.
        logger: gets a line for each data set.

    Returns:
        ``checkpoint``, ``ranks``, and ``rows``: one of the weights and, with TRAIN.EMA.ENABLE, one
        of their average, each with ``name`` and ``results``: of each data set ``acc1``, ``acc5``
        (percent), ``loss``, ``count`` (images) and ``labelled`` (images that the accuracies cover).

    Raises:
        ConfigError: for data, weights or settings that do not fit.
    """
    weights = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if not weights and not get_option(config, 'MODEL.INTERN_VIT_6B.PRETRAINED', None):
        raise ConfigError('there are no weights to evaluate: give --resume, or MODEL.PRETRAINED')
    loaders = _open(config, paths)
    first = next(iter(paths.items()))
    run = setup(_with_data(config, *first), ds_config, logger)
    settled = run.config
    if settled.DATA.BATCH_SIZE != config.DATA.BATCH_SIZE:  # the ds_config has decided
        loaders = _open(settled, paths)

    def row(of: str) -> Result:
        results = {}
        for dataset, path in paths.items():
            run.config = _with_data(settled, dataset, path)
            run.loaders = loaders[dataset]
            results[dataset] = vars(validate(run, f'{COLUMNS[dataset][0]}{of}'))
        return {'name': f'{name}{of}', 'results': results}

    rows = [row('')]
    if run.averaged_weights is not None:
        load_weights(run.engine, run.averaged_weights, f'EMA of {shown(weights)}')
        rows.append(row(' (EMA)'))
    return {'checkpoint': shown(weights), 'ranks': world_size(), 'rows': rows}


def _open(config: CfgNode, paths: Mapping[str, str]) -> dict[str, Loaders]:
    return {
        dataset: build_loaders(_with_data(config, dataset, path), rank(), world_size())
        for dataset, path in paths.items()
    }


def _with_data(config: CfgNode, dataset: str, path: str) -> CfgNode:
    return set_options(config.clone(), {'DATA.DATASET': dataset, 'DATA.DATA_PATH': path})
