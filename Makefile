# What one does with MetricStream. `make` alone lists it.

PORT ?= 8080
VENV := .venv
PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help run test lint soak queries queries-diff scale axe load perf clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 16

run:  ## serve on http://127.0.0.1:8080 (another port: make run PORT=9000)
	$(PYTHON) metricstream.py $(PORT)

$(VENV)/ready: Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check pytest==8.4.2 ruff==0.14.4 mypy==1.18.2
	touch $@

test: $(VENV)/ready  ## run all tests, in a virtual environment of their own
	$(VENV)/bin/python -m pytest -q test_metricstream.py

lint: $(VENV)/ready  ## check the style and the types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check metricstream.py load_test.py
	$(VENV)/bin/mypy metricstream.py load_test.py

soak: $(VENV)/ready  ## ten minutes of load with kills, faults and hostile clients
	METRICSTREAM_SOAK_S=600 $(VENV)/bin/python -m pytest -q -k "soak or kill_9 or client_ids or damaged or grammar or slow_clients or dictionary or fast_path or generated or mutated or fuzzed or whatever or million or resets or a_restart or half_closed or worst_json or takes_no_more_memory" test_metricstream.py

queries: $(VENV)/ready  ## time queries beside a real Prometheus, if prometheus and promtool are installed
	METRICSTREAM_BENCH=1 $(VENV)/bin/python -m pytest -q -s -k "beside_prometheus" test_metricstream.py

queries-diff: $(VENV)/ready  ## ask ten thousand generated queries of MetricStream and of an installed Prometheus
	METRICSTREAM_QUERIES=10000 $(VENV)/bin/python -m pytest -q -s -k "generated_queries" test_metricstream.py

scale: $(VENV)/ready  ## three agents that are killed again and again forward to an installed VictoriaMetrics
	METRICSTREAM_SCALE=1 $(VENV)/bin/python -m pytest -q -s -k "test_scale" test_metricstream.py

axe: $(VENV)/ready  ## look for barriers in the page with axe-core, if npm and chromedriver are installed
	npm pack --silent --pack-destination $(VENV) axe-core@4.14.1
	tar -xzf $(VENV)/axe-core-4.14.1.tgz -C $(VENV) package/axe.min.js
	METRICSTREAM_AXE=$(VENV)/package/axe.min.js $(VENV)/bin/python -m pytest -q -k "axe" test_metricstream.py

load:  ## load a running server: 50 clients with 200 requests each
	$(PYTHON) load_test.py $(PORT) 50 200

perf:  ## the systematic performance run, into performance_results.txt
	./performance_test.sh

clean:  ## remove what the other targets made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache __pycache__ performance_results.txt
