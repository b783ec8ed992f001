import pytest

from twins import common


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """The folder of common.write_place."""
    return common.write_place(tmp_path_factory.mktemp("place"))
