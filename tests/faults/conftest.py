import sys
from collections.abc import Iterator

import pytest

from tests.faults.laboratory import Laboratory, laboratory


@pytest.fixture(scope="session")
def lab() -> Iterator[Laboratory]:
    if sys.platform != "linux":
        pytest.skip("needs /proc, fork and signals of Linux")
    with laboratory() as found:
        yield found
