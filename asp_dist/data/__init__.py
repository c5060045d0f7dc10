"""Images to tensors: data sets, their order over epochs and ranks, and the pipelines that decode and augment them."""

from asp_dist.data.bad_files import DataError, DataReadError
from asp_dist.data.info import DataInfo, DataSet, inspect_data, open_data_set
from asp_dist.data.loaders import Loaders, build_loaders
from asp_dist.data.prepare.digits import prepare_digits
from asp_dist.data.prepare.preparation import prepare
from asp_dist.data.prepare.verification import verify

__all__ = [
    "DataError",
    "DataInfo",
    "DataReadError",
    "DataSet",
    "Loaders",
    "build_loaders",
    "inspect_data",
    "open_data_set",
    "prepare",
    "prepare_digits",
    "verify",
]
