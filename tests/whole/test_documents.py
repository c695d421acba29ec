"""What the documents name is there: links to files, files of the package, tests, modules to run."""

import re

import pytest

from tests.harness.ranks import ROOT

DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for folder in ('', 'docs', 'launch', 'ds_configs', 'tests/data/recorded_tags')
    for path in (ROOT / folder).glob('*.md')
)
ROOMS = 'zero|config|dist|engine|checkpoint|pretrained|tools|train|files'


@pytest.mark.parametrize('document', DOCUMENTS, ids=str)
def test_what_a_document_names_is_there(document):
    text = (ROOT / document).read_text()
    links = re.findall(r'\]\((?!https?:)([^)#\s]+)', text)
    named = re.findall(r'`((?:internvl_ds|tests|launch|ds_configs)/[\w./]+)`', text)
    named += [f'internvl_ds/{name}' for name in re.findall(rf'`((?:{ROOMS})/[\w/.]+\.py)`', text)]
    named += [
        f'{module.replace(".", "/")}.py' for module in re.findall(r'python -m (tests[\w.]+)', text)
    ]
    missing = [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []
