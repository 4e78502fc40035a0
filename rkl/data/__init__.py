"""Data sets as tensors. :func:`load` returns a data set; :func:`batches` iterates over a split of it on the device."""

from . import augment
from .dataset import DataError, Dataset, MissingDataError, Split, class_weights
from .loader import batches
from .sources import NAMES, load

__all__ = ["NAMES", "DataError", "Dataset", "MissingDataError", "Split", "augment", "batches", "class_weights", "load"]
