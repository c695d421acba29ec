"""Weights at an address, from a real server: right, or one line that says why not, in time."""

import base64
import fcntl
import hashlib
import io
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
import safetensors.torch
import torch

from internvl_ds import load_checkpoint
from internvl_ds.checkpoint.sources import downloads
from internvl_ds.checkpoint.sources.downloads import fetch
from internvl_ds.checkpoint.sources.open_weights import open_weights
from internvl_ds.config.tree import default_config
from internvl_ds.errors import CheckpointError, ConfigError, PretrainedError
from internvl_ds.files.addresses import redacted
from internvl_ds.pretrained import load_pretrained
from internvl_ds.train.reporting.log import write_config
from tests.checkpoint.sources.test_open_weights import Payload
from tests.harness.ranks import base_env
from tests.harness.servers import redirect, reply, serving, trickle

STALL = 1.0  # MODEL.DOWNLOAD_TIMEOUT here
SLACK = 6.0  # and what a loaded machine may add to it
CHUNKED = {'Content_Length': None, 'Transfer_Encoding': 'chunked'}
SECRET = 'hunter2'


def weights(value):
    return safetensors.torch.save({'a': torch.full((1000,), float(value))})


def torch_file(value):
    file = io.BytesIO()
    torch.save({'a': torch.tensor(float(value))}, file)
    return file.getvalue()


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp('server'), {}) as started:
        yield started


@pytest.fixture(autouse=True)
def cache(server, monkeypatch, tmp_path):
    monkeypatch.setenv('SSL_CERT_FILE', str(server.certificate))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    server.answers.clear()
    server.asked.clear()
    server.headers.clear()
    return tmp_path / 'hub' / 'internvl_ds'


def kept(cache):
    """All files in the cache but locks."""
    return sorted(p for p in cache.rglob('*') if p.is_file() and p.name != 'lock')


def refused(address, *words, timeout=STALL):
    start = time.monotonic()
    with pytest.raises(PretrainedError) as caught:
        fetch(address, timeout)
    assert time.monotonic() - start < STALL + SLACK
    text = str(caught.value)
    assert '\n' not in text
    assert SECRET not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    for word in words:
        assert word in text
    return text


def test_two_files_of_one_name_are_two(server, cache):
    server.answers |= {'/one/model.safetensors': weights(1), '/two/model.safetensors': weights(2)}
    for _ in range(2):
        for value, folder in ((1, 'one'), (2, 'two')):
            source = open_weights(server.url(f'/{folder}/model.safetensors'))
            assert source['a'][0] == value
    assert len(server.asked) == 2  # and then from the cache
    open_weights(server.url('/one/model.safetensors?v=2'))
    assert len(server.asked) == 3
    assert len(kept(cache)) == 3


@pytest.mark.parametrize(
    'target', ['http://127.0.0.1:{0}/w.pth', 'ftp://127.0.0.1/w.pth', 'file:///etc/passwd']
)
def test_a_redirect_to_anything_but_https_is_refused(server, cache, target):
    target = target.format(server.server_port)
    server.answers |= {
        '/w.pth': redirect(f'{target}?sig={SECRET}'), '/far.pth': redirect('/w.pth'),
    }  # fmt: skip
    for path in ('/w.pth', '/far.pth'):
        refused(server.url(path), f'is redirected to {target}?...', 'only https')
    assert kept(cache) == []


def test_a_redirect_to_https_is_followed_and_a_loop_is_not(server):
    server.answers |= {
        '/a.pth': lambda h: reply(h, b'', 308, Location=server.url('/b.pth', 'localhost')),
        '/b.pth': torch_file(3),
        '/loop.pth': redirect('/loop.pth'),
    }
    assert open_weights(server.url('/a.pth'))['a'] == 3
    refused(server.url('/loop.pth'), '302')


@pytest.mark.parametrize('first', [
    b'', b'HTTP/1.1 200 OK\r\nX: ', b'HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n',
], ids=['no answer', 'header', 'body'])  # fmt: skip
@pytest.mark.parametrize('drips', [False, True])
def test_a_server_that_stalls_or_trickles_ends(server, cache, first, drips):
    def stalled(handler):
        handler.wfile.write(first)
        server.ended.wait(20)

    server.answers['/w.pth'] = trickle(first, lambda: server) if drips else stalled
    refused(server.url('/w.pth'), server.url('/w.pth'), '1 s' if drips else '')
    assert kept(cache) == []


def test_a_port_that_nobody_answers_at(cache):
    refused('https://127.0.0.1:9/w.pth', 'cannot be downloaded', 'refused')
    assert kept(cache) == []


def test_a_body_that_is_cut_off_is_not_kept_and_the_next_start_has_it(server, cache):
    whole = torch_file(4)
    for answer in (
        lambda h: reply(h, whole[:-9], Content_Length=len(whole)),
        lambda h: reply(h, b'%x\r\n%s' % (len(whole), whole[:-9]), **CHUNKED),
        lambda h: reply(h, whole, Content_Length=None),
        lambda h: reply(h, whole, Content_Length=10**16),
        lambda h: reply(h, whole[:-9]),
        lambda h: reply(h, weights(4)[:-9]),
    ):  # fmt: skip
        server.answers['/w.pth'] = answer
        refused(server.url('/w.pth'))
        assert kept(cache) == []
    server.answers['/w.pth'] = whole
    assert open_weights(server.url('/w.pth'))['a'] == 4


def test_a_body_in_chunks(server):
    whole = torch_file(5)
    body = b'%x\r\n%s\r\n0\r\n\r\n' % (len(whole), whole)
    server.answers['/w.pth'] = lambda h: reply(
        h, body, Content_Length=None, Transfer_Encoding='chunked'
    )
    assert open_weights(server.url('/w.pth'))['a'] == 5


@pytest.mark.parametrize('page', [
    b'<!DOCTYPE html><html>Sign in</html>', b'{"error": "no such file"}', b'',
    b'\n <html>' + b'x' * 99999,
])  # fmt: skip
def test_a_login_page_is_no_file_of_weights_and_not_kept(server, cache, page):
    server.answers['/w.pth'] = lambda h: reply(h, page, Content_Type='text/html')
    refused(server.url('/w.pth'), 'no file of weights', 'text/html', 'login')
    assert kept(cache) == []


def test_an_error_of_the_server_is_named(server):
    server.answers['/w.pth'] = lambda h: reply(h, b'', 503)
    refused(server.url('/w.pth'), '503')
    refused(server.url('/none.pth'), '404')


@pytest.mark.parametrize('code', [202, 206])
def test_a_part_is_not_taken_for_the_whole(server, cache, code):
    server.answers['/w.pth'] = lambda handler: reply(handler, torch_file(1)[:500], code)
    refused(server.url('/w.pth'), f'its server answers {code}')
    assert kept(cache) == []


def test_a_long_name_in_letters_of_many_bytes(server):
    path = f'/{"%E4%B8%AD" * 100}.pth'
    server.answers[path] = torch_file(1)
    assert fetch(server.url(path)).is_file()
    assert fetch(server.url(unquote(path))).is_file()
    assert len(server.asked) == 1


@pytest.mark.parametrize('made', [os.mkfifo, lambda path: path.symlink_to('/dev/zero')])
def test_a_kept_file_that_is_none_is_downloaded_again(server, cache, made):
    server.answers['/w.pth'] = torch_file(1)
    path = fetch(server.url('/w.pth'))
    path.unlink()
    made(path)
    mine = path.with_name('a-note')
    mine.touch()
    assert torch.load(fetch(server.url('/w.pth')))['a'] == 1
    assert mine.exists()


def test_a_password_goes_to_its_host_alone_and_is_never_seen(server, cache, caplog):
    caplog.set_level(logging.DEBUG)
    server.answers |= {
        '/w.pth': redirect('/same.pth'), '/same.pth': redirect(server.url('/b.pth', 'localhost')),
        '/b.pth': torch_file(6), '/none/': b'<html>',
    }  # fmt: skip
    user = f'me:{SECRET}%40x@'
    path = fetch(server.url(f'/w.pth?sig={SECRET}', user=user))
    sent = [headers.get('authorization') for headers in server.headers]
    basic = base64.b64encode(f'me:{SECRET}@x'.encode()).decode()
    assert sent == [f'Basic {basic}', f'Basic {basic}', None]
    assert SECRET not in caplog.text
    assert 'cannot be checked' in caplog.text
    assert SECRET not in str(path)
    assert fetch(server.url(f'/w.pth?sig={SECRET}', user='you:other@')) == path
    for address in (
        server.url(f'/none?sig={SECRET}', user=user),
        server.url(f'/none/?{SECRET}'),
        f'https://me:{SECRET}@127.0.0.1:9/w.pth',
        f'https://me:{SECRET}/x@127.0.0.1/w.pth',
        f'https://me:a {SECRET}@127.0.0.1/w.pth',
        f'https://me:a\n{SECRET}@127.0.0.1/w.pth',
        f'http://me:{SECRET}@127.0.0.1/w.pth',
        f'ftp://me:{SECRET}@127.0.0.1/w.pth?{SECRET}',
        f'hf://me:{SECRET}@127.0.0.1/w.pth',
    ):
        refused(address)
    assert SECRET not in caplog.text


@pytest.mark.parametrize(('text', 'shown'), [
    ('https://u:p@h/x.pth', 'https://h/x.pth'),
    ('https://u:p@q@h:8/x.pth: bad', 'https://h:8/x.pth: bad'),
    ('a https://h/x.pth?s=1&t=2: b', 'a https://h/x.pth?...: b'),
    ('(HTTPError: https://h/x#frag)', '(HTTPError: https://h/x?...)'),
    ('hf-hub:a/b@main:x.bin', 'hf-hub:a/b@main:x.bin'),
    ('https://h/a@v1/x.pth', 'https://h/a@v1/x.pth'),
    ('/a/file?x.pth', '/a/file?x.pth'),
])  # fmt: skip
def test_what_is_shown_of_an_address(text, shown):
    assert redacted(text) == shown


def test_a_kept_file_that_is_damaged_is_downloaded_again(server, cache, caplog):
    whole = torch_file(7)
    name = f'w-{hashlib.sha256(whole).hexdigest()[:8]}.pth'
    server.answers |= {f'/{name}': whole, '/w.pth': whole}
    for path in (f'/{name}', '/w.pth'):
        file = fetch(server.url(path))
        file.write_bytes(whole[:-1] + b'x')
        caplog.clear()
        assert fetch(server.url(path)).read_bytes() == whole
        assert str(file) in caplog.text
        file.write_bytes(whole[:-1])
        assert open_weights(server.url(path))['a'] == 7


def test_a_hash_in_the_name_is_checked_and_short_words_are_none(server, cache):
    server.answers |= {'/w-0123abcd.pth': torch_file(8), '/vit-b.pth': torch_file(9)}
    refused(server.url('/w-0123abcd.pth'), '0123abcd', 'sha256')
    assert kept(cache) == []
    assert open_weights(server.url('/vit-b.pth'))['a'] == 9


def test_what_torch_hub_has_is_taken_by_its_hash_only(server, tmp_path):
    mine, other = torch_file(1), torch_file(2)
    hashed = f'w-{hashlib.sha256(mine).hexdigest()[:8]}.pth'
    old = tmp_path / 'hub' / 'checkpoints'
    old.mkdir(parents=True)
    (old / hashed).write_bytes(mine)
    (old / 'model.safetensors').write_bytes(weights(2))
    server.answers |= {'/model.safetensors': weights(1), f'/{hashed}': mine}
    assert fetch(server.url(f'/{hashed}')) == old / hashed
    assert not server.asked
    assert open_weights(server.url('/model.safetensors'))['a'][0] == 1
    (old / hashed).write_bytes(other)
    assert open_weights(server.url(f'/{hashed}'))['a'] == 1
    assert (old / hashed).read_bytes() == other  # it is not ours


def test_a_kept_file_that_cannot_be_read_is_named(server, cache):
    server.answers['/w.pth'] = b'\x80\x02 and then nothing'
    for _ in range(2):
        with pytest.raises(PretrainedError) as caught:
            open_weights(server.url('/w.pth'))
        (file,) = kept(cache)
        assert str(file) in str(caught.value)
        assert 'Remove that file' in str(caught.value)


def test_a_file_that_the_disk_has_no_room_for(server, cache):
    server.answers['/w.pth'] = lambda h: reply(h, b'PK', Content_Length=1 << 60)
    refused(server.url('/w.pth'), 'GiB', 'TORCH_HOME')


def test_parts_of_killed_processes_go_and_others_may_read_what_came(server, cache):
    server.answers['/w.pth'] = torch_file(1)
    path = fetch(server.url('/w.pth'))
    path.unlink()
    old, young = path.with_name('.a.part'), path.with_name('.b.part')
    for part, age in ((old, 9999), (young, 0)):
        part.touch()
        os.utime(part, (time.time() - age,) * 2)
    assert fetch(server.url('/w.pth')).stat().st_mode & 0o777 == 0o644
    assert kept(cache) == [young, path]


def test_a_payload_is_never_run(server, tmp_path):
    marker = tmp_path / 'was_run'
    file = io.BytesIO()
    torch.save({'a': Payload(os.system, f'touch {marker}')}, file)
    server.answers['/w.pth'] = file.getvalue()
    with pytest.raises(PretrainedError, match='refused'):
        open_weights(server.url('/w.pth'))
    assert not marker.exists()


def test_no_limit_is_no_setting():
    for timeout in (0, -1, float('nan')):
        with pytest.raises(ConfigError, match='DOWNLOAD_TIMEOUT'):
            fetch('https://127.0.0.1:9/w.pth', timeout)


def test_load_pretrained_and_config_json_show_no_secret(server, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    model = torch.nn.Linear(2, 2)
    file = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2).state_dict(), file)
    server.answers['/w.pth'] = file.getvalue()
    config = default_config()
    config.MODEL.PRETRAINED = server.url(f'/w.pth?sig={SECRET}', user=f'me:{SECRET}@')
    config.MODEL.RESUME = config.MODEL.PRETRAINED
    report = load_pretrained(config, model, logging.getLogger('x'))
    assert report.path == server.url('/w.pth?...')
    assert report.path in caplog.text
    text = write_config(config, tmp_path).read_text()
    assert json.loads(text)['MODEL']['RESUME'] == report.path
    assert SECRET not in caplog.text + text
    with pytest.raises(PretrainedError) as caught:
        load_pretrained(config, torch.nn.Linear(3, 3), logging.getLogger('x'))
    assert report.path in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_checkpoint_at_an_address(server, caplog):
    caplog.set_level(logging.DEBUG)
    saved, file = torch.nn.Linear(2, 2), io.BytesIO()
    torch.save({'model': saved.state_dict(), 'max_accuracy': 12.5}, file)
    server.answers['/ckpt.pth'] = file.getvalue()
    config = default_config()
    config.EVAL_MODE = True
    config.MODEL.DOWNLOAD_TIMEOUT = STALL
    model = torch.nn.Linear(2, 2)
    for path in ('/ckpt.pth', '/none.pth'):
        config.MODEL.RESUME = server.url(f'{path}?sig={SECRET}', user=f'me:{SECRET}@')
        if path == '/none.pth':
            with pytest.raises(CheckpointError, match=r'/none\.pth\?\.\.\.: .*404'):
                load_checkpoint(config, model, None, None, None, logging.getLogger('x'))
        else:
            args = (config, model, None, None, None, logging.getLogger('x'))
            assert load_checkpoint(*args) == 12.5
            assert torch.equal(model.weight, saved.weight)
    assert SECRET not in caplog.text


def test_links_in_the_cache_are_not_followed(server, cache, tmp_path):
    victim = tmp_path / 'victim'
    victim.write_bytes(b'mine')
    server.answers['/w.pth'] = torch_file(1)
    folder = fetch(server.url('/w.pth')).parent
    (folder / 'lock').unlink()
    (folder / 'lock').symlink_to(victim)
    for path in kept(cache):
        path.unlink()
    assert open_weights(server.url('/w.pth'))['a'] == 1
    assert victim.read_bytes() == b'mine'


def _fetch_and_tell(url, directory, queue):
    torch.hub.get_dir = lambda: directory
    queue.put(str(fetch(url, 30)))


def _processes(count, url, directory):
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    started = [
        context.Process(target=_fetch_and_tell, args=(url, directory, queue)) for _ in range(count)
    ]
    for process in started:
        process.start()
    found = [queue.get(timeout=60) for _ in started]
    for process in started:
        process.join(30)
        assert process.exitcode == 0
    return found


def test_processes_at_once_download_once(server, cache, tmp_path):
    whole = torch_file(3)

    def slow(handler):
        time.sleep(1)
        reply(handler, whole)

    server.answers['/w.pth'] = slow
    found = _processes(4, server.url('/w.pth'), str(tmp_path / 'hub'))
    assert len(set(found)) == 1
    assert Path(found[0]).read_bytes() == whole
    assert len(server.asked) == 1
    assert [str(path) for path in kept(cache)] == found[:1]


def test_processes_at_once_where_nothing_can_be_locked(server, cache, tmp_path, monkeypatch):
    whole = torch_file(3)

    def none(*_):
        raise OSError('no locks on this file system')

    monkeypatch.setattr(fcntl, 'flock', none)
    server.answers['/w.pth'] = whole
    found = _processes(3, server.url('/w.pth'), str(tmp_path / 'hub'))
    assert len(set(found)) == 1
    assert Path(found[0]).read_bytes() == whole
    assert [str(path) for path in kept(cache)] == found[:1]


def test_a_process_that_stands_still_is_not_waited_for(server, cache, caplog, monkeypatch):
    monkeypatch.setattr(downloads, '_GRACE', 0.2)
    server.answers['/w.pth'] = torch_file(3)
    path = fetch(server.url('/w.pth'))
    path.unlink()
    with (path.parent / 'lock').open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert fetch(server.url('/w.pth'), STALL) == path
    assert 'stands still' in caplog.text


# The client reads its environment when it is imported, so each case is a process of its own.
HUB = """
import json, logging, sys, torch
from internvl_ds.errors import PretrainedError
from internvl_ds.checkpoint.sources.open_weights import open_weights
from internvl_ds.checkpoint.sources import downloads
logging.basicConfig(level=logging.DEBUG, format='%(message)s')
for address in sys.argv[1:]:
    try:
        path = str(downloads.fetch(address, 3))
        print('ANSWER', json.dumps([path, open_weights(address)['a'][0].item()]))
    except PretrainedError as error:
        print('ANSWER', json.dumps([None, str(error)]))
"""


@pytest.fixture
def hub(server, tmp_path):
    """Serves files as the hub does: from a CDN at another host, by a signed link."""
    commit = 'a' * 40

    def add(path, content, revisions=('main', 'v1'), repository='org/model'):
        digest = hashlib.sha256(content).hexdigest()

        def resolve(handler):
            link = server.url(f'/cdn/{digest}?sig={SECRET}', 'localhost')
            reply(
                handler, b'', 302, Location=link, X_Repo_Commit=commit, ETag=f'"{digest}"',
                X_Linked_Etag=f'"{digest}"', X_Linked_Size=len(content),
            )  # fmt: skip

        for revision in (*revisions, commit):
            server.answers[f'/{repository}/resolve/{revision}/{path}'] = resolve
        server.answers.setdefault(f'/cdn/{digest}', content)
        return f'/cdn/{digest}'

    def run(*addresses, script=HUB, **env):
        command = [sys.executable, '-c', script, *addresses]
        variables = {
            'HF_ENDPOINT': server.url(''), 'HF_HOME': str(tmp_path / 'hf'), 'HF_TOKEN': 'hf_token1',
            'TORCH_HOME': str(tmp_path / 'torch'), 'SSL_CERT_FILE': str(server.certificate), **env,
        }  # fmt: skip
        job = subprocess.run(
            command, env=base_env(**variables), capture_output=True, text=True, timeout=120
        )
        assert job.returncode == 0, job.stderr
        assert SECRET not in job.stdout + job.stderr
        assert 'hf_token1' not in job.stdout + job.stderr
        lines = job.stdout.splitlines()
        return [json.loads(line[7:]) for line in lines if line.startswith('ANSWER ')]

    run.add = add
    return run


def test_addresses_of_the_hub(server, hub, tmp_path):
    cdn = hub.add('model.safetensors', weights(1))
    hub.add('sub/other.safetensors', weights(2))
    found = hub(
        'hf-hub:org/model',
        'hf-hub:org/model@v1:sub/other.safetensors',
        f'https://huggingface.co/org/model/resolve/main/sub/other.safetensors?x={SECRET}',
        server.url('/org/model/blob/main/model.safetensors'),
        'hf-hub:org/model:none.bin',
        'hf-hub:org/missing',
        'hf-hub:nonsense',
    )
    assert [value for _, value in found[:4]] == [1, 2, 2, 1]
    for path, _ in found[:4]:
        assert str(tmp_path / 'hf') in path
    missing = ('hf-hub:org/model:none.bin', 'hf-hub:org/missing', 'hf-hub:nonsense')
    for (path, error), words in zip(found[4:], missing, strict=True):
        assert path is None
        assert error.startswith(words)
        assert '\n' not in error
    assert [path for _, path in server.asked].count(f'{cdn}?sig={SECRET}') == 1
    tokens = {
        (path.startswith('/cdn'), headers.get('authorization'))
        for (_, path), headers in zip(server.asked, server.headers, strict=True)
        if path.startswith(('/cdn', '/org'))
    }
    assert tokens == {(False, 'Bearer hf_token1'), (True, None)}
    # What was downloaded is there without the network, and is hashed.
    asked = len(server.asked)
    offline = hub('hf-hub:org/model', 'hf-hub:org/model@v9', HF_HUB_OFFLINE='1')
    assert offline[0] == found[0]
    assert offline[1][0] is None
    assert len(server.asked) == asked
    blob = Path(found[0][0]).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b'x')
    assert hub('hf-hub:org/model') == [found[0]]


def test_a_repository_of_several_files_comes_whole(server, hub):
    names = [f'model-0000{part}-of-00002.safetensors' for part in (1, 2)]
    places = {'a': names[0], 'b': names[1], 'c': '../../../x.safetensors'}
    for folder in ('', 'bad/'):
        hub.add(f'{folder}{names[0]}', weights(1))
        hub.add(f'{folder}{names[1]}', safetensors.torch.save({'b': torch.ones(2)}))
    hub.add('bad/model.safetensors.index.json', json.dumps({'weight_map': places}).encode())
    del places['c']
    hub.add('model.safetensors.index.json', json.dumps({'weight_map': places}).encode())
    (path, value), (none, error) = hub(
        'hf-hub:org/model', 'hf-hub:org/model:bad/model.safetensors.index.json'
    )
    assert value == 1
    assert path.endswith('/model.safetensors.index.json')
    assert none is None
    assert "names '../../../x.safetensors', which is no file of weights beside it" in error
    assert not [path for _, path in server.asked if 'x.safetensors' in path]


def test_a_hub_that_redirects_to_http_stalls_or_cuts_off(server, hub, tmp_path):
    content = weights(1)
    cdn = hub.add('http.safetensors', content)
    server.answers[cdn] = redirect(f'http://127.0.0.1:{server.server_port}{cdn}')
    cdn = hub.add('slow.safetensors', weights(2))
    head = b'HTTP/1.1 200 OK\r\nContent-Length: 4096\r\n\r\n'
    server.answers[cdn] = trickle(head, lambda: server)
    cuts = []

    def cut(handler):
        start = int((handler.headers.get('Range') or 'bytes=0-')[6:].rstrip('-') or 0)
        cuts.append(start)
        body = long[start:]
        part = body[: len(body) // 2] if len(cuts) == 1 else body
        reply(handler, part, 206 if start else 200, Content_Length=len(body))

    long = safetensors.torch.save({'a': torch.arange(6_000_000.0) + 3})
    server.answers[hub.add('cut.safetensors', long)] = cut
    start = time.monotonic()
    found = hub(*(f'hf-hub:org/model:{n}.safetensors' for n in ('http', 'slow', 'cut')))
    assert time.monotonic() - start < 60
    assert [path for path, _ in found[:2]] == [None, None]
    assert 'only https' in found[0][1]
    assert 'stalled' in found[1][1]
    assert found[2][1] == 3
    assert len(cuts) == 2
    assert cuts[1] > 0  # it went on where it was


def test_a_hub_at_http_is_refused(hub):
    ((path, error),) = hub('hf-hub:org/model', HF_ENDPOINT='http://127.0.0.1:9')
    assert path is None
    assert 'only https' in error
