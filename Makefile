# One command each; scripts/ holds what is longer than a line.
PREFIX ?=
PYTHON = .venv/bin/python

.PHONY: help install uninstall agent venv fmt check test bench clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: ## host packages, the agent, and banger itself (PREFIX=/usr/local as root, else ~/.local)
	@PREFIX="$(PREFIX)" scripts/install.sh

uninstall: ## remove what install put in place; VMs, images and config stay
	@PREFIX="$(PREFIX)" scripts/uninstall.sh

agent: ## build the guest agent
	@scripts/build-agent.sh

venv: ## the development environment in .venv
	@scripts/venv.sh

fmt: venv ## format the code
	$(PYTHON) -m ruff format src tests benchmarks
	$(PYTHON) -m ruff check --fix src tests benchmarks

check: venv agent ## format, lint, types, layers, Go's checks, unit and contract tests
	@scripts/check.sh

test: ## everything, on a machine that may have nothing yet
	@scripts/test.sh

bench: venv agent ## measure, and write docs/benchmarks.md
	$(PYTHON) -m benchmarks.run

clean: ## remove what was built here
	rm -rf .build .venv dist test-results src/banger/guest/bin
