#!/usr/bin/env bash
# Creates an environment with one of the two stacks and this package: .venv with the official packages or, if
# STACK=modern, .venv-modern with the forks for new torch. You can run it again at any time: it resumes where it
# stopped, and takes a second if everything is installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
STACK=${STACK:-official}
case $STACK in
    official) VENV=.venv MMCV=mmcv==2.1.0 VERSIONS='3.10 3.11' ;;
    modern) VENV=.venv-modern MMCV=onedl-mmcv==2.3.6 VERSIONS='3.10 3.11 3.12' ;;
    *) echo "setup: STACK is '$STACK', expected official or modern" >&2; exit 1 ;;
esac
PYTHON=${PYTHON:-python3}
BIN=$VENV/bin
STAMP=$VENV/complete
PINS=requirements/$STACK.txt
VERSION=$(cat "$PINS" setup.py tools/dev/setup.sh | cksum)

say() { printf '\n[setup %s] %s\n' "$(date +%H:%M:%S)" "$*"; }
pip_install() { $BIN/python -m pip install --disable-pip-version-check --no-deps "$@"; }

if [ -f $STAMP ] && [ "$(cat $STAMP)" = "$VERSION" ]; then
    exit 0
fi

if ! $BIN/python -m pip --version >/dev/null 2>&1; then
    case " $VERSIONS " in
        *" $("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') "*) ;;
        *) echo "setup: the $STACK stack is for Python ${VERSIONS// / or }, and $PYTHON is $("$PYTHON" --version 2>&1);" \
            "set another one with PYTHON=/path/to/python3.11, or use an existing environment: pip install -e ." >&2
           exit 1 ;;
    esac
    say "1/4 Creating $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear $VENV
fi

say "2/4 Installing the pinned packages (2 to 4 minutes the first time, most of it torch)"
pip_install -q -r "$PINS"
if ! $BIN/python -c 'import cv2' 2>/dev/null; then
    say "There are no display libraries: installing opencv-python-headless instead of the full OpenCV"
    pip_install -q --force-reinstall "$(grep '^opencv-python-headless' "$PINS")"
fi

if $BIN/python -c 'import mmcv.ops' 2>/dev/null; then
    say "3/4 mmcv with compiled ops is already installed"
elif pip_install -q --only-binary :all: $MMCV 2>/dev/null; then
    say "3/4 $MMCV installed from a wheel"
else
    command -v g++ >/dev/null || { echo "setup: compiling mmcv needs g++ (Debian: apt-get install g++)" >&2; exit 1; }
    HEADER=$($BIN/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    [ -f "$HEADER" ] || { echo "setup: compiling mmcv needs $HEADER (Debian: apt-get install python3-dev)" >&2; exit 1; }
    say "3/4 Compiling the ops of $MMCV, which has no wheel on the index (about 8 minutes on 2 cores, once: pip" \
        "keeps the result)"
    # mmcv compiles for the GPU if torch finds one, and fails without nvcc of torch's CUDA version
    CUDA=$($BIN/python -c 'import torch; print(torch.cuda.is_available() and torch.version.cuda.split(".")[0] or "")')
    if [ -n "$CUDA" ] && ! "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" --version 2>/dev/null | grep -q "release $CUDA\."; then
        say "There is a GPU, but no nvcc of torch's CUDA version, $CUDA. The ops are compiled for the CPU alone, and" \
            "detectors will not train on the GPU. To change this, put nvcc on the PATH or set CUDA_HOME, run" \
            "$BIN/python -m pip cache remove '*mmcv*', remove $VENV, and run this again"
        export CUDA_VISIBLE_DEVICES=
    fi
    MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} pip_install --no-build-isolation $MMCV
fi

say "4/4 Installing mmkd_plugin from this folder, and importing everything once"
pip_install -q --no-build-isolation -e .
$BIN/python -W ignore -c 'import mmkd_plugin.models'
echo "$VERSION" >$STAMP
say "Complete: . $BIN/activate"
