#!/bin/sh
# Make this checkout ready to run: choose a Python, install what it lacks, compile the extension in place.
#
#   sh tools/setup.sh [GROUP...]    GROUP: further groups of pyproject.toml, for example lint
#
# PYTHON   the Python to start from (python3)
# VENV     the virtual environment to make (.venv); empty: use PYTHON as it is
# An active virtual environment is used instead of making one, and so is a PYTHON that has everything already.
# The file .python holds the interpreter to use, the choices above, and the groups; where they are the same and it is
# newer than every source, there is nothing to do.
set -eu
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV-.venv}
ACTIVE=${VIRTUAL_ENV-}
KEY="$PYTHON|$VENV|$ACTIVE|${AUTOFLIP_CUDA-}|${AUTOFLIP_CUDA_ARCHS-}|${AUTOFLIP_SANITIZE-}|${CXX-}"

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

up_to_date() {
    [ -f .python ] && [ "$(sed -n 2p .python)" = "$KEY" ] && [ -x "$(sed -n 1p .python)" ] || return 1
    for group in "$@"; do sed -n 3p .python | grep -qw "$group" || return 1; done
    for built in autoflip/_C.*so; do [ -f "$built" ] || return 1; done
    [ -z "$(find setup.py pyproject.toml constraints.txt tools/setup.sh tools/requirements.py csrc -newer .python)" ]
}
if up_to_date "$@"; then exit 0; fi
EXTRA="$* $(sed -n 3p .python 2>/dev/null || true)"
rm -f .python

# ---- what must be there already
python_fits() {
    version=$("$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 10))') ||
        die "$1 is Python ${version:-?}; autoflip needs Python 3.10 or newer. Name one: make PYTHON=python3.11 ..."
}
command -v "$PYTHON" >/dev/null || die "there is no $PYTHON; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python"
python_fits "$PYTHON"
CXX=${CXX:-g++}
command -v "${CXX%% *}" >/dev/null ||
    die "there is no C++ compiler $CXX; install one (Debian, Ubuntu: apt install g++; conda: conda install gxx) or set CXX"

# ---- installing
INSTALLED=
TORCH=$(sed -n 's/^torch==//p' constraints.txt)
GROUPS_WANTED="build run test triton $EXTRA"
lacking() { "$1" tools/requirements.py $GROUPS_WANTED 2>/dev/null || echo "pip (python -m ensurepip)"; }
pip_install() {  # pip_install PYTHON ARGUMENT...: quiet, and its complaints go to stderr
    python=$1; shift
    "$python" -m pip install -q --disable-pip-version-check --no-input --retries 1 -c constraints.txt "$@" >&2
}
install_torch() {
    if [ "$(uname -s)" != Linux ] || [ -e /dev/nvidiactl ]; then
        pip_install "$1" "torch==$TORCH"
        return
    fi
    # the suffix +cpu keeps pip from taking the CUDA build, gigabytes that a machine without a GPU has no use for
    pip_install "$1" "torch==$TORCH+cpu" 2>/dev/null ||
        pip_install "$1" --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH+cpu" || {
        say "no CPU build of torch $TORCH for Python $version was found where pip looks or at download.pytorch.org."
        say "The CUDA build (gigabytes) was not fetched instead. Install any torch >= 2.6 yourself and say which Python has it:"
        die "    make VENV= PYTHON=/path/to/python ..."
    }
}
pip_lines() {  # install requirements into $target, one a line: they hold spaces and <>
    set -f
    IFS='
'
    pip_install "$target" $1 && status=0 || status=1
    unset IFS
    set +f
    return $status
}
install_lacking() {  # everything that $1 lacks; false when something cannot be had
    lacking "$1" | grep -q '^pip ' && "$1" -m ensurepip >/dev/null 2>&1 || true
    if lacking "$1" | grep -q '^torch'; then
        say "installing torch $TORCH into $1"
        INSTALLED=1
        install_torch "$1" || return 1
    fi
    target=$1
    lack=$(lacking "$1")
    [ -n "$lack" ] || return 0
    INSTALLED=1
    say "installing $(echo "$lack" | sed 's/[^A-Za-z0-9_-].*//' | paste -s -d ' ' -)"
    pip_lines "$lack" || {  # at least those that can be had
        for index in $(seq "$(echo "$lack" | wc -l)"); do
            pip_lines "$(echo "$lack" | sed -n "${index}p")" || true
        done
        [ -z "$(lacking "$1")" ]
    }
}
make_venv() {
    # an environment that somebody else made, or one of another Python, is not ours to fill
    base=$("$PYTHON" -c 'import sys; print(sys.prefix, sys.version_info[:2])')
    if [ -e "$VENV" ] && [ "$(cat "$VENV/.autoflip" 2>/dev/null)" != "$base" ]; then
        [ -f "$VENV/.autoflip" ] || die "$VENV is there and was not made by this script; remove it, or choose: make VENV=DIR ..., make VENV= PYTHON=$VENV/bin/python ..."
        say "$VENV belongs to another Python; making it anew"
        rm -rf "$VENV"
    fi
    [ -x "$VENV/bin/python" ] && return
    say "making the virtual environment $VENV with Python $version"
    "$PYTHON" -m venv "$VENV" >&2 || { rm -rf "$VENV"; return 1; }
    printf '%s\n' "$base" >"$VENV/.autoflip"
}

# ---- which Python
OURS=
if [ -z "$VENV" ]; then
    P=$PYTHON
elif [ -n "$ACTIVE" ] && [ -x "$ACTIVE/bin/python" ] && [ "$PYTHON" = python3 ]; then
    P=$ACTIVE/bin/python
    python_fits "$P"
elif [ -z "$(lacking "$PYTHON")" ]; then
    P=$PYTHON
else
    P=$PYTHON
    if make_venv; then
        P=$PWD/$VENV/bin/python
        case $VENV in /*) P=$VENV/bin/python ;; esac
        OURS=1
        if ! lacking "$PYTHON" | grep -q '^torch\|^pip '; then
            # a torch that is there stays the one in use (a GPU's, for example); --system-site-packages does not see
            # the packages of a Python that is itself in a virtual environment, a .pth file does
            "$PYTHON" -c 'import os, torch; print(os.path.dirname(torch.__path__[0]))' \
                >"$("$P" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
            # Python 3.10 and 3.11 put an old one into every new environment, before a newer one outside
            "$P" -m pip uninstall -q -y --disable-pip-version-check setuptools >&2 || true
        fi
    else
        say "$PYTHON cannot make virtual environments (Debian, Ubuntu: apt install python3-venv); using it as it is"
    fi
fi
P=$(command -v "$P")
# pyenv's and others' shims: the stamp holds the interpreter itself
P=$("$P" -c 'import sys; print(sys.executable)')

if ! install_lacking "$P"; then
    GROUPS_WANTED=build
    needed=$(lacking "$P")
    GROUPS_WANTED="run test triton $EXTRA"
    say "could not install, for $P: $(lacking "$P" | paste -s -d ',' - | sed 's/,/, /g')"
    "$P" -c 'import torch, numpy' 2>/dev/null && [ -z "$needed" ] ||
        die "that is needed${needed:+ (and to compile: $(echo "$needed" | paste -s -d ' ' -))}; connect to a package index, or install it another way, and run this again"
    say "going on without; what needs it will say so"
fi
[ -z "$INSTALLED" ] || "$P" -c 'import torch' || die "$P cannot import torch (its message is above)"

# ---- compiling, in place
say "compiling the extension"
if [ -n "$OURS" ]; then
    pip_install "$P" --no-build-isolation --no-deps -e . || die "the extension did not build (the message is above)"
else
    "$P" setup.py -q build_ext --inplace >&2 || die "the extension did not build (the message is above)"
fi
printf '%s\n' "$P" "$KEY" "$EXTRA" >.python
say "ready: $P"
