"""What a search does about its health, by flag: how often it looks, where it stops, and how it is kept sound."""
from collections.abc import Callable
from contextlib import closing

from conas import distributed
from conas.darts.architect import Batch
from conas.darts.drop_path import DropPath
from conas.darts.genotype import check_max_skips
from conas.darts.space import Space
from conas.darts.supernet import Supernet
from conas.errors import InputError
from conas.health.curvature import default_interval
from conas.runs.options import AlphaOptions, HealthOptions, ProcessOptions, SpeedOptions, WeightOptions


def apply_remedies(network: Supernet, space: Space, health: HealthOptions, weights: WeightOptions,
                   speed: SpeedOptions) -> DropPath | None:
    """Give a new supernet its limit of skips and, if there is to be any, its drop path, which is returned.

    Raises InputError for remedies that would do nothing, or not what they say.
    """
    if health.max_skips is not None:
        check_max_skips(health.max_skips, space.primitives)
        if type(network).genotype is not Supernet.genotype:
            raise InputError(f"--max_skips: {space.name} has a genotype() of its own, which knows no such limit; pass "
                             "max_skips=self.max_skips to derive() there and name it in a subclass, or leave it out")
        network.max_skips = health.max_skips
    if health.alpha_warmup >= weights.epochs:
        raise InputError(f"--alpha_warmup {health.alpha_warmup}: must be less than --epochs {weights.epochs}, or no "
                         "alpha is ever trained")
    if not health.drop_path_prob:
        return None
    if speed.cuda_graph:
        raise InputError("--drop_path_prob: a CUDA graph draws anew in each pass of a step, and these have to lose the "
                         "same edges; leave --cuda_graph out")
    return DropPath(network)


def find_interval(health: HealthOptions, alphas: AlphaOptions, weights: WeightOptions, processes: ProcessOptions,
                  steps: int) -> int:
    """The epochs between two measurements of the curvature, for epochs of `steps`; 0 is never.

    Raises InputError if it is wanted and cannot be had.
    """
    unable = processes.sync_bn and distributed.size() > 1
    if unable and health.curvature:
        raise InputError(f"--curvature {health.curvature}: cannot differentiate twice through the sums of --sync_bn; "
                         "leave one of them out")
    every = 0 if unable else health.curvature
    if every is None:
        every = default_interval(steps, weights.epochs, alphas.unrolled)
    if not every and health.stop_on == "curvature":
        raise InputError("--stop_on curvature: this search would not measure it by default; give --curvature K too, "
                         "the epochs between two measurements")
    return every


def first_batch(stream_of: Callable, size: int) -> Callable[[], Batch]:
    """What reads one batch of `size` images without augmentation from the stream that `stream_of` makes."""
    def read() -> Batch:
        with closing(stream_of(size, name="curvature", augment=False, drop_last=True).batches()) as batches:
            return next(batches)

    return read
