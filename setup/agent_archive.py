"""Make the agent's archive: one file that runs on a machine with this version of Python and nothing else of ours.

    .venv/bin/python setup/agent_archive.py [DIRECTORY]        (`make archive`; DIRECTORY is dist by default)

A zip that Python runs (PEP 441), made by shiv: it unpacks itself once, below SHIV_ROOT or ~/.shiv, into a directory
named by the digest of what is in it, and runs from there, since compiled libraries can't be loaded out of a zip. It
does not bring an interpreter: the machine's own is patched by whoever patches the machine, and a frozen one by nobody.

What goes in is what `make setup` put into .venv, whose wheels were checked against the lock file's hashes: the packages
of requirements-agent.txt, less what only their own tests and builds need, and the agent's two rooms as git has them.
Nothing is fetched. Same tree, same Python, same bytes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "setup" / "requirements-agent.txt"
ROOMS = ("replicar", "mobility_agent")
#: Of a package: what its installation wrote, so that it differs from one time to the next, or what nobody runs.
LEFT_OUT = re.compile(
    r"(^|/)(__pycache__|tests?|testing|include)/|(^|/)(RECORD|INSTALLER|REQUESTED|direct_url\.json)$|\.(pyc|pyi|a|pxd|h|c)$"
)
#: 1980-01-01, the first day that a zip knows of.
EPOCH = "315532800"


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve()
    target.mkdir(parents=True, exist_ok=True)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    name = f"mobility-agent-{version}-linux-{platform.machine()}-{python.replace('.', '')}.pyz"
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        site.mkdir()
        for package in _locked():
            _copy_package(package, site)
        _copy_rooms(site, version)
        for path in site.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        _pack(site, target / name, python)
    digest = hashlib.sha256((target / name).read_bytes()).hexdigest()
    (target / "SHA256SUMS").write_text(f"{digest}  {name}\n")
    sys.stdout.write(f"{target / name}\n")


def _locked() -> list[str]:
    return re.findall(r"^([A-Za-z0-9._-]+)==", LOCK.read_text(), re.MULTILINE)


def _copy_package(name: str, site: Path) -> None:
    found = distribution(name)
    for file in found.files or ():
        inside = str(file)
        if not inside.startswith("..") and not LEFT_OUT.search(inside):
            destination = site / inside
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(found.locate_file(file)), destination)


def _copy_rooms(site: Path, version: str) -> None:
    listed = subprocess.run(["git", "ls-files", "-z", *ROOMS], cwd=ROOT, capture_output=True, check=True).stdout
    for inside in filter(None, listed.decode().split("\0")):
        if not inside.startswith("replicar/cli/"):  # the operator's
            (site / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / inside, site / inside)
    information = site / f"replicar-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: replicar\nVersion: {version}\n")


def _pack(site: Path, target: Path, python: str) -> None:
    shiv = [str(Path(sys.executable).parent / "shiv"), "--reproducible", "--site-packages", str(site)]
    entry = ["--entry-point", "mobility_agent.cli:main", "--python", f"/usr/bin/env {python}"]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
    subprocess.run([*shiv, *entry, "--output-file", str(target)], env=environment, check=True)


if __name__ == "__main__":
    main()
