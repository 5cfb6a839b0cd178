"""The peer of data_loader.cc: torch's DataLoader over the same data with the same normalisation.

Prints `samples_per_s N`, of the best of three passes.

    data_loader.py [num_workers=2] [batch_size=64]
"""

import gzip
import sys
import time

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

ROOT = "/usr/share/datasets/fashion-mnist"


def read(name, header):
    with gzip.open(f"{ROOT}/{name}.gz") as file:
        return torch.from_numpy(numpy.frombuffer(file.read(), numpy.uint8, offset=header).copy())


class FashionMNIST(Dataset):
    """As torchvision does it, without the detour over PIL images, which would only cost time."""

    def __init__(self):
        self.images = read("train-images-idx3-ubyte", 16).view(-1, 1, 28, 28)
        self.labels = read("train-labels-idx1-ubyte", 8).tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index].float().div_(255).sub_(0.2860).div_(0.3530)
        return {"image": image, "label": self.labels[index]}


def samples_per_s(loader):
    begin = time.perf_counter()
    samples = sum(len(batch["label"]) for batch in loader)
    return samples / (time.perf_counter() - begin)


def main():
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    batch_size = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    loader = DataLoader(FashionMNIST(), batch_size=batch_size, shuffle=True, num_workers=workers)
    samples_per_s(loader)  # warms caches
    print(f"samples_per_s {max(samples_per_s(loader) for _ in range(3)):.0f}")


if __name__ == "__main__":
    main()
