"""Train the networks of `digits` and write their checkpoints: some minutes on one core.

python -m tests.data.train_digits
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tests.data.digits import NETWORKS, Digits, checkpoint, load_digits, load_network

EPOCHS, BATCH, RATE, SEED = 60, 64, 0.01, 0


def train(name: str, digits: Digits) -> nn.Module:
    """Return a trained network."""
    torch.manual_seed(SEED)
    module = NETWORKS[name]().train()
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.labels)
    batches = len(labels) // BATCH
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * batches)
    for _ in range(EPOCHS):
        for picked in torch.randperm(len(labels))[: batches * BATCH].view(batches, BATCH):
            optimizer.zero_grad()
            logits = module(_shifted(images[picked]))
            nn.functional.cross_entropy(logits, labels[picked], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return module.eval()


def _shifted(images: torch.Tensor) -> torch.Tensor:
    """Return the images, all moved by up to a pixel in either direction."""
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    top, left = torch.randint(3, (2,)).tolist()
    return padded[:, :, top : top + 8, left : left + 8]


def save(name: str, module: nn.Module) -> None:
    """Write the weights as float16."""
    arrays = {
        key: value.numpy().astype("float16")
        for key, value in module.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    np.savez_compressed(checkpoint(name), **arrays)


def main() -> None:
    """Train and save both, and say how good the saved ones are."""
    torch.set_num_threads(1)  # convolutions of 8x8 pixels; and the same sums on every machine
    digits, unseen = load_digits()
    for name in NETWORKS:
        save(name, train(name, digits))
        module = load_network(name)
        for kind, part in (("training", digits), ("test", unseen)):
            right = module(torch.from_numpy(part.images)).argmax(1).numpy() == part.labels
            print(f"{name}: {right.sum()} of {right.size} {kind} digits ({right.mean():.2%})")
        print(f"{checkpoint(name)}: {checkpoint(name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
