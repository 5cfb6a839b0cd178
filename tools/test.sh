#!/bin/bash
# Runs the test programs and closes with "N passed, N failed", counted in test cases.
#
#   tools/test.sh [BAZEL OPTION]... [TARGET]...
#
# The exit status is 0 only if something ran and nothing failed.
set -uo pipefail
cd "$(dirname "$0")/.."

events=$(mktemp)
trap 'rm -f "$events"' EXIT

bazel test --keep_going --build_event_json_file="$events" "$@"
python3 tools/test_summary.py "$events" --bazel-status $?
