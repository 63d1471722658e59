import urllib.error

import pytest
import torch

from common import run, small_presets


@pytest.fixture(scope="session", autouse=True)
def no_network(tmp_path_factory):
    """Nothing can be fetched, and nothing was fetched before."""
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "download_url_to_file", refuse)
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="module")
def little_work():
    with small_presets():
        yield


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with sft, frm and lrpo runs of three steps each; lrpo trains frm by itself."""
    root = tmp_path_factory.mktemp("runs")
    with small_presets():
        run("sft", root / "sft")
        run("lrpo", root / "lrpo")
    return root
