#!/usr/bin/env bash
# Install AzCopy, for a test and for `python -m bench seed`, into .azcopy: 57 MB, the version of its lock file.
#
# It is linked with libsecret, which only root can have installed. A second run compares stamps.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.azcopy/.stamp
wanted=$(cat setup/azcopy/package.json setup/azcopy/package-lock.json | sha256sum | cut -d ' ' -f 1)

fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

if ! ldconfig -p | grep -q libsecret-1.so.0; then
    [ "$(id -u)" = 0 ] || fail "libsecret is missing; run: sudo apt-get install libsecret-1-0"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends libsecret-1-0 >/dev/null
fi
[ "$(cat $stamp 2>/dev/null)" != "$wanted" ] || exit 0
node=$(readlink -f .azurite/bin/node) || fail "there is no Node; run: make setup"
npm=$(command -v npm || echo "$(dirname "$node")/../lib/node_modules/npm/bin/npm-cli.js")
rm -rf .azcopy
mkdir .azcopy
cp setup/azcopy/package.json setup/azcopy/package-lock.json .azcopy/
(cd .azcopy && "$node" "$(readlink -f "$npm")" ci --ignore-scripts --no-audit --no-fund --no-update-notifier \
    --loglevel=error >/dev/null)
program=$(find .azcopy/node_modules/@azure-tools/azcopy-linux/dist/bin -name "azcopy_linux_$(dpkg --print-architecture)")
[ -n "$program" ] || fail "this version of AzCopy has no program for this processor"
chmod 755 "$program"
ln -s "${program#.azcopy/}" .azcopy/azcopy
.azcopy/azcopy --version
echo "$wanted" >$stamp
