# One command each; scripts/ holds what is longer than a line.
PREFIX ?=
BANGER_SKIP_PACKAGES ?=
export PREFIX BANGER_SKIP_PACKAGES
PYTHON = .venv/bin/python

.PHONY: help install uninstall agent venv fmt check test test-lab bench bench-lab lock clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: ## host packages, the agent, and banger itself (PREFIX=/usr/local as root, else ~/.local)
	@scripts/install.sh

uninstall: ## remove what install put in place; VMs, images and config stay
	@scripts/uninstall.sh

agent: ## build the guest agent
	@scripts/build-agent.sh

venv: ## the development environment in .venv
	@scripts/venv.sh

fmt: venv ## format the code
	$(PYTHON) -m ruff format src tests benchmarks
	$(PYTHON) -m ruff check --fix src tests benchmarks

check: venv agent ## format, lint, types, layers, shell, Go's checks, unit, contract and fuzz tests
	@scripts/check.sh

test: ## everything, on a machine that may have nothing yet
	@scripts/test.sh

test-lab: ## the tests that need KVM or Firecracker, in a lab machine of our own
	@scripts/test.sh tests/lab

bench: venv agent ## measure, and write docs/benchmarks.md
	$(PYTHON) -m benchmarks.run

bench-lab: ## measure Firecracker in the lab, and write docs/benchmarks-firecracker.md
	@scripts/bench-lab.sh

lock: ## pin all dependencies anew into requirements/
	@scripts/lock.sh

clean: ## remove what was built here
	rm -rf .build .venv dist test-results src/banger/guest/bin
