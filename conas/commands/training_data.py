"""The training images of searches and trainings, and how their checkpoints describe them."""
from collections.abc import Sequence

from conas import distributed
from conas.data.images import ImageSet, load
from conas.runs.options import DataOptions


def training_images(data: DataOptions, suffixes: Sequence[str], image_size: int | None) -> ImageSet:
    """The images of the training split, of `image_size` pixels; `suffixes` are those of files that count as images.

    Several processes call it alike, and nothing is downloaded twice. Raises InputError as `load` does.
    """
    return distributed.local_rank0_first(
        lambda: load(data.dataset, data.data, "train", image_size=image_size, subset=data.subset,
                     skip_bad_images=data.skip_bad_images, suffixes=suffixes, resize=data.resize,
                     follow_links=data.follow_links))


def describe_images(images: ImageSet, data: DataOptions, suffixes: Sequence[str], train_portion: float, split_seed: int
                    ) -> dict:
    """What checkpoints say of the images: which they are, and how they were split by `train_portion`."""
    return {"name": data.dataset, "root": data.data, "image_size": images.info.image_size, "subset": data.subset,
            "classes": list(images.info.classes), "fingerprint": images.fingerprint, "train_portion": train_portion,
            "split_seed": split_seed, "skip_bad_images": data.skip_bad_images, "resize": data.resize,
            "test_subset": data.test_subset, "suffixes": suffixes, "follow_links": data.follow_links}
