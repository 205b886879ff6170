# Every command here makes the environment first if it is not there. The plain pip and papermill lines are in README.md.
PYTHON ?= python3
RUN ?= demo
PRESET ?= demo
BIN = .venv/bin
README ?= README.md
RUNS = data/runs
# letter by letter as they were given, and read from the environment: neither make nor sh takes a name for code
override export RUN := $(value RUN)
override export PRESET := $(value PRESET)
export MPLBACKEND = agg
# threads that wait spin briefly, then sleep: on a busy machine about as good as not spinning at all, on a quiet one much better
export GOMP_SPINCOUNT = 1000
export PLOTLY_RENDERER = plotly_mimetype
export PYTHONWARNINGS = ignore::DeprecationWarning:zmq

.PHONY: help demo run lab test style bench sample readme docs export
help:
	@echo "make demo | run | lab | test | style | bench | sample | readme | docs | export"

.venv/core: pyproject.toml constraints.txt jupyter_server_config.py
	@mkdir -p .venv && date +%s > .venv/began
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	mkdir -p .venv/etc/jupyter .venv/share/jupyter/lab/settings && cp jupyter_server_config.py .venv/etc/jupyter/
	echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' > .venv/share/jupyter/lab/settings/overrides.json
	@echo "Environment: $$(($$(date +%s) - $$(cat .venv/began))) s, when it was made" > $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,docs,cluster,trackio,lerobot,atari,ppo,minari,wandb,hf]"
	touch $@

# One experiment and its report: make demo, or make run RUN=mine PRESET=smoke
demo run: .venv/core
	@case "$$RUN" in \
	""|[.-]*|*[!A-Za-z0-9_.-]*) printf '%s\n' "RUN=$$RUN is no name for a run: take letters, digits, - and _"; exit 2;; \
	*) if [ $${#RUN} -gt 100 ]; then echo "RUN has $${#RUN} letters: take 100 at most"; exit 2; fi;; esac; \
	if [ -f "$(RUNS)/$$RUN/report.html" ]; then echo "$(RUNS)/$$RUN is finished: see $(RUNS)/$$RUN/report.html; for another run say make $@ RUN=another"; else $(MAKE) --no-print-directory experiment; fi

.PHONY: experiment
experiment:
	@mkdir -p $(RUNS)
	@grep -qs '"finished"' "$(RUNS)/$$RUN/status.json" || $(BIN)/papermill nbs/7_run/70_run_experiment.ipynb "$(RUNS)/$$RUN.ipynb" --no-progress-bar --stdout-file - --stderr-file - -r run "$$RUN" -r preset "$$PRESET"
	$(BIN)/papermill nbs/7_run/71_run_report.ipynb "$(RUNS)/$$RUN.report.ipynb" --no-progress-bar --stdout-file - -r run "$$RUN"
	@if [ -f "$(RUNS)/$$RUN.ipynb" ]; then mv "$(RUNS)/$$RUN.ipynb" "$(RUNS)/$$RUN/run.ipynb"; fi; rm -f "$(RUNS)/$$RUN.report.ipynb"
	@cat .venv/core; echo "The report: $(RUNS)/$$RUN/report.html"

# On loopback, and with a token; that is why root may start it too, as in a container
lab: .venv/core
	$(BIN)/python -m jupyterlab --ip=127.0.0.1 --LabApp.default_url=/lab/tree/nbs/8_explore/80_start.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

# Lint and density, then every notebook, then pytest with a browser; the time of each part is printed
test: .venv/dev
	@if command -v chromium >/dev/null; then echo "chromium: $$(command -v chromium)"; elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then echo "installing chromium by apt"; (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-liberation >/dev/null) || echo "chromium could not be installed: browser tests will be skipped"; else echo "no chromium, and no right to install it: browser tests will be skipped (apt-get install chromium)"; fi
	@$(MAKE) --no-print-directory style
	@began=$$(date +%s); $(BIN)/nbdev-test --n-workers 2 --timing && echo "notebooks: $$(($$(date +%s) - began)) s"
	@began=$$(date +%s); $(BIN)/python -m pytest --durations 10 && echo "pytest: $$(($$(date +%s) - began)) s"

# One thought a line: ruff, and how dense package, tests and notebooks are
style: .venv/dev
	$(BIN)/ruff check worldmodels_nb tests
	$(BIN)/python tests/style.py

bench: .venv/dev
	$(BIN)/python -m pytest tests --benchmark-only --benchmark-columns=min,median,max,ops -s

# The committed sample, made again: eight episodes, the same bytes, and a trained run of all four models
sample: .venv/core
	$(BIN)/python -c "from worldmodels_nb.data.datasets import make_sample; print(make_sample())"
	$(BIN)/python -c "from worldmodels_nb.runs.sample import make_sample_run; print(make_sample_run())"

readme: .venv/core
	@$(BIN)/jupyter nbconvert --to markdown --stdout --log-level ERROR nbs/index.ipynb | sed "s|\.\./figures|figures|g; s|](\([0-9]_[a-z]*/\)|](nbs/\1|g" | awk '/^```/ {open = !open; if (open && $$0 == "```") $$0 = "```python"} 1' > "$(README)"

# The site in _docs: by Quarto where it is installed, by Sphinx where it is not
docs: .venv/dev
	@if command -v quarto >/dev/null; then $(BIN)/nbdev-docs; \
	else OMP_NUM_THREADS=1 $(BIN)/python -c "import sys; from worldmodels_nb.reference.site import make_docs; sys.exit(make_docs())"; fi

export: .venv/core
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean
