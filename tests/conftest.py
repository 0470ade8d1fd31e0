"""What holds for every test: choices between the paths are not timed, and none of the user's is read."""

from __future__ import annotations

import pytest

import fused_lora
from fused_lora import choices


@pytest.fixture(scope="session", autouse=True)
def _choices_by_rule(tmp_path_factory):
    """auto takes the fused kernels wherever there are some. Processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(choices.DIRECTORY_VARIABLE, str(tmp_path_factory.mktemp("choices")))
        patch.setenv(choices.TIMING_VARIABLE, "0")
        yield


@pytest.fixture(params=["auto", "composed"])
def either_path(request):
    """The test runs by the fused kernels, where they serve, and by torch's GEMMs."""
    with fused_lora.use_path(request.param):
        yield request.param
