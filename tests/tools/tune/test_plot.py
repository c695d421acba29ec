"""tuned.png is a picture of a size that a page can show, and replaces the one before."""

from PIL import Image

from internvl_ds.tools.tune.plot import plot_trials
from internvl_ds.tools.tune.records import BASE, FINAL, HANG, NO_ROOM, OK, SEARCH, SHIPPED, Row


def row(key, kind, status, speed=0.0, peak=0):
    bench = {'images_per_s': speed, 'peak_bytes': peak} if status == OK else {}
    return Row(0, kind, key, key, {}, {}, {}, status, bench=bench)


def test_it_draws_what_ran_and_counts_what_did_not(tmp_path):
    rows = [
        row('zero0', BASE, OK, 100.0, 2_000_000_000),
        row('zero1', SHIPPED, OK, 120.0, 1_500_000_000),
        row('a', SEARCH, OK, 150.0, 1_800_000_000),
        row('b', SEARCH, HANG),
        row('c', SEARCH, NO_ROOM),
        row('a', FINAL, OK, 130.0, 1_900_000_000),
    ]
    names = {key: key for key in ('zero0', 'zero1', 'a', 'b', 'c')}
    path = tmp_path / 'tuned.png'
    path.write_text('old')
    assert plot_trials(rows, names, {'zero0', 'zero1'}, 'a', path) == path
    with Image.open(path) as image:
        assert image.size == (900, 500)
        # the star of the result, in its own colour
        assert (213, 94, 0) in {colour[:3] for _, colour in image.getcolors(maxcolors=100_000)}
    assert [p.name for p in tmp_path.iterdir()] == ['tuned.png']


def test_a_single_configuration_can_be_drawn(tmp_path):
    rows = [row('zero0', BASE, OK, 100.0, 2_000_000_000)]
    plot_trials(rows, {'zero0': 'as configured'}, (), 'zero0', tmp_path / 'tuned.png')
    assert (tmp_path / 'tuned.png').stat().st_size > 5000
