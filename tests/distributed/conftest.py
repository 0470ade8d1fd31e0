from __future__ import annotations

import pytest
import torch

from tests.distributed.team import Team


def pytest_ignore_collect():
    return None if torch.distributed.is_available() and torch.distributed.is_gloo_available() else True


@pytest.fixture(scope="session")
def pair():
    yield from _team(2)


@pytest.fixture(scope="session")
def four():
    yield from _team(4)


def _team(size):
    team = Team(size)
    yield team
    team.stop()
