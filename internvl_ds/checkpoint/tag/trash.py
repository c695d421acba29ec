"""Removes directories of an output directory: renames first, deletes a mark last. Files only.

The mark inside says that this package is removing the directory: where the process is killed, any
other one may remove the rest.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from pathlib import Path

from internvl_ds.checkpoint.tag.owner import read_owner, this_process
from internvl_ds.files import write_text

logger = logging.getLogger(__name__)

TRASH = '.trash-'
MARK = '.internvl_ds-owner'


def discard(path: Path) -> bool | None:
    """Renames a directory, then removes it; warns of what cannot be removed.

    Returns whether all of it is gone; None where somebody else has taken it away.
    """
    trash = path.with_name(f'{TRASH}{path.name}-{secrets.token_hex(8)}')
    try:
        if path.is_symlink():  # a user's, to a tag elsewhere, which stays
            path.unlink()
            return True
        if read_owner(path / MARK) is None:
            write_text(path / MARK, this_process().to_text())
        path.rename(trash)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning('could not remove %s: %s', path, error)
        unlink(path / MARK)
        return False
    return remove_marked(trash)


def remove_marked(trash: Path) -> bool:
    """Removes a directory, its mark last, as another process may do at the same time; or warns."""
    while trash.exists():
        try:
            for path in [path for path in trash.iterdir() if path.name != MARK]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            shutil.rmtree(trash)
        except FileNotFoundError:
            continue
        except OSError as error:
            logger.warning('could not remove all of %s: %s', trash, error)
            return False
    return True


def unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning('could not remove %s: %s', path, error)
