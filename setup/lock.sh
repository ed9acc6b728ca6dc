#!/usr/bin/env bash
# Write the lock files anew from what they are made of: requirements*.in and package.json.
#
# Run it by hand after changing a pin, once with each Python from 3.11 to 3.13 (PYTHON=...): the three answers have to
# be the same but for the "via" remarks, since one requirements.txt serves all of them. No lock file names a registry,
# so whoever has a mirror can use it; the hashes say that the bytes are the same wherever they come from.
set -euo pipefail
cd "$(dirname "$0")"

PIP_TOOLS=7.6.2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet "pip-tools==$PIP_TOOLS"
for name in requirements requirements-agent requirements-node; do
    "$scratch/venv/bin/pip-compile" --quiet --generate-hashes --allow-unsafe --strip-extras --no-header \
        --annotation-style line --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
        --output-file "$name.txt" "$name.in"
done

for project in . azcopy; do
    (cd "$project" && npm install --package-lock-only --omit-lockfile-registry-resolved --ignore-scripts --no-audit --no-fund)
done
