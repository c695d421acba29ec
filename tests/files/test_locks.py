"""Who holds a lock, and where there are none."""

import errno
import fcntl

from internvl_ds.files.locks import try_lock


def test_one_holds_it_until_the_file_is_closed(tmp_path):
    path = tmp_path / 'lock'
    with path.open('w') as first:
        assert try_lock(first) is True
        with path.open('w') as second:
            assert try_lock(second.fileno()) is False
    with path.open('w') as second:
        assert try_lock(second) is True


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', refuse)
    with (tmp_path / 'lock').open('w') as file:
        assert try_lock(file) is None
