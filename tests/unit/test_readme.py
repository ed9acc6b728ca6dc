"""README and operator's guide name commands, options and settings that exist, and show what they promise to show."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from config_server.cli import app as config_server
from mobility_agent.cli import app as mobility_agent
from mobility_agent.settings import AgentSettings
from process_server.cli import app as process_server
from process_server.settings import Settings as ProcessServerSettings
from recovery.recovery_plans import read_plan
from replicar.cli.app import app as replicar

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "operating.md").read_text()
APPS = {
    "replicar": replicar,
    "mobility-agent": mobility_agent,
    "process-server": process_server,
    "config-server": config_server,
}


def _shell_lines() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README + GUIDE, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


CALLS = [shlex.split(line, comments=True) for line in _shell_lines() if line.split(" ")[0] in APPS]


#: Commands that have commands of their own.
GROUPS = {"vault-key", "policy", "target", "jobs", "token", "plan", "replica"}


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_a_command_that_is_shown_exists_with_its_options(call: list[str]) -> None:
    shown = CliRunner().invoke(
        APPS[call[0]],
        [*call[1 : 3 if call[1] in GROUPS else 2], "--help"],
        env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"},
    )
    assert shown.exit_code == 0, shown.output
    for option in (word for word in call if word.startswith("--")):
        assert option in shown.output


def test_the_plan_that_the_guide_shows_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(name = .*?)```", GUIDE, re.DOTALL)
    (tmp_path / "shop.toml").write_text(text)
    assert [str(step) for step in read_plan(tmp_path / "shop.toml").steps][-1] == "web1, web2"


def test_the_settings_that_the_readme_shows_are_settings() -> None:
    files = re.findall(r"cat > \S+ <<'END'\n(.*?)END", README, re.DOTALL)
    server, agent = (tomllib.loads(text) for text in files)
    assert set(server) <= set(ProcessServerSettings.model_fields)
    assert set(agent) <= set(AgentSettings.model_fields)


@pytest.mark.parametrize("name", ["demo", "figures"])
def test_a_place_for_output_holds_some(name: str) -> None:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found is not None
    assert len(found[1].replace("```", "").strip()) > 100
