#!/usr/bin/env bash
# Run Python of this tree on a GPU machine that has torch and triton but not this package: paths, caches, the commit.
#
#   bench/gpu_run.sh -m inferix.bench.first_minute --out outputs/first-minute.json
#   bench/gpu_run.sh -m inferix.bench.gpu_check --stage tests --out outputs/gpu
#
# The tree itself is the package, so a folder with a link `inferix` to it goes on the path. Results belong in outputs/,
# which git ignores, and are copied to $OUT at the end if it is set. Caches lie in outputs/, too.
set -u
tree=$(cd "$(dirname "$0")/.." && pwd)
cd "$tree"
mkdir -p outputs/.path
ln -sfn "$tree" outputs/.path/inferix
export PYTHONPATH="$tree/outputs/.path${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$tree/outputs/.triton}" TRITON_DISABLE_LINE_INFO=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
if [ -z "${INFERIX_COMMIT:-}" ] && [ -d .git ]; then
    INFERIX_COMMIT=$(git describe --always --abbrev=12 --exclude='*' --dirty=+changes 2>/dev/null) || INFERIX_COMMIT=
fi
export INFERIX_COMMIT="${INFERIX_COMMIT:-}"
"${PYTHON:-python3}" "$@"
code=$?
if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    find outputs -name .path -prune -o -name .triton -prune -o -type f -print | while read -r file; do
        mkdir -p "$OUT/$(dirname "$file")" && cp "$file" "$OUT/$file"
    done
fi
exit $code
