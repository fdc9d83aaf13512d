# make demo   the main job, from a bare clone           make lint       style, types, floors
# make test   install, lint, test                       make test-all   the slow tests too
# make long   a demo of half an hour; with GRAPHS=DIR instead the graph recipes, on the graphs DIR/fb15k, DIR/fb15k-237 and
#             DIR/wn18rr (`puna graph import`): hours, and the same command goes on where it was stopped
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m

.PHONY: demo test test-all lint long clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(RUN) puna.cli demo
	@echo
	@echo "report    runs/demo/report.html"
	@echo "figures   runs/demo/summary.json"
	@echo "chat      $(VENV)/bin/puna serve runs/demo    then open http://127.0.0.1:8000/#continue"

ifdef GRAPHS
long: $(addprefix long-,fb15k-complex fb15k-transe fb15k-complex-best fb15k-237 wn18rr)
else
long: $(VENV)/demo.stamp
	$(RUN) puna.cli demo --minutes 30 --dir runs/long
endif

# A recipe by its name, with three seeds; the figures become a file of bench/results.
SEEDS := 0,1,2
long-%: $(VENV)/dev.stamp
	$(VENV)/bin/python bench/graph_quality.py $* --data $(GRAPHS)/$(or $(filter fb15k-237 wn18rr,$*),fb15k) \
	  --runs runs/quality --seeds $(SEEDS) --out bench/results/graph_$*.json

# As many processes as cores, four at most; tests/conftest.py says what stays in one of them, and what begins first.
PYTEST := $(RUN) pytest -q -n auto --maxprocesses 4 --no-loadscope-reorder

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m ""

lint: $(VENV)/dev.stamp
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# A stamp is a finished installation of one extra; it is made again when the pins change.
$(VENV)/%.stamp: pyproject.toml constraints.txt | $(VENV)/made.stamp
	@echo "installing what '$*' needs into $(VENV) (pinned in constraints.txt; a few minutes the first time)"
	@$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

# An environment that works is kept; one that is absent or half made is made anew.
$(VENV)/made.stamp:
	@$(RUN) pip --version > /dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "Puna needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is not one of them. Name one: make PYTHON=python3.11"; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV); }
	@touch $@
