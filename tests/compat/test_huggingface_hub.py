"""huggingface_hub: offline, except while something is fetched."""

import os

import pytest
from httpx2 import ConnectError
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled

from reprotune.compat.huggingface_hub import online

NOWHERE = "http://127.0.0.1:9"


def ask() -> None:
    HfApi(endpoint=NOWHERE).model_info("org/model", timeout=5)


def test_the_client_is_online_inside_the_block_alone():
    with pytest.raises(OfflineModeIsEnabled):
        ask()
    with online():
        assert os.environ["HF_HUB_OFFLINE"] == "0"
        with pytest.raises(ConnectError):
            ask()
    with pytest.raises(OfflineModeIsEnabled):
        ask()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_client_is_offline_again_after_an_error():
    with pytest.raises(KeyError), online():
        raise KeyError
    assert constants.HF_HUB_OFFLINE


def test_the_environment_alone_does_not_reach_the_client(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(OfflineModeIsEnabled):
        ask()


@pytest.mark.parametrize(("variable", "token"), [("hf_secret", "hf_secret"), ("", False), (None, False)])
def test_the_token_is_that_of_the_environment_or_none(variable, token, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if variable is not None:
        monkeypatch.setenv("HF_TOKEN", variable)
    with online() as given:
        assert given == token
