#!/bin/bash
# Installs what is missing for what is about to be done; says nothing when all is there.
#
#   tools/setup.sh packages   Debian's packages: compiler, Bazel, libraries, clang-format
#   tools/setup.sh build      those, and LibTorch in .venv (the default)
#   tools/setup.sh test       those, and the Python original, which tests and benchmarks compare with
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
  g++ python3 python3-venv clang-format
  bazel-bootstrap bazel-rules-java bazel-rules-proto bazel-skylib bazel-platforms
  libcli11-dev libyaml-cpp-dev nlohmann-json3-dev catch2 libgloo-dev libpng-dev zlib1g-dev
  dataset-fashion-mnist fortunes iproute2
)

install_packages() {
  local missing=()
  mapfile -t missing < <(comm -23 <(printf '%s\n' "${packages[@]}" | sort) <(
    dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null |
      sed -n 's/^installed //p' | sort -u))
  if [[ ${#missing[@]} -eq 0 ]]; then
    return
  fi
  echo "setup: installing ${missing[*]}"
  local root=()
  if [[ $(id -u) -ne 0 ]]; then
    root=(sudo)
  fi
  export DEBIAN_FRONTEND=noninteractive
  "${root[@]}" apt-get update -qq
  "${root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# Installs a requirements file into .venv, once: a copy beside the packages shows that it was done.
# What follows the file are options for pip.
install_python() {
  local requirements=$1 stamp=.venv/$(basename "$1")
  shift
  if cmp -s "$requirements" "$stamp"; then
    return
  fi
  echo "setup: installing $(grep -v '^#' "$requirements" | paste -sd ' ') into .venv"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
    --requirement "$requirements" "$@"
  cp "$requirements" "$stamp"
}

ensure_libtorch() {
  # An interpreter that does not start, or another one's environment copied here, is made anew.
  if [[ $(.venv/bin/python -c 'import sys; print(sys.prefix)' 2>/dev/null) != "$(pwd -P)/.venv" ]]; then
    rm -rf .venv
    /usr/bin/python3 -m venv .venv
  fi
  if cmp -s third_party/requirements.txt .venv/requirements.txt &&
    cmp -s third_party/requirements-headers.txt .venv/requirements-headers.txt; then
    return
  fi
  install_python third_party/requirements.txt
  install_python third_party/requirements-headers.txt --no-deps
  # A running Bazel looks for LibTorch and the headers again when it next starts.
  bazel shutdown >/dev/null 2>&1 || true
}

case ${1:-build} in
  packages)
    install_packages
    ;;
  build)
    install_packages
    ensure_libtorch
    ;;
  test)
    install_packages
    ensure_libtorch
    install_python third_party/requirements-test.txt
    ;;
  *)
    echo "tools/setup.sh got \"$1\", expected packages, build or test." >&2
    exit 2
    ;;
esac
