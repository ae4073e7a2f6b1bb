"""What benchmarks/search_step.py compares: implementations, each with a network, optimizers and random batches."""
from importlib import import_module

import torch

from benchmarks import textbook
from conas.commands.search import weight_optimizer, weight_step
from conas.engine.cuda_graph import WARM_UP, Replayed, ReplayedForward, on_device
from conas.engine.door import accelerate
from conas.engine.inference import prepared
from conas.runs.options import WeightOptions

RECIPE = WeightOptions()


class Contestant:
    """One implementation of a space's search on random batches of its own; `works` are what is timed.

    `name` is "ours", "textbook", or "channels_last", the textbook with images and network in that memory format.
    """

    def __init__(self, name: str, space: str, channels: int, layers: int, batch_size: int, eval_batch: int = 0,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, image_size: int = 32,
                 seed: int = 0):
        torch.manual_seed(seed)
        ours = import_module(f"{space}.model_search").Network(channels, 10, layers)
        ours.to(device, dtype)
        torch.manual_seed(seed + 1)
        batches = [torch.randn(n, 3, image_size, image_size, dtype=torch.float64).to(device, dtype)
                      for n in (batch_size, batch_size, eval_batch)]
        labels = torch.randint(10, (2, batch_size)).to(device)
        if name in ("ours", "channels_last"):
            batches = [x.contiguous(memory_format=torch.channels_last) for x in batches]
        if name == "ours":
            self.network = ours.to(memory_format=torch.channels_last)
            accelerate(ours)
            optimizer = weight_optimizer(ours, RECIPE)
            architect = import_module(f"{space}.architect").Architect(ours, optimizer)
        else:
            self.network = textbook.Network(ours.primitives, channels, 10, layers).to(device, dtype)
            self.network.load_state_dict(ours.state_dict())
            if name == "channels_last":
                self.network.to(memory_format=torch.channels_last)
            optimizer = textbook.weight_optimizer(self.network, RECIPE.learning_rate)
            architect = textbook.Architect(self.network)
        train, valid, images = (batches[0], labels[0]), (batches[1], labels[1]), batches[2]
        rate = RECIPE.learning_rate

        def evaluation():
            self.network.eval()
            with torch.inference_mode():
                forward(images)
            self.network.train()

        if name == "ours":
            self.works = {"architect": lambda: architect.step(train, valid, rate),
                          "weights": lambda: weight_step(ours, optimizer, train, RECIPE.grad_clip)}
        else:
            self.works = {"architect": lambda: architect.step(train, valid, rate, optimizer),
                          "weights": lambda: textbook.weight_step(self.network, optimizer, train, RECIPE.grad_clip)}
        self.works["evaluation"] = evaluation
        self.graph, forward = None, self.network
        if name == "ours":
            forward = prepared(ours)  # of the first weights; test_all.py does this once for all batches
            ours.train()
        if name == "ours" and train[0].device.type == "cuda" and dtype == torch.float32:
            # not in float64, which is for comparing: an Adam that a graph can hold corrects its bias in float32
            forward = ReplayedForward(forward, train[0].device)
            for own in (optimizer, architect.alpha_optimizer):
                on_device(own, True)

            def both(train, valid, lr):
                architect.step(train, valid, lr)
                return weight_step(ours, optimizer, train, RECIPE.grad_clip)

            replayed = Replayed(both, optimizer, batch_size, train[0].device, self.log)
            self.graph = lambda: replayed(train, valid, rate)

    def log(self, text: str) -> None:
        """Of a graph that cannot be recorded."""
        raise SystemExit(text)

    def iteration(self) -> None:
        """As train_search.py takes it: at once if there is a graph."""
        if self.graph:
            self.graph()
        else:
            self.works["architect"]()
            self.works["weights"]()

    def hypergradient(self) -> torch.Tensor:
        """Of an architect step, which this takes."""
        self.works["architect"]()
        return torch.cat([alpha.grad.flatten() for alpha in self.network.alphas().values()])


def iterate(contestant: Contestant) -> None:
    """Until all that an iteration needs is there: a graph is recorded in the fourth."""
    for _ in range(WARM_UP + 2 if contestant.graph else 2):
        contestant.iteration()
