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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The directory of a tiny language model that knows the shop's words."""
    from examples.shop.jobs import JOBS
    from tests import language_model

    directory = tmp_path_factory.mktemp("model") / "tiny-llama"
    examples = [example for job in JOBS.values() for example in job.examples()[::10]]
    language_model.write(directory, (text for e in examples for text in (e.prompt, e.completion)))
    return directory
