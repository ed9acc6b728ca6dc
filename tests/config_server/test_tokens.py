"""Bearer tokens and the audit: what each role may, what is kept, and what is shown once."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from config_server import tokens
from config_server.foundation import new_identity
from config_server.registry import Registry
from config_server.vault import REGISTRY_FILE
from replicar.control.client import ControlClient
from replicar.control.identity import AUTHORITY_FILE, CONFIG_SERVER_NAME, Identity, Role
from replicar.control.messages import Policy, TokenRequest
from replicar.errors import LimitError, PermanentError
from tests.cli.conftest import operator_settings
from tests.config_server.support import Cast


@pytest.fixture
def admin_identity(cast: Cast, tmp_path: Path) -> Identity:
    registry = Registry(cast.house.directory / REGISTRY_FILE)
    try:
        return new_identity(
            cast.house.server.vault,
            registry,
            Role.ADMIN,
            "ada",
            tmp_path / "ada",
            address=cast.house.address,
            clock=cast.house.clock,
        )
    finally:
        registry.close()


@pytest.fixture
async def admin(cast: Cast, admin_identity: Identity) -> AsyncIterator[ControlClient]:
    async with cast.house.client(admin_identity) as client:
        yield client


async def ask(cast: Cast, method: str, path: str, token: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    """A request as a program makes it that has a token, the authority's certificate, and nothing else."""
    context = ssl.create_default_context(cafile=str(cast.house.directory / "operator" / AUTHORITY_FILE))
    async with aiohttp.ClientSession() as session:
        answer = await session.request(
            method,
            f"https://{cast.house.address}/v1{path}",
            data=body,
            headers={"Authorization": f"Bearer {token}"},
            ssl=context,
            server_hostname=CONFIG_SERVER_NAME,
        )
        return answer.status, json.loads(await answer.read())


async def test_a_token_may_what_its_role_may_and_only_that(cast: Cast, admin: ControlClient) -> None:
    policy = b'{"policy": {"name": "gold"}, "base_version": 0}'
    for role, may_change, may_admit in (("reader", 403, 403), ("operator", 200, 403), ("admin", 200, 200)):
        made = await admin.create_token(TokenRequest.model_validate({"name": role, "role": role}))
        text = made.text.get_secret_value()
        assert text not in repr(made)
        assert (await ask(cast, "GET", "/status", text))[0] == 200
        assert (await ask(cast, "PUT", "/policies/gold", text, policy))[0] == may_change
        assert (await ask(cast, "GET", "/tokens", text))[0] == may_admit
        status, error = await ask(cast, "POST", "/heartbeats/machine", text, b"{}")
        assert (status, error["message"]) == (403, f"a {role} may not POST /v1/heartbeats/machine")
    assert await cast.operator.policy("gold") == Policy(name="gold", version=1)


async def test_a_token_ends_when_it_expires_or_is_revoked(cast: Cast, admin: ControlClient) -> None:
    one, other = [await admin.create_token(TokenRequest(name=name, days=10)) for name in ("one", "other")]
    revoked = await admin.revoke_token(one.token.id)
    assert revoked.revoked_ns is not None
    assert await admin.revoke_token(one.token.id) == revoked
    status, error = await ask(cast, "GET", "/status", one.text.get_secret_value())
    assert status == 401
    assert "was revoked" in error["message"]
    assert (await ask(cast, "GET", "/status", other.text.get_secret_value()))[0] == 200
    cast.house.clock.move(days=11)
    status, error = await ask(cast, "GET", "/status", other.text.get_secret_value())
    assert status == 401
    assert "expired" in error["message"]
    assert "replicar token create" in error["hint"]
    assert {token.name for token in await admin.tokens()} == {"one", "other"}


async def test_a_token_is_given_no_key_and_no_certificate(cast: Cast, admin: ControlClient) -> None:
    await cast.protect()
    text = (await admin.create_token(TokenRequest(name="one", role="admin"))).text.get_secret_value()
    body = json.dumps({"csr": admin.identity.signing_request().decode()}).encode()
    for method, path, data in (("GET", "/machines/db1/key", None), ("POST", "/certificates", body)):
        status, error = await ask(cast, method, path, text, data)
        assert status == 403
        assert "a certificate is asked for" in error["message"]


async def test_what_is_no_token_is_refused(cast: Cast, admin: ControlClient) -> None:
    text = (await admin.create_token(TokenRequest(name="one"))).text.get_secret_value()
    head, secret = text.rsplit("_", 1)[0], "A" * 43
    for wrong in ("", "x", text[:-1], f"{text[:49]}{secret}", f"{head}_{secret}", text + "A"):
        assert (await ask(cast, "GET", "/status", wrong))[0] == 401, wrong


async def test_a_tokens_text_is_kept_nowhere(cast: Cast, admin: ControlClient) -> None:
    text = (await admin.create_token(TokenRequest(name="one"))).text.get_secret_value()
    kept = b"".join(path.read_bytes() for path in cast.house.directory.glob("registry.sqlite*"))
    assert text[41:].encode() not in kept


async def test_only_admins_make_tokens_and_so_many(
    cast: Cast, admin: ControlClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PermanentError, match="operator may not POST"):
        await cast.operator.create_token(TokenRequest(name="one"))
    monkeypatch.setattr(tokens, "MAX_TOKENS", 2)
    for name in ("one", "two"):
        await admin.create_token(TokenRequest(name=name))
    with pytest.raises(LimitError, match="2 is the limit"):
        await admin.create_token(TokenRequest(name="three"))


async def test_the_audit_names_who_did_what_by_certificate_and_by_token(cast: Cast, admin: ControlClient) -> None:
    made = await admin.create_token(TokenRequest(name="robot", role="operator"))
    text = made.text.get_secret_value()
    await ask(cast, "PUT", "/policies/gold", text, b'{"policy": {"name": "gold"}, "base_version": 0}')
    newest, before, *_ = await cast.operator.audit()
    assert (newest.party, newest.action, newest.subject) == ("robot", "policy", "gold, version 1")
    assert (before.party, before.action) == ("ada", "token")
    assert (await cast.operator.audit(before=newest.number))[0] == before
    with pytest.raises(PermanentError, match="may not GET"):
        await cast.machine.audit()


async def test_tokens_as_commands(cast: Cast, admin_identity: Identity, tmp_path: Path) -> None:
    operator = operator_settings(cast, tmp_path)
    refused = await operator("token", "create", "monitoring")
    assert refused.status == 1
    assert "use the identity of: admin" in refused.errors
    assert admin_identity.directory is not None
    admin = operator_settings(cast, tmp_path, identity=admin_identity.directory)
    made = await admin("token", "create", "monitoring", "--days", "30", "--json")
    assert made.json["text"].startswith("replicar_")
    assert (await ask(cast, "GET", "/machines", made.json["text"]))[0] == 200
    assert "replicar_" in (await admin("token", "create", "other")).output
    assert "monitoring" in (await admin("token", "list")).output
    assert (await admin("token", "revoke", made.json["id"])).status == 0
    assert "revoked" in (await admin("token", "list")).output
    assert (await admin("token", "create", "x", "--role", "king")).status == 1
    assert "revoke-token" in (await admin("audit")).output
