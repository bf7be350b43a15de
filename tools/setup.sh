#!/usr/bin/env bash
# Makes .venv with the official stack and this package. Run it again at any time: it continues where it
# was interrupted, and takes a second when all is there.
set -euo pipefail
cd "$(dirname "$0")/.."
MMCV=2.1.0
PYTHON=${PYTHON:-python3}
BIN=.venv/bin
STAMP=.venv/complete
VERSION=$(cat requirements/official.txt setup.py "$0" | cksum)

say() { printf '\n[setup %s] %s\n' "$(date +%H:%M:%S)" "$*"; }

if [ -f $STAMP ] && [ "$(cat $STAMP)" = "$VERSION" ]; then
    exit 0
fi

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    echo "setup: the exact pins are for Python 3.11, and $PYTHON is $("$PYTHON" --version 2>&1); name another" \
        "with PYTHON=/path/to/python3.11, or, in a stack you have, run: pip install -e ." >&2
    exit 1
fi

if ! $BIN/python -m pip --version >/dev/null 2>&1; then
    say "1/4 Making .venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear .venv
fi

say "2/4 Installing the pinned packages (2 to 4 minutes the first time, most of it torch)"
$BIN/python -m pip install -q --disable-pip-version-check -r requirements/official.txt
if ! $BIN/python -c 'import cv2' 2>/dev/null; then
    say "No display libraries here: OpenCV without windows takes the place of the full one"
    $BIN/python -m pip install -q --disable-pip-version-check --no-deps --force-reinstall \
        "$(grep '^opencv-python-headless' requirements/official.txt)"
fi

if $BIN/python -c 'import mmcv.ops' 2>/dev/null; then
    say "3/4 mmcv with compiled ops is there"
elif $BIN/python -m pip install -q --disable-pip-version-check --no-deps --only-binary :all: mmcv==$MMCV 2>/dev/null; then
    say "3/4 mmcv $MMCV installed from a wheel"
else
    command -v g++ >/dev/null || { echo "setup: compiling mmcv needs g++ (Debian: apt-get install g++)" >&2; exit 1; }
    say "3/4 Compiling the ops of mmcv $MMCV, which has no wheel on the index (about 8 minutes on 2 cores, once: pip" \
        "keeps the result)"
    MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} $BIN/python -m pip install --disable-pip-version-check \
        --no-build-isolation --no-deps mmcv==$MMCV
fi

say "4/4 Installing mmkd_plugin from this folder, and importing everything once"
$BIN/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
$BIN/python -W ignore -c 'import mmkd_plugin.models'
echo "$VERSION" >$STAMP
say "Complete: . .venv/bin/activate"
