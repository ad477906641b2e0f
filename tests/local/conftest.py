"""Workspaces in which the command line runs as a user would run it."""

import pytest
from workspaces import make_workspace


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """A finished smoke run and the folder that it was made in; shared, so tests must not change it."""
    workspace = make_workspace(tmp_path_factory.mktemp("smoke"))
    result = workspace.run("run", "--profile", "smoke", "--run-id", "smoke-1", "--json")
    return workspace, result
