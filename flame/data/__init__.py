"""Data sets, samplers, loaders with background threads, and transforms of batches of images."""

from flame.data import transforms
from flame.data._fashion_mnist import FashionMNIST, fashion_mnist
from flame.data.collate import default_collate, default_convert
from flame.data.dataset import (
    ConcatDataset,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    random_split,
)
from flame.data.images import ImageFolder
from flame.data.loader import DataLoader
from flame.data.placement import DevicePrefetcher, prefetch_to_device
from flame.data.sampler import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from flame.data.text import TextFile

__all__ = [
    "BatchSampler",
    "ConcatDataset",
    "DataLoader",
    "Dataset",
    "DevicePrefetcher",
    "FashionMNIST",
    "ImageFolder",
    "IterableDataset",
    "RandomSampler",
    "Sampler",
    "SequentialSampler",
    "Subset",
    "TensorDataset",
    "TextFile",
    "WeightedRandomSampler",
    "default_collate",
    "default_convert",
    "fashion_mnist",
    "prefetch_to_device",
    "random_split",
    "transforms",
]
