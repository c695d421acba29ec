"""Entry point of a rank of ``internvl-ds evaluate``; any launcher may start it by itself, too."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from internvl_ds.tools.evaluate.arguments import add_arguments
from internvl_ds.tools.evaluate.columns import RESULT, as_table, choose_paths
from internvl_ds.tools.text import json_text


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates; rank 0 writes result.json into --output, and the table into its log.

    An exception on this rank ends it with a non-zero exit status.
    """
    parser = argparse.ArgumentParser(prog='internvl_ds.tools.evaluate', allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument('--local-rank', '--local_rank', type=int, help='set by the launcher')
    args = parser.parse_args(argv)
    # Not above: torch and DeepSpeed take seconds.
    from internvl_ds.config.tree import get_config, set_options
    from internvl_ds.dist.process_group import init_distributed, shutdown
    from internvl_ds.dist.rendezvous import rank
    from internvl_ds.files import write_text
    from internvl_ds.tools.evaluate.program import evaluate_variants
    from internvl_ds.train.reporting.log import close_log, open_log

    paths, lacking = choose_paths(args.data, args.variants)
    output, name = args.output, args.name or Path(args.cfg).name
    args.eval, args.output = True, None
    # A checkpoint that happens to lie in OUTPUT is not what was asked for.
    more = {'OUTPUT': str(output), 'TRAIN.AUTO_RESUME': False}
    config = set_options(get_config(args), more)
    init_distributed(config)
    logger = open_log(output, rank())
    try:
        if lacking:
            logger.warning('%s: has no folder for %s', args.data, ', '.join(lacking))
        result = evaluate_variants(config, paths, args.deepspeed_config, name, logger)
        logger.info('top-1 accuracy, percent\n%s', as_table(result))
        if rank() == 0:
            write_text(output / RESULT, json_text(result) + '\n')
    finally:
        close_log(logger)
    shutdown()
    return 0


if __name__ == '__main__':
    from internvl_ds.dist.signals import end_at_interrupt

    end_at_interrupt()
    status = main()
    from internvl_ds.dist.process_group import leave

    leave(status)
