"""Links of the documents that have no test file of their own."""

from __future__ import annotations

import pytest
from document import Document


@pytest.mark.parametrize(
    "name", ["data.md", "miniature/README.md", "../CONTRIBUTING.md", "../CHANGELOG.md", "../SECURITY.md"]
)
def test_links_exist(name: str) -> None:
    Document(name).check_links()
