# One verb a line; `make` alone lists them. PYTHON is any Python 3.11-3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PYTHONS := 3.11 3.12 3.13
UV_VERSION := 0.13.9
PIP_AUDIT_VERSION := 2.10.1
CYCLONEDX_VERSION := 7.5.0
# Libraries that the benchmarks compare with; they use the project's torch.
PEERS := kornia==0.9.0 kornia-rs==0.2.0 lightly==1.6.0 lightly-utils==0.0.2 \
  lightning-utilities==0.15.3
# Tools that load exported files, with what they import; they use the project's torch.
CONSUMERS := torchreid==0.2.5 fastreid==1.4.0 absl-py==2.5.1 beautifulsoup4==4.15.0 \
  gdown==6.5.1 h5py==3.16.0 opencv-python-headless==5.0.0.93 soupsieve==4.1.3 tabulate==0.10.0 \
  tensorboard==2.21.0 termcolor==3.3.0 yacs==0.1.8
# The allocator settings of workers on CPUs, as in upreid_ray/core/memory.py; a test compares them.
KEEP_MEMORY := MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776
# So many processes share the tests without Ray, a file at a time.
JOBS ?= 2
SHARED := --numprocesses $(JOBS) --dist loadfile
IMAGE ?= registry.example.com/upreid-ray:0.1.0

.PHONY: help setup pretrain sweep finetune compare check docs format test test-fast mutants test-pythons bench bench-data \
  bench-peers consumers chaos audit up down status secrets image test-image bill \
  lock clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY)  ## install the locked requirements into .venv

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	# Bytecode is compiled here once; otherwise each process compiles it again if it cannot write.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode \
	  -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

pretrain: $(READY)  ## pre-train on synthetic people and register the backbone, in minutes
	$(BIN)/python jobs/pretrain.py demo
	@echo
	@echo "Look at the run:      $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db"
	@echo "Use your own images:  $(BIN)/python jobs/prepare.py FOLDER --out shards"
	@echo "                      $(BIN)/python jobs/pretrain.py laptop --data.shards shards"

sweep: $(READY)  ## search the weights of the two constraints on a small synthetic set, in minutes
	$(BIN)/python jobs/sweep.py i2 demo --num_trials 5 --trial_epochs 2 \
	  --data.synthetic.num_train_identities 60 --data.synthetic.num_unlabeled_identities 60 \
	  --model.queue_size 256

finetune: $(READY)  ## fine-tune, score and register the champion of `make pretrain`
	$(BIN)/python jobs/finetune.py demo --init models:/upreid-resnet18@champion

# MoCo v2 is UP-ReID without its two constraints. In twice the epochs it trains about as long.
MOCO := demo --run.name moco-v2 --run.register_as upreid-resnet18-moco-v2 --training.epochs 6 \
  --loss.consistency_weight 0 --loss.intrinsic_weight 0
compare: $(READY)  ## compare that champion with MoCo v2 in the same time, and with random weights
	$(BIN)/python jobs/pretrain.py $(if $(wildcard runs/moco-v2),--resume moco-v2,$(MOCO))
	$(BIN)/python jobs/compare.py demo --splits 0.1 1.0 --seeds 1 --min_steps 40 \
	  --init UP-ReID=models:/upreid-resnet18@champion \
	  "MoCo v2=models:/upreid-resnet18-moco-v2@champion"

check: $(READY)  ## check format, lint, types, import layers and cluster manifests
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest --quiet tests/cluster/test_manifests.py

docs: $(READY)  ## write the reference of all settings, docs/settings.md
	$(BIN)/python -m docs.make_settings

format: $(READY)  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Beside the tests with Ray run those without, then those of the documents, which need a Ray too.
test: $(READY) $(VENV)/consumers  ## run all tests
	$(BIN)/python -m pytest -m ray --ignore tests/test_documents.py > $(VENV)/ray-tests.log 2>&1 & \
	$(BIN)/python -m pytest $(SHARED) -m "not ray"; others=$$?; \
	$(BIN)/python -m pytest -m ray tests/test_documents.py; documents=$$?; \
	wait $$!; ray=$$?; cat $(VENV)/ray-tests.log; exit $$((others + documents + ray))

consumers: $(READY) $(VENV)/consumers  ## install torchreid and fast-reid, with which tests load exported files

$(VENV)/consumers:
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $@ --no-deps $(CONSUMERS)

test-fast: $(READY)  ## run the tests that start no Ray cluster and are not slow
	$(BIN)/python -m pytest $(SHARED) -m "not ray and not slow"

mutants: $(READY)  ## check that the tests notice deliberate faults in the code
	$(BIN)/python -m tests.mutants $(ARGS)

test-pythons: $(READY)  ## the tests that need no Ray cluster, on every supported Python
	for python in $(PYTHONS); do \
	  $(BIN)/uv venv --quiet --clear --seed --python $$python $(VENV)/$$python \
	  && $(BIN)/uv pip install --quiet --python $(VENV)/$$python --require-hashes \
	    -r requirements.lock \
	  && PYTHONPATH=$(CURDIR) $(VENV)/$$python/bin/python -m pytest $(SHARED) -m "not ray" || exit; \
	done

bench: $(READY)  ## measure the numbers of docs/benchmarks.md
	$(KEEP_MEMORY) $(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python benchmarks/ray_overhead.py
	$(BIN)/python benchmarks/retrieval.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/data.py

bench-data: $(READY)  ## measure how fast images arrive, beside torch's DataLoader
	$(BIN)/python benchmarks/data.py $(ARGS)

bench-peers: $(READY) $(VENV)/peers  ## measure a step and its augmentation beside lightly, kornia and others
	$(KEEP_MEMORY) PYTHONPATH=$(VENV)/peers $(BIN)/python -m benchmarks.peers $(ARGS)

$(VENV)/peers:
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $@ --no-deps $(PEERS)

chaos: $(READY)  ## kill processes of a run at random and compare its final weights (an hour)
	$(BIN)/python -m benchmarks.chaos $(ARGS)

audit: $(READY)  ## look for known vulnerabilities in the locked requirements
	$(BIN)/uv tool run pip-audit@$(PIP_AUDIT_VERSION) --strict --require-hashes --disable-pip \
	  -r requirements.lock

up: $(READY)  ## start a local Ray head and an MLflow server
	$(BIN)/python cluster/local.py up $(ARGS)

down: $(READY)  ## stop what `make up` started
	$(BIN)/python cluster/local.py down $(ARGS)

status: $(READY)  ## show what `make up` started
	$(BIN)/python cluster/local.py status $(ARGS)

secrets:  ## create the passwords for Docker Compose and Kubernetes
	$(PYTHON) cluster/make_secrets.py

image:  ## build the container image (ARGS="--build-arg VARIANT=cpu")
	docker build -f cluster/Dockerfile -t $(IMAGE) $(ARGS) \
	  --build-arg COMMIT=$$(git describe --always --abbrev=40 --dirty) .

test-image: $(READY)  ## build the image without Docker and run its roles (as root; cluster/README.md)
	$(BIN)/python -m pytest tests/cluster/test_image.py tests/cluster/test_image_roles.py $(ARGS)

bill: $(READY)  ## write the image's bill of materials, build/bill-of-materials.json (CycloneDX)
	mkdir -p build
	$(BIN)/uv pip compile --quiet --no-header --no-annotate --generate-hashes pyproject.toml --group server \
	  -c requirements.lock --python-version 3.13 --python-platform linux -o build/image.lock
	$(BIN)/uv tool run --from cyclonedx-bom==$(CYCLONEDX_VERSION) cyclonedx-py requirements \
	  --output-reproducible --pyproject pyproject.toml build/image.lock -o build/bill-of-materials.json

lock: $(READY)  ## resolve the newest versions into requirements.lock
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header \
	  --upgrade --quiet pyproject.toml --group dev --group server -o requirements.lock

clean:  ## remove the environment and the caches, but not the runs
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
