"""What several tests of notebooks/support share."""

import pytest
import torch


@pytest.fixture
def torch_as_before():
    """Set back what the benchmark sets in the process that measures: threads, seed, TF32."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32
