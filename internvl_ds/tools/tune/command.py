"""The command of a trial: a launcher's words, completed so that they start the training program."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_ds.errors import ConfigError
from internvl_ds.files.reading import LOG_BYTES, open_data

PROGRAM = 'internvl_ds.train'

_PYTHON = re.compile(r'python(3(\.\d+)?)?')
_MPI = ('mpirun', 'mpiexec', 'mpiexec.hydra', 'srun')


def complete(
    words: Sequence[str], port: int, program: str = PROGRAM
) -> tuple[list[str], int | None]:
    """Completes a launcher's words.

    Words that name the training program, or a script whose text does, stay as they are; after
    deepspeed, torchrun, python, mpirun, mpiexec and srun it is added. deepspeed, and
    launch/train_deepspeed.sh on one host, get a port where they name none: two jobs on one host
    would meet at their default.

    Args:
        words: what comes before the training program's own arguments.
        port: a free one on this host.
        program: the module to start.

    Returns:
        The words, and rank 0's port where it is known.

    Raises:
        ConfigError: for a launcher that is not there, or words that start something else.
    """
    if not words:
        raise ConfigError(
            'no launcher is given: end the command with its words, such as '
            '-- deepspeed --num_gpus 2'
        )
    if shutil.which(words[0]) is None:
        raise ConfigError(f'{words[0]}: there is no such program on PATH to launch trials with')
    name, last = Path(words[0]).name, Path(words[-1]).name
    result = list(words)
    script = next((word for word in words if _script_names(word, program)), None)
    if not any(program in word for word in words) and script is None:
        if name == 'deepspeed':
            result += ['--no_local_rank', '--module', program]
        elif name == 'torchrun' or _PYTHON.fullmatch(last):
            result += ['-m', program]
        elif name in _MPI:
            result += [sys.executable, '-m', program]
        else:
            raise ConfigError(
                f'the launcher {" ".join(words)!r} does not start {program}: name it there, as in '
                f'-- {words[0]} ... python -m {program}'
            )
    if name == 'deepspeed':
        return _with_port(result, '--master_port', 1, port)
    if script is not None and Path(script).name == 'train_deepspeed.sh':
        return _with_port(result, '--port', result.index(script) + 1, port)
    return result, None


def trial_words(
    cfg: str, folder: Path, data_path: str | None, user_opts: Sequence[str], opts: Mapping[str, Any]
) -> list[str]:
    """The training program's arguments; ``opts`` win over the user's.

    OUTPUT's parent is ``out`` in the trial's ``folder``, where ds_config.json lies.
    """
    data = ['--data-path', data_path] if data_path else []
    return [
        '--cfg', cfg, '--output', str(folder / 'out'),
        '--deepspeed_config', str(folder / 'ds_config.json'),
        *data, '--opts', *user_opts, *opt_words(opts),
    ]  # fmt: skip


def opt_words(opts: Mapping[str, Any]) -> list[str]:
    """Settings as KEY VALUE words, whose values are read as YAML."""
    words: list[str] = []
    for key, value in opts.items():
        words += [key, value if isinstance(value, str) else json.dumps(value)]
    return words


def _with_port(
    words: list[str], option: str, place: int, port: int
) -> tuple[list[str], int | None]:
    for index, word in enumerate(words):
        values = words[index + 1 : index + 2] if word == option else word.split('=', 1)[1:]
        if word.split('=', 1)[0] == option and values:
            return words, int(values[0]) if values[0].isdigit() else None
    # A port that is free here may not be so on another host.
    if any(word.split('=')[0] in ('--hostfile', '-H', '--num_nodes') for word in words):
        return words, None
    return [*words[:place], option, str(port), *words[place:]], port


def _script_names(word: str, program: str) -> bool:
    path = Path(word)
    if path.suffix not in ('.sh', '.sbatch', '.bash') or not path.is_file():
        return False
    with open_data(path) as file:
        return program.encode() in file.read(LOG_BYTES)
