"""What tests of weight files start from."""

import pytest

from tests.checkpoints.helpers import config_of, read_published
from tests.conftest import REFERENCE


@pytest.fixture
def qwen2(tmp_path):
    """Configuration, published tensors, and an empty directory for a broken copy of them."""
    return config_of("qwen2"), read_published(REFERENCE / "qwen2" / "checkpoint"), tmp_path
