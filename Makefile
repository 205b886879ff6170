# Every command here makes the environment first if it is not there. The plain pip and papermill lines are in README.md.
PYTHON ?= python3
RUN ?= demo
PRESET ?= demo
BIN = .venv/bin
RUNS = data/runs
export MPLBACKEND = agg
export PLOTLY_RENDERER = plotly_mimetype
export PYTHONWARNINGS = ignore::DeprecationWarning:zmq

.PHONY: help demo run lab test unit bench sample readme export clean
help:
	@echo "make demo | lab | test | bench | sample | readme | export"

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,atari,ppo,minari]"
	touch $@

# One experiment and its report: make demo, or make run RUN=mine PRESET=smoke
demo run: .venv/core
	@if [ -f $(RUNS)/$(RUN)/report.html ]; then echo "$(RUNS)/$(RUN) is finished: see $(RUNS)/$(RUN)/report.html; for another run say make $@ RUN=another"; else $(MAKE) --no-print-directory experiment; fi

.PHONY: experiment
experiment:
	@mkdir -p $(RUNS)
	$(BIN)/papermill nbs/70_run_experiment.ipynb $(RUNS)/$(RUN).ipynb --no-progress-bar --stdout-file /dev/stdout --stderr-file /dev/stderr -p run $(RUN) -p preset $(PRESET)
	$(BIN)/papermill nbs/71_run_report.ipynb $(RUNS)/$(RUN).report.ipynb --no-progress-bar -p run $(RUN)
	@mv $(RUNS)/$(RUN).ipynb $(RUNS)/$(RUN)/run.ipynb; rm -f $(RUNS)/$(RUN).report.ipynb
	@echo "The report: $(RUNS)/$(RUN)/report.html"

lab: .venv/core
	$(BIN)/python -m jupyterlab --ip=127.0.0.1 nbs
