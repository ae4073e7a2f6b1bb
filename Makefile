# `make demo` and `make test` need python3, make and a package index; everything else they set up themselves.
PYTHON ?= python3
BIN := .venv/bin
SMALL := --dataset digits --init_channels 8 --layers 3 --epochs 6 --batch_size 32 --save demo
RETRAIN := --search demo --dataset digits --init_channels 16 --layers 3 --epochs 40 --batch_size 32 --auxiliary --save demo
TEXT := --dataset gospels --dropout 0.3 --dropoutx 0.2 --dropouti 0.1 --dropouth 0.1
SPACES := cnn_space1 cnn_space2 cnn_space3
# The networks of the demo and of the tests are so small that threads would mostly wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-rnn demo-train search test torture acceptance lint clean
.DELETE_ON_ERROR:

.venv/.core: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.core
	$(BIN)/pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

# Search all spaces on the digits that come with the project, test every checkpoint, average the committee.
demo: .venv/.core
	for space in $(SPACES); do (cd $$space && ../$(BIN)/python train_search.py $(SMALL)) || exit; done
	for space in $(SPACES); do (cd $$space && ../$(BIN)/python test_all.py --save demo) || exit; done
	$(BIN)/python test_ensemble.py --save demo

# Train the cells that the demo found from scratch, test them once, average the committee of retrained networks.
demo-train: demo
	for space in $(SPACES); do (cd $$space && ../$(BIN)/python train.py $(RETRAIN)) || exit; done
	for space in $(SPACES); do (cd $$space && ../$(BIN)/python test.py --save demo) || exit; done
	$(BIN)/python test_ensemble.py --stage train --save demo

# All spaces at once, each on a GPU of its own: make -j3 search FLAGS="--cutout". With fewer GPUs: make -j2 search GPUS=2.
GPUS ?= 3
SEARCHES := $(addprefix search-,$(SPACES))
.PHONY: $(SEARCHES)
search: $(SEARCHES)
$(SEARCHES): search-cnn_space%: .venv/.core
	cd cnn_space$* && ../$(BIN)/python train_search.py --device cuda:$$((($* - 1) % $(GPUS))) $(FLAGS)

# Search a recurrent cell on the text that comes with the project, train it twice, test both and their committee.
demo-rnn: .venv/.core
	cd rnn && ../$(BIN)/python train_search.py $(TEXT) --nhid 32 --batch_size 64 --epochs 5 --save demo
	for seed in 1 2; do (cd rnn && ../$(BIN)/python train.py $(TEXT) --nhid 128 --batch_size 32 --epochs 12 \
		--dropoute 0 --search demo --seed $$seed --save demo-$$seed) || exit; done
	for seed in 1 2; do (cd rnn && ../$(BIN)/python test.py --save demo-$$seed) || exit; done
	$(BIN)/python test_ensemble.py --task language --save demo --members 'rnn/train-demo-*/checkpoints/best.pt'

# At most 12 minutes on two cores: the slowest are listed at the end. In the order of names: xdist's own order leaves the files of few, long tests for the end, when the other core is idle.
test: .venv/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=15

# Kill a search and a training at every place that matters and start them again: about ten minutes.
torture: .venv/.dev
	$(BIN)/python -m tests.helpers.crash

# What takes longer than a test may: exhaustive variants, every kill, and the oldest versions in requirements.txt.
acceptance: test torture
	$(BIN)/python -m pytest -n auto --dist loadfile --durations=15 -m slow
	$(BIN)/python -m tests.helpers.oldest

lint: .venv/.dev
	$(BIN)/ruff check .

clean:
	rm -rf .venv rnn/search-demo rnn/train-demo-* committee-demo-language cnn_space*/search-demo cnn_space*/train-demo committee-demo
