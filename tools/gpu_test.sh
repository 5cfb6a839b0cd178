#!/bin/bash
# Runs the test cases tagged [gpu] on a machine with GPUs, one program at a time, and writes a
# summary: how many passed of each program, on which device, with which versions, when.
#
#   tools/gpu_test.sh [OPTION]... [FOLDER]
#
#   FOLDER            runs the programs *_test found in it, built elsewhere; without it they are
#                     built here
#   --sanitizer       under compute-sanitizer, memcheck and racecheck, without the cases tagged
#                     [large]; of programs in the folders cuda, nn, optim and param, if there are such
#   --only REGEX      only programs whose path matches
#   --summary FILE    where the summary goes; else tests/gpu_summary.md, or
#                     tests/gpu_sanitizer_summary.md for --sanitizer, unless there is an --only
#   --logs FOLDER     keeps what the programs printed
#   --limit SECONDS   for one program; 600, or 1800 for --sanitizer
#
# Python with torch ($LIGHTNING_PYTHON, .venv/bin/python or python3) says the versions and where
# LibTorch is, for programs that do not find it. compute-sanitizer is $COMPUTE_SANITIZER, or that of
# the PATH, of /usr/local/cuda or of PyPI beside torch; it watches our own kernels. The exit status
# is 0 only if something ran and nothing failed, 2 for a machine or a call that cannot be used: then
# nothing is written.
set -uo pipefail
cd "$(dirname "$0")/.."

die() {
  echo "gpu_test: $*" >&2
  exit 2
}

folder='' sanitizer=false only='' summary='' logs='' limit=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --sanitizer) sanitizer=true ;;
    --only | --summary | --logs | --limit)
      [[ $# -ge 2 ]] || die "$1 needs a value."
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    -*) die "got $1, expected --sanitizer, --only, --summary, --logs, --limit or a folder." ;;
    *)
      [[ -z $folder ]] || die "got two folders, \"$folder\" and \"$1\"."
      folder=$1
      ;;
  esac
  shift
done
[[ $limit =~ ^[0-9]*$ ]] || die "got --limit $limit, expected seconds."
[[ -z $folder || -d $folder ]] || die "there is no folder $folder."

# ---- The machine ----------------------------------------------------------------------------------

devices=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) && [[ -n $devices ]] ||
  die "nvidia-smi names no GPU here."
devices=$(sort <<<"$devices" | uniq -c | sed -E 's/^ *([0-9]+) /\1 x /' | paste -sd ', ')
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)

python=''
for candidate in "${LIGHTNING_PYTHON:-}" "$PWD/.venv/bin/python" "$(command -v python3)"; do
  if [[ -n $candidate ]] && "$candidate" -c 'import torch' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[[ -n $python ]] || die "no Python here has torch: set LIGHTNING_PYTHON."
read -r torch_version cuda_version cudnn_version torch_lib < <("$python" -c '
import os, torch
print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version(),
      os.path.join(os.path.dirname(torch.__file__), "lib"))')

tools=(plain)
if $sanitizer; then
  tools=(memcheck racecheck)
  checker=''
  for candidate in "${COMPUTE_SANITIZER:-}" "$(command -v compute-sanitizer)" \
    /usr/local/cuda/bin/compute-sanitizer "$torch_lib"/../../nvidia/*/bin/compute-sanitizer; do
    if [[ -n $candidate ]] && checker_version=$("$candidate" --version 2>/dev/null |
      grep -oiE 'version [0-9.]+'); then
      checker=$candidate
      break
    fi
  done
  [[ -n $checker ]] || die "there is no compute-sanitizer: set COMPUTE_SANITIZER, or install" \
    "PyPI's nvidia-cuda-sanitizer-api beside torch."
fi
if [[ -z $limit ]]; then
  limit=600
  if $sanitizer; then limit=1800; fi
fi

# ---- The programs ---------------------------------------------------------------------------------

if [[ -z $folder ]]; then
  tools/setup.sh test && bazel build --build_tests_only //tests/... || die "the tests did not build."
  folder=bazel-bin/tests
fi
mapfile -t programs < <(find -L "$folder" -name '*.runfiles' -prune -o -name '*_test' -type f \
  -executable -print | sort)
if [[ -n $only ]]; then
  mapfile -t programs < <(printf '%s\n' "${programs[@]}" | grep -E -- "$only")
elif $sanitizer; then
  mapfile -t kernels < <(printf '%s\n' "${programs[@]}" | grep -E '(^|/)(cuda|nn|optim|param)/')
  if [[ ${#kernels[@]} -gt 0 ]]; then programs=("${kernels[@]}"); fi
fi
[[ ${#programs[@]} -gt 0 && -n ${programs[0]} ]] || die "no program *_test was found in $folder."

export LIGHTNING_PYTHON=$python OMP_NUM_THREADS=1
# Programs built elsewhere look for LibTorch where it was there.
if ldd "${programs[0]}" 2>/dev/null | grep -q 'not found'; then
  libraries=$(printf ":%s" "$torch_lib"/../../nvidia/*/lib)
  export LD_LIBRARY_PATH=$torch_lib$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ -z $logs ]]; then
  logs=$work
fi
mkdir -p "$logs"

cases='[gpu]'
if $sanitizer; then cases='[gpu]~[large]'; fi

# How many test cases a program has for us; fails where it does not start.
count_cases() {
  local listed
  listed=$(timeout --kill-after=10 120 "$1" -l "$cases" 2>&1)
  if [[ $listed =~ ([0-9]+)\ (matching\ )?test\ case ]]; then
    echo "${BASH_REMATCH[1]}"
  elif [[ $listed == *"No test cases matched"* || $listed == *"o matching test cases"* ]]; then
    echo 0
  else
    printf '%s\n' "$listed" >&2
    return 1
  fi
}

# Runs one program with one tool and adds a row to the table.
passed_in_all=0 failed_in_all=0
rows=()
run() {
  local program=$1 name=$2 tool=$3
  local log=$logs/${name//\//_}.$tool.log xml=$work/cases.xml before=() note=''
  rm -f "$xml"
  if [[ $tool != plain ]]; then
    # All our kernels are in namespace lightning.
    before=(env "LIGHTNING_SANITIZER=$tool" "$checker" --tool "$tool" --error-exitcode 99
      --check-exit-code no --require-cuda-init no --kernel-name kernel_substring=lightning)
    # Without the caching allocator each tensor is an allocation of its own, whose ends are watched.
    if [[ $tool == memcheck ]]; then before=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${before[@]}"); fi
  fi
  local start=$SECONDS
  XML_OUTPUT_FILE=$xml timeout --kill-after=30 "$limit" "${before[@]}" "$program" "$cases" \
    </dev/null >"$log" 2>&1
  local status=$? seconds=$((SECONDS - start)) all=0 failed=0 aside=0
  if [[ -f $xml ]]; then
    all=$(grep -c '<testcase ' "$xml")
    failed=$(grep -c '<failure/>' "$xml")
  fi
  # Cases that need what this machine lacks warn, "needs two GPUs", and pass.
  aside=$(grep -cE '^ +needs .*GPU' "$log")
  if [[ $status -ne 0 && $failed -eq 0 ]]; then failed=1; fi
  case $status in
    0) ;;
    99) note="$tool found errors" ;;
    124 | 137) note="stopped after $limit s" ;;
    *) if [[ $status -gt 128 ]]; then note="ended by signal $((status - 128))"; fi ;;
  esac
  local passed=$((all - failed - aside))
  if [[ $passed -lt 0 ]]; then passed=0; fi
  passed_in_all=$((passed_in_all + passed))
  failed_in_all=$((failed_in_all + failed))
  local row="| $name |"
  if $sanitizer; then row+=" $tool |"; fi
  rows+=("$row $passed | $failed | $aside | $seconds | $note |")
  if $sanitizer; then name+=" ($tool)"; fi
  echo "$name: $passed passed, $failed failed, $aside stood aside, $seconds s${note:+; $note}"
  if [[ $failed -gt 0 ]]; then tail -n 60 "$log" | sed 's/^/    /'; fi
}

for program in "${programs[@]}"; do
  name=${program#"$folder"/}
  if ! count=$(count_cases "$program"); then
    failed_in_all=$((failed_in_all + 1))
    row="| $name |"
    if $sanitizer; then row+=" |"; fi
    rows+=("$row 0 | 1 | 0 | 0 | does not start |")
    echo "$name: does not start"
    continue
  fi
  if [[ $count -eq 0 ]]; then continue; fi
  for tool in "${tools[@]}"; do run "$program" "$name" "$tool"; done
done
[[ ${#rows[@]} -gt 0 ]] || die "no program in $folder has test cases tagged $cases."

# ---- The summary ----------------------------------------------------------------------------------

if [[ -z $summary && -z $only ]]; then
  summary=tests/gpu_summary.md
  if $sanitizer; then summary=tests/gpu_sanitizer_summary.md; fi
fi
if [[ -n $summary ]]; then
  {
    if $sanitizer; then
      echo '# The GPU tests under compute-sanitizer'
    else
      echo '# The GPU tests'
    fi
    echo
    echo "Written by tools/gpu_test.sh: $passed_in_all passed, $failed_in_all failed."
    echo
    echo "- Date: $(date -u +%Y-%m-%d)"
    echo "- Device: $devices"
    echo "- Driver: $driver"
    echo "- CUDA: $cuda_version (LibTorch's), cuDNN $cudnn_version"
    echo "- LibTorch: $torch_version"
    if $sanitizer; then echo "- compute-sanitizer: ${checker_version#* }"; fi
    if revision=$(git rev-parse --short HEAD 2>/dev/null); then
      if [[ -n $(git status --porcelain --untracked-files=no 2>/dev/null) ]]; then
        revision+=", with changes"
      fi
      echo "- Sources: $revision"
    fi
    echo
    if $sanitizer; then
      echo '| program | tool | passed | failed | stood aside | seconds | |'
      echo '|---|---|---|---|---|---|---|'
    else
      echo '| program | passed | failed | stood aside | seconds | |'
      echo '|---|---|---|---|---|---|'
    fi
    printf '%s\n' "${rows[@]}"
  } >"$work/summary.md"
  mkdir -p "$(dirname "$summary")" && cp "$work/summary.md" "$summary" || die "$summary cannot be written."
fi

echo "$passed_in_all passed, $failed_in_all failed"
[[ $passed_in_all -gt 0 && $failed_in_all -eq 0 ]]
