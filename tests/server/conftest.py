"""Fixtures of the tests that run whole servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers keep what they compute once in a folder of the tests, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKVEC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
