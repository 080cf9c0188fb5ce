"""The top level is a shop window: everything in it is meant to be there."""

import inspect

import transfermium as tm


def test_everything_public_is_exported() -> None:
    public = {n for n, v in vars(tm).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert public == set(tm.__all__)


def test_everything_exported_says_what_it_is() -> None:
    for name in tm.__all__:
        assert inspect.getdoc(getattr(tm, name)), name
