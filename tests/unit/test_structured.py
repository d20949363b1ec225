from __future__ import annotations

import pytest

from torrentlm.errors import NetworkError, StorageError
from torrentlm.structured import single_error


def test_one_of_our_errors_stands_for_all() -> None:
    with pytest.raises(StorageError), single_error():
        raise ExceptionGroup("", [ExceptionGroup("", [ValueError()]), StorageError("full"), NetworkError("late")])
    with pytest.raises(ValueError, match="alone"), single_error():
        raise ExceptionGroup("", [ValueError("alone")])
    with pytest.raises(ExceptionGroup), single_error():
        raise ExceptionGroup("", [ValueError(), KeyError()])
