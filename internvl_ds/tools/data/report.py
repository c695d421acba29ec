"""What was found in a folder of images: as one tree, and as text. Pure functions."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from internvl_ds.errors import few, shown
from internvl_ds.tools.data.look import Looked
from internvl_ds.tools.data.splits import Split

_CLASSES_22K = 21841  # training on them is measured on the classes of ImageNet-1K
_MOST = 20  # lines of one kind that the text has; the tree has all


def tree_of(splits: Sequence[Split], looked: Sequence[Sequence[Looked]]) -> dict[str, Any]:
    """All that was found, for JSON.

    Args:
        splits: one or two.
        looked: of each split what its images are.
    """
    pairs = list(zip(splits, looked, strict=True))
    found: dict[str, Any] = {'splits': {split.name: _split(split, each) for split, each in pairs}}
    found['between'], found['other_classes'] = [], {}
    if len(pairs) == 2:
        (one, ours), (other, theirs) = pairs
        copies, twins = _by_digest(ours), _by_digest(theirs)
        found['between'] = [
            {
                one.name: [one.names[n] for n in numbers],
                other.name: [other.names[n] for n in twins[digest]],
            }
            for digest, numbers in copies.items()
            if digest in twins
        ]
        if len(one.classes) != _CLASSES_22K:
            found['other_classes'] = {
                one.name: sorted({*one.classes} - {*other.classes}),
                other.name: sorted({*other.classes} - {*one.classes}),
            }
    found['wrong'] = bool(
        found['between']
        or any(found['other_classes'].values())
        or any(each['unreadable'] or each['empty'] for each in found['splits'].values())
    )
    return found


def text_of(found: dict[str, Any]) -> str:
    """What `tree_of` made, for people."""
    lines = [line for name, split in found['splits'].items() for line in _text(name, split)]
    for name, classes in found['other_classes'].items():
        if classes:
            lines.append(f'WRONG: only {name} has the classes {few(classes)}')
    if between := found['between']:
        lines.append(f'WRONG: {len(between)} images are in both splits:')
        texts = [' = '.join(f'{name}/{few(each)}' for name, each in b.items()) for b in between]
        lines += _listed(texts)
    lines.append('something is wrong' if found['wrong'] else 'nothing is wrong')
    return '\n'.join(map(shown, lines))


def _split(split: Split, looked: Sequence[Looked]) -> dict[str, Any]:
    good = [each for each in looked if not each.error]
    counts = Counter(split.labels)
    images = {name: counts[label] for label, name in enumerate(split.classes)}
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, each in zip(split.names, looked, strict=True):
        for kind in each.kinds:
            kinds[kind].append(name)
    named = list(zip(split.names, looked, strict=True))
    copies = [numbers for numbers in _by_digest(looked).values() if len(numbers) > 1]
    return {
        'path': str(split.root),
        'images': len(split.names),
        'classes': images,
        'empty': [name for name, count in images.items() if not count],
        'images_per_class': _range(list(images.values())),
        'width': _range([each.width for each in good]),
        'height': _range([each.height for each in good]),
        'bytes': _range([each.size for each in good]),
        'unreadable': [{'name': n, 'error': each.error} for n, each in named if each.error],
        'kinds': dict(sorted(kinds.items())),
        'warnings': [{'name': n, 'warning': each.warning} for n, each in named if each.warning],
        'duplicates': [[split.names[n] for n in numbers] for numbers in copies],
        'duplicates_across_classes': sum(len({split.labels[n] for n in c}) > 1 for c in copies),
        'hidden_folders': split.hidden,
        'other_files': split.others,
        'linked_twice': split.twice,
    }


def _by_digest(looked: Sequence[Looked]) -> dict[bytes, list[int]]:
    """Numbers of the images that can be read, by the digests of their files."""
    numbers: dict[bytes, list[int]] = {}
    for number, each in enumerate(looked):
        if not each.error:
            numbers.setdefault(each.digest, []).append(number)
    return numbers


def _range(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {'min': min(values), 'median': statistics.median(values), 'max': max(values)}


def _text(name: str, split: dict[str, Any]) -> Iterator[str]:
    yield f'{name}: {split["images"]} images of {len(split["classes"])} classes in {split["path"]}'
    classes = sorted(split['classes'].items(), key=lambda pair: (pair[1], pair[0]))
    if len(classes) <= _MOST:
        yield '  images: ' + ', '.join(f'{n} {count}' for n, count in sorted(classes))
    else:
        ends = (('fewest', classes[:5]), ('most', classes[:-6:-1]))
        for end, some in ends:
            yield f'  {end} images: ' + ', '.join(f'{n} {count}' for n, count in some)
    least, most = classes[0][1], classes[-1][1]
    if least:
        yield f'  balance: the largest class has {most / least:.2f} times the smallest'
    for what, unit in (('width', ' pixels'), ('height', ' pixels'), ('bytes', '')):
        if values := split[what]:
            numbers = (f'{key} {value:.12g}' for key, value in values.items())
            yield f'  {what}: {", ".join(numbers)}{unit}'
    if split['empty']:
        yield f'  WRONG: no image in the classes {few(split["empty"])}'
    if faulty := split['unreadable']:
        yield f'  WRONG: {len(faulty)} images cannot be used:'
        yield from _listed([f'{each["name"]}: {each["error"]}' for each in faulty])
    for kind, names in split['kinds'].items():
        yield f'  {kind}: {len(names)} ({few(names, 3)})'
    if warned := split['warnings']:
        yield f'  Pillow warns of {len(warned)} images:'
        yield from _listed([f'{each["name"]}: {each["warning"]}' for each in warned])
    if copies := split['duplicates']:
        across = split['duplicates_across_classes']
        yield f'  the same file again: {len(copies)} images, {across} of them in other classes too:'
        yield from _listed([few(names) for names in copies])
    for key, what in (
        ('hidden_folders', 'hidden folders, which are no classes'),
        ('other_files', 'files that are not looked at, by their names'),
        ('linked_twice', 'folders that links lead to a second time, read once'),
    ):
        if split[key]:
            yield f'  {what}: {len(split[key])} ({few(split[key])})'


def _listed(texts: Sequence[str]) -> Iterator[str]:
    yield from (f'    {text}' for text in texts[:_MOST])
    if len(texts) > _MOST:
        yield f'    ... {len(texts) - _MOST} more; --json FILE has all'
