"""The command with which each launcher starts the training program."""

from __future__ import annotations

from pathlib import Path

from tests.harness.ranks import ROOT


def start_command(launcher: str, ranks: int, port: str, hostfile: Path | None = None) -> list[str]:
    """What the training program's own arguments have to follow.

    Args:
        launcher: 'deepspeed', 'Open MPI', 'MPICH' (each by its script) or 'torchrun'.
        ranks: in all.
        port: for rank 0, where the launcher takes one and all ranks are on one host.
        hostfile: of hosts with two ranks each; None for this host alone.
    """
    if launcher == 'torchrun':
        options = ['--nproc-per-node', str(ranks), '--master-port', port]
        return ['torchrun', *options, '-m', 'internvl_ds.train']
    if launcher == 'deepspeed':
        script = 'train_deepspeed.sh'
        options = ['--hostfile', str(hostfile)] if hostfile else ['-n', str(ranks), '--port', port]
    else:
        script, options = 'train_mpi.sh', ['-n', str(ranks)]
        options += ['--ppn', '2', '--hostfile', str(hostfile)] if hostfile else []
        options += ['--allow-root'] if launcher == 'Open MPI' else []
    return ['bash', str(ROOT / 'launch' / script), *options, '--']
