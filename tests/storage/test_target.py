"""Settings of a storage account: what works, what is refused and why, and that secrets stay secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from pydantic import SecretStr, ValidationError

from replicar.errors import PermanentError, ReplicarError
from replicar.storage import StorageTarget, open_store
from tests.storage.support import EmulatorPlace

KEY = "dmVyeSBzZWNyZXQga2V5IQ=="
SAS = "sv=2024&sig=VERYSECRET"
ENDPOINT = "https://name.blob.core.windows.net"
STRING = f"DefaultEndpointsProtocol=https;AccountName=name;AccountKey={KEY};EndpointSuffix=local.azurestack.external"
NAMED: dict[str, Any] = {"endpoint": ENDPOINT, "account_name": "name", "container": "log"}


def test_an_account_key_may_come_from_the_settings_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_text(KEY + "\n")
    for target in (StorageTarget(**NAMED, account_key=SecretStr(KEY)), StorageTarget(**NAMED, account_key_file=file)):
        access = target.access()
        assert isinstance(access.credential, AzureNamedKeyCredential)
        assert (access.url, tuple(access.credential.named_key)) == (ENDPOINT, ("name", KEY))


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_text(KEY)
    file.chmod(0o644)
    with pytest.raises(PermanentError, match="may be read by others") as caught:
        StorageTarget(**NAMED, account_key_file=file).access()
    assert KEY not in str(caught.value)


def test_a_signature_needs_no_account_name_and_loses_its_question_mark(tmp_path: Path) -> None:
    file = tmp_path / "sas"
    file.touch(mode=0o600)
    file.write_text("?" + SAS)
    access = StorageTarget(endpoint=ENDPOINT + "/", container="log", shared_access_signature_file=file).access()
    assert isinstance(access.credential, AzureSasCredential)
    assert (access.url, access.credential.signature) == (ENDPOINT, SAS)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        (STRING, "https://name.blob.local.azurestack.external"),
        (f"AccountName=name;AccountKey={KEY}", "https://name.blob.core.windows.net"),
        (f"BlobEndpoint=http://127.0.0.1:1/name;AccountName=name;AccountKey={KEY};", "http://127.0.0.1:1/name"),
        (f"BlobEndpoint={ENDPOINT}/;SharedAccessSignature={SAS}", ENDPOINT),
    ],
)
def test_a_connection_string_says_it_all(text: str, url: str) -> None:
    assert StorageTarget(container="log", connection_string=SecretStr(text)).access().url == url


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (NAMED, "no credential"),
        (NAMED | {"account_key": KEY, "shared_access_signature": SAS}, "both set"),
        (NAMED | {"account_key": KEY, "account_key_file": "/x"}, "both set"),
        (NAMED | {"account_key": KEY, "endpoint": "http://name.blob.core.windows.net"}, "unprotected"),
        (NAMED | {"account_key": KEY, "endpoint": "http://10.0.0.1/name"}, "unprotected"),
        (NAMED | {"account_key": KEY, "endpoint": "name.blob.core.windows.net"}, "no endpoint"),
        (NAMED | {"account_key": KEY, "endpoint": f"{ENDPOINT}?{SAS}"}, "more than"),
        (NAMED | {"account_key": KEY, "endpoint": None}, "endpoint is not set"),
        (NAMED | {"account_key": KEY, "account_name": None}, "needs account_name"),
        (NAMED | {"account_key": KEY, "container": "No"}, "container name"),
        (NAMED | {"account_key": KEY, "container": "a--b"}, "container name"),
        (NAMED | {"connection_string": STRING}, "already says"),
        (NAMED | {"account_key": "not base64!"}, "not base64"),
        (NAMED | {"account_key": "  "}, "empty"),
        (NAMED | {"account_key_file": "/no/such/file"}, "No such file"),
        (NAMED | {"account_key": KEY, "authority_file": "/no/such/authority"}, "no authority_file"),
        (NAMED | {"account_key": KEY, "authority_file": __file__}, "no readable certificate"),
        (NAMED | {"account_key": KEY, "api_version": "1999-01-01"}, "api_version"),
        ({"container": "log", "connection_string": "nonsense"}, "NAME=VALUE"),
        ({"container": "log", "connection_string": f"AccountKey={KEY}"}, "neither"),
        ({"container": "log", "connection_string": "AccountName=name"}, "either"),
        ({"container": "log", "connection_string": f"BlobEndpoint=http://h.example;{STRING}"}, "unprotected"),
    ],
)
async def test_nonsense_is_refused_with_its_reason_and_without_the_secret(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(PermanentError, match=words) as caught:
        open_store(StorageTarget.model_validate(settings))
    assert KEY not in str(caught.value)
    assert "VERYSECRET" not in str(caught.value)


def test_a_setting_that_does_not_exist_is_refused_and_no_value_is_shown() -> None:
    with pytest.raises(ValidationError) as caught:
        StorageTarget.model_validate(NAMED | {"account_key": KEY, "acount_key": "TYPO"})
    assert KEY not in str(caught.value)
    assert "TYPO" not in str(caught.value)


def test_a_file_that_is_no_credential_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "big"
    for content in (b"x" * 100_000, b"\xff\xfe", b"\n"):
        file.write_bytes(content)
        with pytest.raises(PermanentError, match="account_key_file"):
            StorageTarget(**NAMED, account_key_file=file).access()


def test_no_secret_shows_in_a_repr_or_a_dump() -> None:
    for target in (
        StorageTarget(**NAMED, account_key=SecretStr(KEY)),
        StorageTarget(endpoint=ENDPOINT, container="log", shared_access_signature=SecretStr(SAS)),
        StorageTarget(container="log", connection_string=SecretStr(STRING)),
    ):
        shown = repr(target) + str(target) + target.model_dump_json() + str(target.model_dump()) + repr(target.access())
        assert KEY not in shown
        assert "VERYSECRET" not in shown
        assert repr(open_store(target)).find(KEY) == -1


async def test_a_service_whose_certificate_nobody_vouches_for_is_refused_and_told_apart(
    azurite: EmulatorPlace,
) -> None:
    target = StorageTarget(
        endpoint=azurite.blob_endpoint,
        account_name=azurite.account_name,
        account_key=SecretStr(azurite.account_key),
        container="log",
    )
    async with open_store(target) as store:
        with pytest.raises(PermanentError, match="not to be trusted") as caught:
            await store.container_exists()
    assert "authority_file" in caught.value.hint


async def test_a_wrong_key_says_what_to_check_and_is_not_retried(azurite: EmulatorPlace, container_name: str) -> None:
    target = StorageTarget(
        endpoint=azurite.blob_endpoint,
        account_name=azurite.account_name,
        account_key=SecretStr(KEY),
        container=container_name,
        authority_file=azurite.authority_file,
    )
    async with open_store(target) as store:
        with pytest.raises(ReplicarError, match="refuses our credentials") as caught:
            await store.ensure_container()
    assert type(caught.value) is PermanentError
    assert KEY not in str(caught.value)
