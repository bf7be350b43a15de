#!/usr/bin/env bash
# Proves on an NVIDIA GPU that this package works there, and measures it, in at most eight minutes; see gpu.py for the
# options. Results go to $OUT, or to work_dirs/gpu. Runs the python of the environment, or $PYTHON.
set -eu
OUT=$(realpath -m "${OUT:-$(dirname "$0")/../../work_dirs/gpu}")
cd "$(dirname "$0")/../.."
exec "${PYTHON:-$(command -v python || command -v python3)}" tools/benchmarks/gpu.py --out "$OUT" "$@"
