# Each rule installs what it lacks (tools/setup.sh), then does its work.
#
#   make fashion-mnist      trains the example to the end and tests its best checkpoint
#   make gpt2               trains a small GPT on Debian's fortunes
#   make test               every test but the long ones; closes with "N passed, N failed"
#   make test-long          the long ones
#   make gpu-test           the test cases for GPUs; writes tests/gpu_summary.md
#   make test-kill          100 kills of a training that saves; `make test` has 10
#   make fuzz               a libFuzzer of the checkpoint formats, until it is stopped; needs clang
#   make build              everything
#   make bench              the benchmarks, next to the Python original
#   make format             formats the sources; check-format only looks
#   make compile-commands   compile_commands.json, for clangd

.PHONY: setup build fashion-mnist gpt2 test test-long gpu-test test-kill fuzz bench format check-format compile-commands clean

FASHION_MNIST := bazel-bin/examples/fashion_mnist/fashion_mnist
FASHION_MNIST_CONFIG := examples/fashion_mnist/config.yaml

setup:
	@tools/setup.sh build

build: setup
	bazel build //...

fashion-mnist: setup
	bazel build //examples/fashion_mnist
	$(FASHION_MNIST) fit --config $(FASHION_MNIST_CONFIG)

gpt2: setup
	bazel build //examples/gpt2
	bazel-bin/examples/gpt2/gpt2 fit --config examples/gpt2/config.yaml

test:
	@tools/setup.sh test
	@tools/test.sh --test_tag_filters=-long --build_tests_only //tests/...

test-long:
	@tools/setup.sh test
	@tools/test.sh --test_tag_filters=long --build_tests_only //tests/...

gpu-test:
	@tools/gpu_test.sh $(ARGS)

test-kill:
	@tools/setup.sh test
	@tools/test.sh --test_env=LIGHTNING_KILLS=100 --nocache_test_results //tests/kill:kill_test

fuzz: setup
	bazel build //tests/fuzz:libfuzzer
	mkdir -p .cache/fuzz
	bazel-bin/tests/fuzz/libfuzzer $(ARGS) .cache/fuzz tests/fuzz/seeds

bench:
	@tools/setup.sh test
	bazel build //benchmarks/...
	.venv/bin/python benchmarks/run.py

format:
	@tools/setup.sh packages
	@tools/format.sh

check-format:
	@tools/setup.sh packages
	@tools/format.sh --check

compile-commands: setup
	@python3 tools/compile_commands.py

# The compiled objects stay in the disk cache (~/.cache/lightning-bazel), what was used of it in the
# last two weeks.
clean:
	bazel clean
	find ~/.cache/lightning-bazel -type f -atime +14 -delete
