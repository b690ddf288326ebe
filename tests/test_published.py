"""The table of names that published modules also provide."""

import importlib

import pytest

from ldm.published import NAMES


@pytest.mark.parametrize("module", NAMES)
def test_every_name_of_the_table_is_imported_from_its_published_module(module):
    published = importlib.import_module(module)
    for home, names in NAMES[module].items():
        for name in names.split():
            assert getattr(published, name) is getattr(importlib.import_module(home), name), f"{module}.{name}"
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(published, "no_such_" + "name")
