"""What every test may rely on: no network, steady timing rules, and a few pictures."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run tiny networks: a second thread costs them more than it gives.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from PIL import Image  # noqa: E402

# Shared machines are slow at times, which says nothing about the code.
settings.register_profile("retour", deadline=None, derandomize=True)
settings.load_profile("retour")


@pytest.fixture
def gradient():
    """A 48 x 32 RGB picture without symmetry: any flip, turn or channel swap shows."""
    across, down = numpy.meshgrid(numpy.linspace(0, 200, 48), numpy.linspace(0, 255, 32))
    pixels = numpy.stack([across, down, numpy.full_like(across, 40)], axis=-1)
    return Image.fromarray(pixels.astype(numpy.uint8))
