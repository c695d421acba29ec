"""What a forked child does before all else."""

import os
import signal

from internvl_ds.files.forks import at_fork, forget


def _forked(action):
    """What ``action`` returns, a text, in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, action().encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return file.read()


def test_a_child_acts_once_the_last_added_first_and_its_parent_does_not():
    done = []
    for name in 'abc':
        at_fork(name, lambda name=name: done.append(name))
    assert forget('b')
    assert not forget('b')
    assert _forked(lambda: ''.join(done) + _forked(lambda: ''.join(done))) == 'caca'
    assert done == []
    assert forget('a')
    assert forget('c')


def test_a_child_handles_no_signal_before_it_has_acted():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append('signal'))

    def act():
        os.kill(os.getpid(), signal.SIGUSR1)
        heard.append('action')

    at_fork('act', act)
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert _forked(lambda: ' '.join(heard)) == 'action signal'
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    finally:
        forget('act')
        signal.signal(signal.SIGUSR1, before)
