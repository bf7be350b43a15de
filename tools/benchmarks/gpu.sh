#!/usr/bin/env bash
# Checks this package on an NVIDIA GPU and measures its cost, in at most eight minutes; gpu.py has the options. Results
# go to $OUT, by default work_dirs/gpu. Uses the python of the environment, or $PYTHON.
set -eu
OUT=$(realpath -m "${OUT:-$(dirname "$0")/../../work_dirs/gpu}")
cd "$(dirname "$0")/../.."
exec "${PYTHON:-$(command -v python || command -v python3)}" tools/benchmarks/gpu.py --out "$OUT" "$@"
