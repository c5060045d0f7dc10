"""Pruning in a training loop of your own: two lines more than dense training.

python launch/examples/own_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from asp_dist.pruning import Budget, Pruner, Ramp, Track

EPOCHS, BATCH = 20, 64


def network() -> nn.Module:
    """A small network for images of 8 × 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def main() -> None:
    """Train on handwritten digits and prune to 10 % of the weights on the way."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.tensor(digits.target)
    (train_images, test_images), (train_labels, test_labels) = images.split([1437, 360]), labels.split([1437, 360])
    steps = EPOCHS * (len(train_images) // BATCH)

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pruner = Pruner(
        model,
        optimizer,
        Budget.parameters(sparsity=0.9),
        control=Track(),
        ramp=Ramp("cubic", 0.0, 0.5, freeze_at=0.75, total_steps=steps),
    )
    for epoch in range(EPOCHS):
        model.train()
        for batch in torch.randperm(len(train_images)).split(BATCH)[: len(train_images) // BATCH]:
            loss = nn.functional.cross_entropy(model(train_images[batch]), train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # the pruner attaches to this
            scheduler.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(test_images).argmax(1) == test_labels).float().mean()
        print(f"epoch {epoch}: accuracy {accuracy:.1%}, sparsity {pruner.snapshot().summary()['sparsity']:.2%}")

    pruner.finalize()
    pruner.remove()  # what is left is a plain model
    left = sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1)
    print(f"done: {left} of {sum(p.numel() for p in model.parameters() if p.dim() > 1)} weights")


if __name__ == "__main__":
    main()
