#!/bin/bash
# Formats every C++ and CUDA source that git knows or would add; with --check, only names the
# places that differ and fails.
set -euo pipefail
cd "$(dirname "$0")/.."

mode=(-i)
if [[ ${1:-} == --check ]]; then
  mode=(--dry-run --Werror)
fi
git ls-files -z --cached --others --exclude-standard -- '*.h' '*.cc' '*.cu' '*.cuh' |
  while IFS= read -r -d '' file; do
    if [[ -f $file ]]; then
      printf '%s\0' "$file"
    fi
  done |
  xargs -0 --no-run-if-empty -n 16 -P 2 clang-format --style=file "${mode[@]}"
